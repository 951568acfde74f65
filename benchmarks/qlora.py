"""The table of chapter 20's runs over quantized bases: three kinds of numbers, five seeds.

``python benchmarks/qlora.py`` writes ``qlora.csv`` anew after each run, whole; a kill costs the run
under way, and the same command goes on with the first one that is missing. About five minutes of
one core.
"""

from __future__ import annotations

import csv
from copy import deepcopy
from typing import Any

import torch
from measure import RESULTS

from llmbook.environment import whole_file
from llmbook.lora import (
    LoRAConfig,
    apply_lora,
    merge_lora,
    merge_quantized,
    quantize_base,
    replies_right,
    tune_on_facts,
)
from llmbook.tinyworld import TinyWorld
from llmbook.training import documents_score, pretrained

TABLE = RESULTS / "qlora.csv"
FIELDS = "base,seed,right,story_bits,merged_right,merge_error,logit_change".split(",")


def run(kind: str, seed: int) -> list[Any]:
    """Tune adapters of rank 8 over a base of some kind, and merge them back into it."""
    base = pretrained("tinyworld")
    model: Any = deepcopy(base.model) if kind == "float32" else quantize_base(base.model, kind)
    stories = [story.text for story in TinyWorld().stories(200, seed=7)]
    bits = [documents_score(m, base.tokenizer, stories)[0] for m in (model, base.model)]
    apply_lora(model, LoRAConfig(rank=8), seed=seed)
    tune_on_facts(model, 100, 0.01, seed=seed)
    model.eval()
    right = replies_right(model)
    ids = torch.tensor([base.tokenizer.encode(text)[:32] for text in stories])
    with torch.no_grad():
        before = model(ids)
        if kind == "float32":
            merge_lora(model)
            error = 0.0
        else:
            errors = merge_quantized(model, requantize=True)
            error = sum(errors.values()) / len(errors)
        change = float((model(ids) - before).abs().mean())
    return [kind, seed, right, bits[0] / bits[1], replies_right(model), error, change]


def main() -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    if TABLE.exists():
        with TABLE.open(encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
    known = {(row[0], int(row[1])) for row in rows}
    for seed in range(5):
        for kind in ("float32", "int8", "nf4"):
            if (kind, seed) in known:
                continue
            made = run(kind, seed)
            rows.append([f"{value:.4f}" if isinstance(value, float) else value for value in made])
            with whole_file(TABLE) as draft, draft.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
