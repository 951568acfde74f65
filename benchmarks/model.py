"""Our model against transformers' Llama and against torch's own encoder layers, on the same batch.

Ours and transformers' have the same weights and give the same logits, which is checked first. The
third is what one builds from ``torch.nn.TransformerEncoder`` in ten lines: learned positions,
LayerNorm and GELU at the same number of parameters. A training step is forward, loss, backward and
AdamW. Two batches: one as in training, and a small one, in which calling functions costs most. On
a machine with a GPU a model of 124 million parameters is measured too, in bfloat16.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from measure import compare, environment, report, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from llmbook.environment import best_device, seed_everything
from llmbook.model import ModelConfig, TransformerLM, count_parameters

BATCHES = ((8, 256), (1, 64))  # rows, tokens in each
SHAPES = {  # d_model, layers, heads (of 64), heads of keys
    "0.2M": (64, 3, 2, 2),
    "1M": (128, 4, 2, 2),
    "3M": (192, 6, 3, 3),
    "10M": (320, 8, 5, 5),
    "124M": (768, 16, 12, 4),
}
disable_progress_bar()
Model = Callable[[Tensor], Tensor]


class Encoder(nn.Module):
    """A language model of ``torch.nn`` parts, as plain as it gets."""

    def __init__(self, config: ModelConfig, d_ff: int):
        """Take sizes from ``config``, but for the width of the feed-forward layers."""
        super().__init__()
        d_model = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d_model)
        self.positions = nn.Embedding(config.context_length, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, config.n_heads, d_ff, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, config.n_layers, nn.LayerNorm(d_model), enable_nested_tensor=False
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, with the embedding as output matrix."""
        x = self.embedding(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.size(1), device=ids.device)
        x = self.layers(x, mask=mask, is_causal=True)
        return nn.functional.linear(x, self.embedding.weight)


def sizes_for(device: torch.device) -> list[str]:
    """What is measured on a device: the largest only where there is a GPU."""
    return [size for size in SHAPES if size != "124M" or device.type == "cuda"]


