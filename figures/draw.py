"""Draw the diagrams anew: ``python figures/draw.py [--check]``, or ``make figures``.

With ``--check`` nothing is written: the pictures are drawn elsewhere and compared with the
committed ones, and those that differ are listed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import style

HERE = Path(__file__).parent
NOT_DRAWINGS = {"draw", "style"}


def draw_all(into: Path) -> list[str]:
    """Run every ``draw_*`` function of this folder; return the pictures then in ``into``."""
    style.folder = into
    for path in sorted(HERE.glob("*.py")):
        if path.stem in NOT_DRAWINGS:
            continue
        module = importlib.import_module(path.stem)
        for name in sorted(vars(module)):
            if name.startswith("draw_"):
                getattr(module, name)()
    return sorted(path.name for path in into.glob("*.svg"))


def differences(fresh: Path, committed: Path) -> list[str]:
    """Say which pictures are missing, changed, or drawn by nothing."""
    theirs = {path.name: path.read_bytes() for path in committed.glob("*.svg")}
    ours = {path.name: path.read_bytes() for path in fresh.glob("*.svg")}
    found = [f"{name}: never drawn, run `make figures`" for name in ours.keys() - theirs.keys()]
    found += [f"{name}: no function draws it" for name in theirs.keys() - ours.keys()]
    found += [
        f"{name}: drawing it anew gives another picture, run `make figures`"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    return sorted(found)


def main() -> int:
    """Draw or check; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args().check:
        print(f"drawn in figures: {', '.join(draw_all(HERE))}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        draw_all(Path(temporary))
        found = differences(Path(temporary), HERE)
    print("\n".join(found) or "figures: as drawn")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
