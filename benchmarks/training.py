"""Training speed: the book's trainer against plain loops around three models.

All learn from the same batches of random ids. The trainer does all that it does in earnest: loss in
chunks, clipping, schedule, log. The plain loop is what nanoGPT's comes to on one device: logits,
``cross_entropy``, clipping, torch's fused AdamW. The first three contestants have the same weights,
and before anything is timed their losses must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from measure import compare, environment, report, table
from model import contestants, logits_of, matmul_peak, sizes_for
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

from llmbook.batches import Batch, ResumableBatches
from llmbook.environment import best_device
from llmbook.model import ModelConfig, TransformerLM, count_parameters, flops_per_token
from llmbook.training import Trainer, TrainingConfig

ROWS, LENGTH, STEPS = 8, 256, 10
RATE, DECAY, CLIP = 1e-3, 0.1, 1.0


class RandomBatches(ResumableBatches):
    """The same rows of random ids at each step."""

    def __init__(self, vocab_size: int):
        """Draw the rows once."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (ROWS, LENGTH + 1), generator=generator)
        self.batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def __getitem__(self, step: int) -> Batch:
        """Return the batch, whatever the step."""
        return self.batch

    def identity(self) -> dict[str, str]:
        """All are alike."""
        return {"batches": "random ids"}


class GPTBlock(nn.Module):
    """Attention and a feed-forward network as in GPT-2, by torch's fused kernels."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int):
        """Take the sizes."""
        super().__init__()
        self.n_heads = n_heads
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next block reads."""
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        found = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT(nn.Module):
    """A plain GPT of about as many parameters as ``config`` has: learned positions, tied head."""

    def __init__(self, config: ModelConfig, d_ff: int):
        """Take sizes from ``config``, but for the width of the feed-forward layers."""
        super().__init__()
        d_model = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d_model)
        self.positions = nn.Embedding(config.context_length, d_model)
        blocks = (GPTBlock(d_model, config.n_heads, d_ff) for _ in range(config.n_layers))
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, with the embedding as output matrix."""
        x = self.embedding(ids) + self.positions.weight[: ids.size(1)]
        return linear(self.norm(self.blocks(x)), self.embedding.weight)


def nanogpt_like(config: ModelConfig, n_parameters: int) -> GPT:
    """Return the GPT whose number of parameters is nearest."""
    per_unit = count_parameters(GPT(config, 9)) - count_parameters(GPT(config, 8))
    return GPT(config, 8 + round((n_parameters - count_parameters(GPT(config, 8))) / per_unit))


NANO = "nanoGPT's kind, plain loop"
Step = Callable[[], float]


def plain_loop(name: str, model: nn.Module, batch: Batch) -> Step:
    """Return a function that makes some steps of the loop of nanoGPT and gives the mean loss."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    def steps() -> float:
        total = torch.zeros((), device=batch.inputs.device)
        for _ in range(STEPS):
            with torch.autocast("cuda", torch.bfloat16, enabled=batch.inputs.is_cuda):
                logits = logits_of(name, model, batch.inputs)
                loss = cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
            total += loss.detach()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = RATE
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total.item() / STEPS

    return steps


def trained(model: TransformerLM, vocab_size: int) -> Step:
    """Return a function that makes some steps of the book's trainer and gives the mean loss."""
    precision = "bfloat16" if next(model.parameters()).is_cuda else "float32"
    config = TrainingConfig(
        n_steps=STEPS,
        batch_size=ROWS,
        learning_rate=RATE,
        weight_decay=DECAY,
        clip_norm=CLIP,
        schedule="constant",
        log_every=STEPS,
        precision=precision,
    )
    trainer = Trainer(model, RandomBatches(vocab_size), config)

    def steps() -> float:
        trainer.config = replace(config, n_steps=trainer.step + STEPS)
        return trainer.train().rows[-1]["loss"]

    return steps


def contenders(size: str, device: torch.device) -> dict[str, tuple[nn.Module, Step]]:
    """The models of a size, each with what trains it."""
    models = contestants(size, device)
    ours, theirs = models["llmbook"], models["transformers"]
    assert isinstance(ours, TransformerLM)
    config = ours.config
    batch = RandomBatches(config.vocab_size).batch.to(device)
    twin = TransformerLM(config).to(device)
    twin.load_state_dict(ours.state_dict())
    gpt = nanogpt_like(config, count_parameters(ours)).to(device)
    return {
        "llmbook, Trainer": (ours, trained(ours, config.vocab_size)),
        "llmbook, plain loop": (twin, plain_loop("llmbook", twin, batch)),
        "transformers, plain loop": (theirs, plain_loop("transformers", theirs, batch)),
        "nanoGPT's kind, plain loop": (gpt, plain_loop("gpt", gpt, batch)),
    }


def measure_size(size: str, device: torch.device, peak: float) -> list[list[str]]:
    """Lines of the table for one size."""
    both = contenders(size, device)
    losses = {name: step() for name, (_, step) in both.items()}  # a warm-up, too
    first, *others = list(losses.values())[:3]
    assert all(abs(loss - first) < 5e-3 for loss in others), losses
    times = compare({name: step for name, (_, step) in both.items()}, repeats=5)
    tokens, lines = STEPS * ROWS * LENGTH, []
    per_token = flops_per_token(both["llmbook, Trainer"][0].config, LENGTH, causal=False)
    seconds = {name: timing.seconds for name, timing in times.items()}
    for name, (model, _) in both.items():
        share = per_token * tokens / seconds[name] / peak
        lines.append(
            [
                f"{size}, {name}",
                f"{count_parameters(model) / 1e6:.2f} M",
                f"{tokens / seconds[name]:,.0f}",
                f"{seconds['transformers, plain loop'] / seconds[name]:.2f}",
                f"{seconds[NANO] / seconds[name]:.2f}",
                f"{share:.0%}" if name != NANO else "",
            ]
        )
    return lines


def main() -> None:
    """Measure, compare, report."""
    device = best_device()
    if device.type not in {"cpu", "cuda"}:
        device = torch.device("cpu")
    peak = max(matmul_peak(device) for _ in range(6))
    lines = [line for size in sizes_for(device) for line in measure_size(size, device, peak)]
    header = [
        "model, loop",
        "parameters",
        "tokens/s",
        "to transformers",
        "to nanoGPT's kind",
        "MFU",
    ]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the processor"
    report(
        "training",
        f"{environment('llmbook', 'torch', 'transformers')}, {torch.get_num_threads()} threads",
        f"On {name}, batches of {ROWS} x {LENGTH} tokens, whole steps: forward, loss, backward, "
        "clipping, AdamW. The first three have the same weights and reach the same losses. The "
        "trainer also checks each step, follows its schedule and logs a row of measurements every "
        "10 steps. Ratios are speeds, above 1 where the row is the faster one. MFU is the share of "
        f"the {peak / 1e9:,.0f} GFLOP/s of large matrix products, attention as if not causal.",
        table(header, lines),
    )


if __name__ == "__main__":
    main()