def contestants(size: str, device: torch.device) -> dict[str, nn.Module]:
    """The three models of a size, the first two with the same weights."""
    seed_everything(0)
    d_model, n_layers, n_heads, n_kv_heads = SHAPES[size]
    config = ModelConfig(
        vocab_size=2048 if size != "124M" else 32_000,
        context_length=256,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        tie_embeddings=True,
    )
    ours = TransformerLM(config)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder, "model"))
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype=torch.float32)
    d_ff = round((count_parameters(ours) - count_parameters(Encoder(config, 8))) / n_layers)
    plain = Encoder(config, 8 + d_ff // (2 * d_model + 1))
    return {
        "llmbook": ours.to(device),
        "transformers": theirs.to(device),
        "torch.nn": plain.to(device),
    }


def logits_of(name: str, model: nn.Module, ids: Tensor) -> Tensor:
    """Call a model without what only generation needs."""
    return model(ids, use_cache=False).logits if name == "transformers" else model(ids)


def random_batch(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the same for all models."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2048, (rows, length + 1), generator=generator).to(device)
    return ids[:, :-1], ids[:, 1:]


def forward(name: str, model: nn.Module, inputs: Tensor) -> Tensor:
    """One forward pass without gradients."""
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
        logits = logits_of(name, model, inputs)
    return _done(logits)


def loss_of(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss, in nats per token."""
    with torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
        logits = logits_of(name, model, inputs)
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def training_step(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor
) -> Tensor:
    """One step of AdamW."""
    loss = loss_of(name, model, inputs, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return _done(loss.detach())


def _done(result: Tensor) -> Tensor:
    """Wait until a GPU has computed what was asked of it."""
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def flops_of_step(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """What torch counts for a forward pass and for forward and backward: matrix products only."""
    # Fused attention on a CPU is not in the counter's table: the composed one counts the same.
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as once:
            logits_of(name, model, inputs)
        with FlopCounterMode(display=False) as both:
            loss_of(name, model, inputs, targets).backward()
    model.zero_grad()
    return once.get_total_flops(), both.get_total_flops()


def matmul_peak(device: torch.device) -> float:
    """FLOP/s of large square matrix products, best of several."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = compare({"matmul": lambda: _done(a @ b)}, repeats=60)["matmul"]
    return 2 * size**3 / timing.seconds


def kernel_shares(size: str, device: torch.device) -> str:
    """Say how much of a training step each model spends in kernels that all of them call."""
    inputs, targets = random_batch(*BATCHES[0], device)
    shares = []
    for name, model in contestants(size, device).items():
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        training_step(name, model, optimizer, inputs, targets)
        with torch.profiler.profile() as profile:
            training_step(name, model, optimizer, inputs, targets)
        events = profile.key_averages()
        times = {event.key: event.self_cpu_time_total for event in events}
        common = sum(
            time
            for key, time in times.items()
            if key in ("aten::mm", "aten::addmm", "aten::_fused_adamw_")
            or key.startswith(("aten::_scaled_dot_product", "aten::_log_softmax"))
        )
        shares.append(f"{common / sum(times.values()):.0%} ({name})")
    return ", ".join(shares)


def peak_memory(name: str, size: str, rows: int, length: int, device_type: str) -> float:
    """Megabytes that training steps add at their peak, parameters not counted; a fresh process."""
    device = torch.device(device_type)
    model = contestants(size, device)[name]
    inputs, targets = random_batch(rows, length, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if device_type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(2):
        training_step(name, model, optimizer, inputs, targets)
    if device_type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status").read_text()
    high_water = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return (high_water - before) / 2**20


def measure_size(
    size: str, rows: int, length: int, device: torch.device, peak: float
) -> list[list[str]]:
    """Lines of the table for one size and one batch."""
    models = contestants(size, device)
    inputs, targets = random_batch(rows, length, device)
    with torch.no_grad():
        both = [logits_of(name, models[name], inputs) for name in ("llmbook", "transformers")]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
    flops = {name: flops_of_step(name, m, inputs, targets) for name, m in models.items()}
    optimizers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in models.items()}
    steps = {
        name: partial(training_step, name, model, optimizers[name], inputs, targets)
        for name, model in models.items()
    }
    passes = {name: partial(forward, name, model, inputs) for name, model in models.items()}
    for warm_up in (*steps.values(), *passes.values()):
        warm_up()
    repeats = 12 if inputs.numel() > 1000 else 60
    forwards, trainings = compare(passes, repeats), compare(steps, repeats)
    lines, tokens = [], inputs.numel()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, model in models.items():
            once, step = forwards[name].seconds, trainings[name].seconds
            memory = pool.apply(peak_memory, (name, size, rows, length, device.type))
            lines.append(
                [
                    f"{size}, {rows} x {length}, {name}",
                    f"{count_parameters(model) / 1e6:.2f} M",
                    f"{tokens / once:,.0f}",
                    f"{forwards['transformers'].seconds / once:.2f}",
                    f"{flops[name][0] / once / peak:.0%}",
                    f"{tokens / step:,.0f}",
                    f"{trainings['transformers'].seconds / step:.2f}",
                    f"{flops[name][1] / step / peak:.0%}",
                    f"{memory:,.0f}",
                ]
            )
    return lines


def main() -> None:
    """Measure, compare, report."""
    device = best_device()
    if device.type not in {"cpu", "cuda"}:
        device = torch.device("cpu")
    if sys.platform != "linux":
        sys.exit("peak memory is read from /proc: run this on Linux")
    peak = max(matmul_peak(device) for _ in range(6))  # a machine that others share has moods
    lines = [
        line
        for size in sizes_for(device)[1:]  # the smallest is there for generation
        for rows, length in BATCHES
        for line in measure_size(size, rows, length, device, peak)
    ]
    bound = ""
    if device.type == "cpu":
        bound = (
            "What bounds the ratio: of a training step at 3M parameters, matrix products, fused "
            f"attention, softmax of the loss and AdamW take {kernel_shares('3M', device)} of the "
            "time, and these kernels of torch are the same for all three."
        )
    header = ["model, batch", "parameters", "forward, tokens/s", "ratio", "of peak"]
    header += ["training, tokens/s", "ratio", "of peak", "memory, MB"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the processor"
    report(
        "model",
        f"{environment('llmbook', 'torch', 'transformers')}, {torch.get_num_threads()} threads",
        f"On {name}. A batch is given as rows x tokens; ratios are speeds against transformers' "
        "Llama, which has the same weights and gives the same logits. The "
        f"peak is that of large matrix products, measured at {peak / 1e9:,.0f} GFLOP/s; the share "
        "counts all matrix products, those of attention (as if not causal) and of the output "
        "included. Memory is what training adds at its peak to the loaded model.",
        table(header, lines),
        *filter(None, [bound]),
    )


if __name__ == "__main__":
    main()
