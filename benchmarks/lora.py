"""The tables of chapter 20's runs: ranks, rates and seeds, one row for each run.

``lora.csv`` has tuning on questions, ``lora_storage.csv`` tuning on new facts. Each table is
written anew after each run, whole; a kill costs the run under way, and the same command goes on
with the first one that is missing. ``python benchmarks/lora.py [tuning] [storage]``, about
20 minutes of one core at rest for both.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS

from llmbook.environment import whole_file
from llmbook.lora import StorageRun, TuningRun, storage_run, tuning_run

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
RANKS = (0, 1, 2, 4, 8, 16)
# As many parameters as all linear layers of rank 8 have, or nearly
PARTS = (("attention", 17), ("feed-forward", 15))
PART_RATES = (0.003, 0.01, 0.03, 0.06, 0.1)
SEEDS = (0, 1, 2)


def tuning_cells() -> list[tuple[str, int, float, int]]:
    """Return targets, rank, rate and seed of each run, those of the first seed first."""
    cells = []
    for seed in SEEDS:
        rates = RATES if seed < 2 else RATES[2:5]  # the outer rates with two seeds
        cells += [("all-linear", rank, rate, seed) for rate in rates for rank in RANKS]
        cells += [(*part, rate, seed) for rate in PART_RATES for part in PARTS]
    return cells


def storage_cells() -> list[tuple[int, int, float, int]]:
    """Return steps, rank, rate and seed of each run."""
    return [(400, rank, 0.01 if rank else 0.003, seed) for seed in SEEDS for rank in RANKS]


def fill(path: Path, kind: Any, cells: list[Any], run: Callable[[Any], Any]) -> None:
    """Make the runs that a table lacks, and write it after each."""
    rows: list[Any] = []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
    known = {tuple(row[:4]) for row in rows}
    for cell in cells:
        if tuple(map(str, cell)) in known:
            continue
        made = run(cell)
        rounded = (f"{value:.5g}" if isinstance(value, float) else str(value) for value in made[4:])
        rows.append([*map(str, made[:4]), *rounded])
        with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([kind._fields, *rows])
        print(made, flush=True)


def main() -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["tuning", "storage"]
    if "tuning" in wanted:
        fill(
            RESULTS / "lora.csv",
            TuningRun,
            tuning_cells(),
            lambda cell: tuning_run(*cell[1:], targets=cell[0]),
        )
    if "storage" in wanted:
        fill(
            RESULTS / "lora_storage.csv",
            StorageRun,
            storage_cells(),
            lambda cell: storage_run(*cell[1:], n_steps=cell[0]),
        )


if __name__ == "__main__":
    main()
