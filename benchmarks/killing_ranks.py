"""Runs of two ranks killed twenty times against one left alone: how many bits differ at the end.

The same harness as in the tests, with more kills. ``python benchmarks/killing_ranks.py N`` makes N.
"""

from __future__ import annotations

from killing import killed
from measure import environment, report, table


def main() -> None:
    """Kill, compare, report."""
    found, seconds = killed("killing_ranks.py", "20")
    longest = found.pop("longest end in seconds")
    report(
        "killing_ranks",
        environment("llmbook", "torch"),
        f"Runs of the trainer on two ranks (ddp) had one rank killed with SIGKILL "
        f"{found['kills']} times in {seconds:.0f} seconds: at random times, at "
        "random operations on files, and between two tensors of a save. From start to the end of "
        f"all ranks an attempt took at most {longest:.0f} seconds: none hung. Each run was started "
        "again until it ended. Weights, optimizer, random generators of both ranks, best "
        "checkpoint and log were then compared with those of a run that nobody touched.",
        table(["what", "count"], [[name, f"{value:,}"] for name, value in found.items()]),
    )


if __name__ == "__main__":
    main()
