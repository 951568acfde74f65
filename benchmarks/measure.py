"""What every benchmark here shares: fair timing, side by side, and a table of the results.

``python benchmarks/measure.py`` runs all of them, or those that it is given by name.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


class Timing(NamedTuple):
    """Best wall-clock seconds of several runs, and what the last of them returned."""

    seconds: float
    result: Any


def compare(contestants: Mapping[str, Callable[[], Any]], repeats: int = 3) -> dict[str, Timing]:
    """Time each function ``repeats`` times, in turns, and keep its best time.

    In turns, so that a machine that slows down for a while slows down all of them; the best,
    because whatever else runs on the machine only ever adds to the time.
    """
    best: dict[str, Timing] = {}
    for _ in range(repeats):
        for name, function in contestants.items():
            start = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - start
            if name not in best or seconds < best[name].seconds:
                best[name] = Timing(seconds, result)
    return best


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table, first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join([first, *others]) + " |"

    first, *others = widths
    rule = "| " + " | ".join(["-" * first, *("-" * (width - 1) + ":" for width in others)]) + " |"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def environment(*packages: str) -> str:
    """Say on what was measured: cores, system, Python, and the versions of ``packages``."""
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = os.cpu_count()
    return f"{cores} cores, {platform.system()}, Python {platform.python_version()}, {names}"


def report(name: str, *parts: str) -> None:
    """Print the parts, and keep them in ``results/<name>.md`` under the command that made them."""
    command = f"Made by `python benchmarks/{name}.py{''.join(f' {arg}' for arg in sys.argv[1:])}`."
    text = "\n\n".join([f"# {name}", command, *parts]) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def main(names: list[str]) -> int:
    """Run the benchmarks called ``names``, by default all; return how many failed."""
    scripts = {path.stem: path for path in sorted(HERE.glob("*.py")) if path.stem != "measure"}
    if unknown := [name for name in names if name not in scripts]:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(scripts)}")
    runs = [subprocess.run([sys.executable, scripts[name]]) for name in names or scripts]
    return sum(run.returncode != 0 for run in runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
