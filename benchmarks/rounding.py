"""Training with emulated 8-bit and 4-bit products: the loss of each recipe of chapter 15.

Each recipe starts from the same weights as ``float32`` and sees the same batches of stories, with
several seeds. What is reported is the difference of the mean loss over the last steps, with
Student's interval at 95 %. It is a measurement of accuracy; emulation says nothing about speed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from measure import environment, report, table

from llmbook.batches import BatchSampler, pack_documents, write_shards
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig, TransformerLM, count_parameters
from llmbook.optimization import AdamW, linear_schedule
from llmbook.precision import RECIPES, emulate
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe
from llmbook.training import compact, next_token_objective

SEEDS, STEPS, LAST, RATE = 3, 200, 20, 3e-3
SIZES = {"context_length": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128}
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776}[SEEDS - 1]  # the 97.5 % point, by degrees of freedom


def final_loss(seed: int, recipe: str | None, sampler: BatchSampler, vocab_size: int) -> float:
    """Train once; return the mean loss of the last steps, in nats per token."""
    seed_everything(seed)
    model = TransformerLM(ModelConfig(vocab_size=vocab_size, **SIZES))
    if recipe is not None:
        model = emulate(model, recipe)
    optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = linear_schedule(STEPS, warmup=10)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule(step)
        total, count = next_token_objective(model, compact(sampler[step]))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    print(f"{recipe} {seed} {mean(losses[-LAST:]):.4f}", file=sys.stderr, flush=True)
    return mean(losses[-LAST:])


def main() -> None:
    """Train, compare, report."""
    torch.set_num_threads(1)
    stories = [story.text for story in TinyWorld().stories(2000, seed=0)]
    tokenizer = train_bpe(stories, 1024)
    shards = write_shards(stories, Path(tempfile.mkdtemp()) / "stories", tokenizer)
    sampler = BatchSampler(pack_documents(shards, 128, "one_per_row"), batch_size=8)
    size = tokenizer.vocab_size
    control = [final_loss(seed, None, sampler, size) for seed in range(SEEDS)]
    lines = [["float32", f"{mean(control):.3f}", "", ""]]
    for recipe in RECIPES:
        losses = [final_loss(seed, recipe, sampler, size) for seed in range(SEEDS)]
        worse = [ours - theirs for ours, theirs in zip(losses, control, strict=True)]
        half = STUDENT * stdev(worse) / SEEDS**0.5
        lines.append([recipe, f"{mean(losses):.3f}", f"{mean(worse):+.4f}", f"{half:.4f}"])
    model = TransformerLM(ModelConfig(vocab_size=size, **SIZES))
    report(
        "rounding",
        environment("llmbook", "torch"),
        f"{count_parameters(model) / 1e6:.2f} million parameters, {STEPS} steps of 8 stories, "
        f"AdamW with a peak rate of {RATE:g}, {SEEDS} seeds; losses in nats per token, "
        f"over the last {LAST} steps.",
        table(["products in", "loss", "above float32", "95 % interval, plus or minus"], lines),
    )


if __name__ == "__main__":
    main()
