"""Build the site: ``python tools/build_book.py [--strict]``, or ``make book``.

Chapters without stored outputs are executed first, which is what a fresh copy of a draft needs; the
others are shown as they are stored. With ``--strict``, which is for CI, the site is built from
nothing into a folder of its own, and every warning is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from book import ROOT, chapters

# The command `jupyter-book`, by the Python that runs this and not by whatever is on the path.
JUPYTER_BOOK = ["-c", "from jupyter_book.cli.main import main; main()"]
STRICT = ["-W", "--keep-going", "-n", "--all"]


def lacks_outputs(notebook: Path) -> bool:
    """Say whether a chapter was never executed: it has no notebook, or one without a run cell."""
    if not notebook.exists():
        return True
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return not any(cell.get("execution_count") for cell in cells)


def run(arguments: list[str], root: Path) -> None:
    """Run Python quietly; show what it prints only when it fails, and warnings."""
    # Python on Windows writes other encodings than UTF-8 into pipes unless it is told.
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit("building the site failed: the reasons are above")
    for line in lines:
        if "WARNING" in line:
            print(line, file=sys.stderr)


def build(root: Path = ROOT, *, strict: bool = False) -> Path:
    """Build the site of the book at ``root`` and return its folder."""
    fresh = [chapter.name for chapter in chapters(root) if lacks_outputs(chapter.notebook)]
    if fresh:
        print(f"executing {', '.join(fresh)} ...", flush=True)
        run(["tools/sync.py", *fresh], root)
    # Jupyter Book puts _build/html into the folder that it is given.
    folder = root / "_build" / "strict" if strict else root
    if strict:
        shutil.rmtree(folder, ignore_errors=True)
    where = str(folder.relative_to(root))
    options = ["-q", "--path-output", where, *(STRICT if strict else [])]
    run([*JUPYTER_BOOK, "build", ".", *options], root)
    return folder / "_build" / "html"


def main() -> None:
    """Build, and say where the site is and how long it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="clean build, warnings are errors")
    strict = parser.parse_args().strict
    start = time.perf_counter()
    print("building the site ...", flush=True)
    page = build(strict=strict) / "index.html"
    print(f"open {page.as_uri()}")
    print(f"built in {time.perf_counter() - start:.0f} s: {page.relative_to(ROOT).as_posix()}")


if __name__ == "__main__":
    main()
