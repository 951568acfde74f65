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

from measure import environment, report, table

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "killing.py"


def main() -> None:
    """Kill, compare, report."""
    n_kills = sys.argv[1] if len(sys.argv) > 1 else "100"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own, which forks: it must not have computed anything with threads.
        command = [sys.executable, str(HARNESS), n_kills, folder, "1"]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    report(
        "killing",
        environment("llmbook", "torch"),
        f"Runs of the trainer were killed with SIGKILL {found['kills']} times in "
        f"{time.perf_counter() - start:.0f} seconds: at random moments from outside, at random "
        "operations on files, and between two tensors of a save. Each was started again until it "
        "ended. Weights, optimizer, random generators, best checkpoint and log were then compared "
        "with those of a run that nobody touched.",
        table(["what", "count"], [[name, f"{value:,}"] for name, value in found.items()]),
    )


if __name__ == "__main__":
    main()
