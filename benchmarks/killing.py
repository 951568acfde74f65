"""A run killed a hundred times against one left alone: how many bits differ at the end.

The same harness as in the tests, with more kills. ``python benchmarks/killing.py N`` makes N.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import environment, report, table

TESTS = Path(__file__).resolve().parents[1] / "tests"


def killed(harness: str, kills: str) -> tuple[dict[str, Any], float]:
    """Return what a harness of the tests reports after so many kills, and the seconds it took."""
    n_kills = sys.argv[1] if len(sys.argv) > 1 else kills
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own, which forks: it must not have computed anything with threads.
        command = [sys.executable, "-W", "ignore", str(TESTS / harness), n_kills, folder, "1"]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout), time.perf_counter() - start


def main() -> None:
    """Kill, compare, report."""
    found, seconds = killed("killing.py", "100")
    report(
        "killing",
        environment("llmbook", "torch"),
        f"Runs of the trainer were killed with SIGKILL {found['kills']} times in "
        f"{seconds:.0f} seconds: at random moments from outside, at random "
        "operations on files, and between two tensors of a save. Each was started again until it "
        "ended. Weights, optimizer, random generators, best checkpoint and log were then compared "
        "with those of a run that nobody touched.",
        table(["what", "count"], [[name, f"{value:,}"] for name, value in found.items()]),
    )


if __name__ == "__main__":
    main()
