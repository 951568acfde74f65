"""The table of chapter 17's runs: sizes, data, learning rates and seeds, one row for each run.

Each cell is run at a learning rate, its half and its double, until both neighbors are worse. The
table is written anew after each run, whole; a kill costs the run under way, and the same command
goes on with the first one that is missing. About 20 minutes of one core at rest.
"""

from __future__ import annotations

import csv
import math

import torch
from measure import RESULTS

from llmbook.environment import whole_file
from llmbook.model import count_parameters
from llmbook.scaling import Run, read_runs, run_config, train_run

TABLE = RESULTS / "scaling.csv"
WIDTHS = (8, 12, 16, 24, 32)
STEPS = (100, 200, 400, 800)
LARGEST = (48, 1600)  # is predicted by a fit to the others


def equal_compute(steps: int, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return a cell for each width that costs what the smallest costs in ``steps`` steps."""
    size = {width: count_parameters(run_config(width)) for width in (8, *widths)}
    return [(width, round(steps * size[8] / size[width])) for width in widths]


def cells() -> list[tuple[int, int]]:
    """Return all cells of the table, as width and number of steps."""
    grid = [(width, steps) for steps in STEPS for width in WIDTHS]
    grid += [*equal_compute(1600, (8, 16, 48, 24, 32, 12)), LARGEST]
    grid += equal_compute(800, (48, 32, 24, 16, 12)) + equal_compute(400, (12, 24, 32, 16))
    return grid


class Table:
    """The runs there are, and those that are made when somebody asks for their loss."""

    def __init__(self) -> None:
        """Read the rows of the last time."""
        rows = read_runs(TABLE) if TABLE.exists() else []
        self.runs = {run[:4]: run for run in rows}

    def loss(self, width: int, steps: int, power: int, seed: int = 0) -> float:
        """Return the loss at a learning rate of 0.01 times 2 to the ``power``."""
        key = (width, steps, 0.01 * 2.0**power, seed)
        if key not in self.runs:
            self.runs[key] = run = train_run(*key)
            with whole_file(TABLE) as draft, draft.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([Run._fields, *sorted(self.runs.values())])
            print(run, flush=True)
        return self.runs[key].loss

    def best_power(self, width: int, steps: int, power: int) -> int:
        """Return the power whose two neighbors are worse, searched for from ``power`` on."""
        while True:
            losses = {near: self.loss(width, steps, near) for near in (power, power - 1, power + 1)}
            if (best := min(losses, key=lambda near: losses[near])) == power:
                return power
            power = best


def main() -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    table, best = Table(), dict[tuple[int, int], int]()
    for width, steps in cells():
        known = sorted(
            best, key=lambda c: abs(math.log(c[0] / width)) + abs(math.log(c[1] / steps))
        )
        best[width, steps] = table.best_power(width, steps, best[known[0]] if known else 1)
    for seed in (1, 2):
        for (width, steps), power in best.items():
            if width in WIDTHS and steps in STEPS and steps <= 400:
                table.loss(width, steps, power, seed)


if __name__ == "__main__":
    main()
