"""Mixed precision with one part of the recipe taken away: the longer runs of chapter 15.

The runs are those of the chapter, whose cells have time for 60 steps only: the same weights and
batches for each seed, casts that are emulated, and validation losses compared with the run in
``float32`` that has the same seed, with Student's interval at 95 %.
"""

from __future__ import annotations

import math
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from measure import environment, report, table
from torch.utils._pytree import tree_map

from llmbook.batches import BatchSampler, PackedDocuments, pack_documents, write_shards
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import (
    AdamW,
    clip_gradients,
    cosine_schedule,
    cross_entropy,
    parameter_groups,
)
from llmbook.precision import CastProducts, CompactAdamW, GradScaler
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe
from llmbook.training import compact

SEEDS, RATE = 3, 3e-3
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776}[SEEDS - 1]  # the 97.5 % point, by degrees of freedom
SIZES = {"context_length": 128, "d_model": 32, "n_layers": 2, "n_heads": 2}


class RoundEverything(CastProducts):
    """Round what any operation returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, and round."""
        return tree_map(self.narrow, func(*args, **(kwargs or {})))


class Variant(NamedTuple):
    """A way to train: the context of the forward pass, and what else is special."""

    context: Any = nullcontext
    scaled: bool = False
    parts: int = 1  # how many batches like ours one step stands for
    pure: bool = False  # whether weights and means are stored in 16 bits
    backend: str = "torch"
    optimizer: Any = AdamW
    beta: float = 0.95
    sizes: tuple[tuple[str, int], ...] = ()


def emulated(dtype: torch.dtype, kind: Any = CastProducts) -> Any:
    """Return what makes a context whose casts are emulated."""
    return partial(kind, dtype, emulate=True)


BF16, FP16 = emulated(torch.bfloat16), emulated(torch.float16)
RECIPE = {
    "float32": Variant(),
    "bfloat16 products": Variant(BF16),
    "float16, scaled, large batch": Variant(FP16, scaled=True, parts=2**10),
    "float16, no scale": Variant(FP16),
    "float16, no scale, large batch": Variant(FP16, parts=2**10),
    "bfloat16, weights in 16 bits": Variant(BF16, pure=True),
    "bfloat16, everything rounded": Variant(
        emulated(torch.bfloat16, RoundEverything), backend="reference"
    ),
}
SMALL = Variant(beta=0.999, sizes=(("d_model", 16), ("n_layers", 1)))
STATES = {
    "float32": SMALL,
    "16 bits, to nearest": SMALL._replace(optimizer=partial(CompactAdamW, rounding="nearest")),
    "16 bits, by chance": SMALL._replace(optimizer=partial(CompactAdamW, rounding="stochastic")),
}


def final_loss(
    rows: PackedDocuments, vocab_size: int, how: Variant, seed: int, steps: int
) -> float:
    """Train once; return the validation loss, in nats per token."""
    seed_everything(seed)
    config = ModelConfig(vocab_size=vocab_size, **SIZES | dict(how.sizes))
    model, batches = TransformerLM(config, how.backend), BatchSampler(rows, batch_size=8)
    optimizer = how.optimizer(parameter_groups(model, 0.1), lr=RATE, betas=(0.9, how.beta))
    scaler = GradScaler(enabled=how.scaled)
    schedule, taken = cosine_schedule(steps, warmup=10), 0
    for step in range(steps):
        batch = compact(batches[1000 * seed + step])
        with how.context():
            loss = cross_entropy(model(batch.inputs), batch.targets)
        optimizer.zero_grad()
        scaler.scale(loss / how.parts).backward()
        scaler.unscale_(optimizer)
        torch._foreach_mul_([p.grad for p in model.parameters()], how.parts)
        clip_gradients(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule(taken)
        taken += not scaler.found_inf(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if how.pure:
            for entries in [model.state_dict(), *optimizer.state.values()]:
                for name, tensor in entries.items():
                    if name != "step":
                        tensor.data.copy_(tensor.bfloat16())
    held_out = compact(rows.batch(range(1100, 1164)))
    with torch.no_grad():
        return float(cross_entropy(model(held_out.inputs), held_out.targets))


def compared(data: tuple[PackedDocuments, int], variants: dict[str, Variant], steps: int) -> str:
    """Train all ``variants`` with all seeds; return the table of differences to the first."""
    lines: list[list[str]] = []
    control: list[float] = []
    for name, how in variants.items():
        losses = [final_loss(*data, how, seed, steps) for seed in range(SEEDS)]
        control = control or losses
        worse = [ours - theirs for ours, theirs in zip(losses, control, strict=True)]
        half = STUDENT * stdev(worse) / math.sqrt(SEEDS)
        numbers = [f"{mean(worse):+.4f}", f"{half:.4f}"] if lines else ["", ""]
        lines.append([name, f"{mean(losses):.3f}", *numbers])
        print(steps, *lines[-1], file=sys.stderr, flush=True)
    return table([f"{steps} steps", "loss", "above float32", "95 % interval, plus or minus"], lines)


def main() -> None:
    """Train, compare, report."""
    torch.set_num_threads(1)
    stories = [story.text for story in TinyWorld().stories(1200, 0)]
    tokenizer = train_bpe(stories, 512)
    shards = write_shards(stories, Path(tempfile.mkdtemp()) / "stories", tokenizer)
    data = pack_documents(shards, 128, "one_per_row"), tokenizer.vocab_size
    report(
        "recipe",
        environment("llmbook", "torch"),
        f"Batches of 8 stories, AdamW with a peak rate of {RATE:g}, {SEEDS} seeds; validation "
        "losses in nats per token.",
        "The recipe, two layers of width 32:",
        compared(data, RECIPE, 60),
        compared(data, RECIPE, 120),
        "The state of AdamW in 16 bits, one layer of width 16, beta2 = 0.999:",
        compared(data, STATES, 60),
        compared(data, STATES, 600),
    )


if __name__ == "__main__":
    main()
