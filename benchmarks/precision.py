"""What compiling buys in training: blocks compiled against eager, the book's model and Llama.

All learn from the same random ids, in float32 and with torch's fused AdamW; the models of a size
have the same weights, and their losses must agree before anything is timed. Generation has a
benchmark of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measure import compare, environment, report, table
from model import contestants, logits_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmbook.model import TransformerLM, count_parameters

ROWS, LENGTH, STEPS, REPEATS = 8, 256, 5, 5
SIZES = ("0.2M", "1M", "3M")


def stepper(name: str, model: nn.Module, ids: Tensor) -> Callable[[], float]:
    """Return a function that makes some steps and gives the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def steps() -> float:
        loss = torch.zeros(())
        for _ in range(STEPS):
            logits = logits_of(name, model, ids[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return steps


def compiled(model: nn.Module) -> nn.Module:
    """Compile each block, as ``TrainingConfig(compile=True)`` does."""
    blocks = model.blocks if isinstance(model, TransformerLM) else model.model.layers
    for block in blocks:
        block.compile()
    return model


def measure_size(size: str, device: torch.device) -> list[list[str]]:
    """The lines of one size."""
    torch._dynamo.reset()
    models, steps = {}, {}
    for kind in ("eager", "compiled"):
        for name, model in contestants(size, device).items():
            if name in ("llmbook", "transformers"):
                models[f"{name}, {kind}"] = compiled(model) if kind == "compiled" else model
    vocab_size = models["llmbook, eager"].config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (ROWS, LENGTH + 1), generator=generator).to(device)
    first, losses = {}, {}
    for name, model in models.items():
        steps[name] = stepper(name.split(",")[0], model, ids)
        start = time.perf_counter()
        losses[name] = steps[name]()  # compiles, too
        first[name] = time.perf_counter() - start
    assert max(losses.values()) - min(losses.values()) < 5e-3, losses
    timings = {name: t.seconds for name, t in compare(steps, repeats=REPEATS).items()}
    lines = []
    for name, seconds in timings.items():
        eager = f"{name.split(',')[0]}, eager"
        waited = first[name] - seconds if name != eager else 0.0
        gained = (timings[eager] - seconds) / STEPS
        pays = f"{waited / gained:,.0f} steps" if gained > 0 else ""
        lines.append(
            [
                f"{size}, {name}",
                f"{count_parameters(models[name]) / 1e6:.2f} M",
                f"{STEPS * ROWS * LENGTH / seconds:,.0f}",
                f"{timings[eager] / seconds:.2f}",
                f"{timings['transformers, eager'] / seconds:.2f}",
                f"{waited:.0f} s" if name != eager else "",
                pays,
            ]
        )
    return lines


def main() -> None:
    """Measure and report."""
    device = torch.device("cpu")
    lines = [line for size in SIZES for line in measure_size(size, device)]
    header = [
        "model",
        "parameters",
        "tokens/s",
        "to eager",
        "to transformers, eager",
        "compiling",
        "pays after",
    ]
    report(
        "precision",
        f"{environment('llmbook', 'torch', 'transformers')}, {torch.get_num_threads()} threads",
        f"On the processor, training in float32, batches of {ROWS} x {LENGTH} tokens, plain loops "
        "with the same weights and losses: forward, loss, backward, clipping, fused AdamW. Blocks "
        "are compiled one by one, by `block.compile()`. Ratios are speeds, above 1 where the row "
        "is the faster one.",
        table(header, lines),
    )


if __name__ == "__main__":
    main()
