"""Precisions on a GPU: speed, memory and MFU of a training step at 124 million parameters.

The book's trainer with float32, tf32, bfloat16 and float16 products, blocks compiled or not. Where
there is no GPU it says so, and leaves the table as it is.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from measure import environment, report, table
from torch import Tensor

from llmbook.batches import Batch, ResumableBatches
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig, TransformerLM, count_parameters, flops_per_token
from llmbook.precision import MixedPrecision, memory_breakdown
from llmbook.training import Trainer, TrainingConfig

ROWS, LENGTH, STEPS, REPEATS = 16, 1024, 10, 3
# By name: the precision of the trainer, whether float32 products may be rounded to tf32, and the
# dtype whose fastest product the MFU is a share of.
KINDS = {
    "fp32": ("float32", False, torch.float32),
    "tf32": ("float32", True, torch.float32),
    "bf16": ("bfloat16", True, torch.bfloat16),
    "fp16": ("float16", True, torch.float16),
}


class RandomRows(ResumableBatches):
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


def peak_flops_of(dtype: torch.dtype) -> float:
    """The operations a second of a large product, at the setting for tf32 of now."""
    a = torch.randn(8192, 8192, dtype=dtype, device="cuda")

    def product() -> Tensor:
        return a @ a

    product()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        product()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def measure(name: str, config: ModelConfig, compiled: bool) -> list[str]:
    """One line of the table."""
    precision, tf32, dtype = KINDS[name]
    torch.backends.cuda.matmul.allow_tf32 = tf32
    peak = peak_flops_of(dtype)
    seed_everything(0)
    torch.cuda.reset_peak_memory_stats()
    settings = TrainingConfig(n_steps=STEPS, batch_size=ROWS, compile=compiled, log_every=STEPS)
    model = TransformerLM(config).cuda()
    trainer = Trainer(
        model, RandomRows(config.vocab_size), settings, precision=MixedPrecision(precision)
    )
    seconds = float("inf")
    for repeat in range(REPEATS + 1):  # the first warms up, compiles, and finds the loss scale
        trainer.config = replace(settings, n_steps=trainer.step + STEPS)
        torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.train()
        torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - start if repeat else seconds)
    memory = torch.cuda.max_memory_allocated()
    formula = sum(
        memory_breakdown(config, ROWS, LENGTH, precision=precision, chunk_size=512).values()
    )
    tokens = STEPS * ROWS * LENGTH / seconds
    share = flops_per_token(config, LENGTH, causal=False) * tokens / peak
    return [
        f"{name}{', compiled' if compiled else ''}",
        f"{tokens:,.0f}",
        f"{memory / 2**30:.1f} GiB",
        f"{formula / 2**30:.1f} GiB",
        f"{peak / 1e12:,.0f} TFLOP/s",
        f"{share:.0%}",
    ]


def main() -> None:
    """Measure and report, or say that there is nothing to measure on."""
    if not torch.cuda.is_available():
        print("no GPU that CUDA can use: benchmarks/results/gpu.md is left as it is")
        return
    config = ModelConfig.preset("gpt2")
    lines = [measure(name, config, compiled) for compiled in (False, True) for name in KINDS]
    header = ["precision", "tokens/s", "memory", "by the formula", "large products", "MFU"]
    report(
        "gpu",
        f"{environment('llmbook', 'torch')}, {torch.cuda.get_device_name()}",
        f"Whole steps of the trainer at {count_parameters(config) / 1e6:.0f} M parameters, batches "
        f"of {ROWS} x {LENGTH} tokens, the loss in chunks. Memory is the most that CUDA's "
        "allocator had given out. MFU is the share of the speed of large products of that kind.",
        table(header, lines),
    )


if __name__ == "__main__":
    main()
