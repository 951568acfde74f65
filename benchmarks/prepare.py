"""Text of three packages prepared in one process and on Ray: seconds of each step, equal files.

``python benchmarks/prepare.py --kill`` adds a run in which workers are killed. Needs the extra
"cluster".
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from measure import environment, report, table

from llmbook.distributed import Prepared, RayEngine, map_reduce, prepare

SOURCES = [f"package:{name}" for name in ("stdlib", "numpy", "matplotlib")]


def killing(item: Any, emit: Callable[[Any], Iterable[Any]], flag: str) -> Iterator[Any]:
    """Emit a value, and then die, the first time that any worker comes here."""
    for value in emit(item):
        yield value
        if not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Killing:
    """An engine whose first and third steps lose a worker: reading, and cleaning."""

    def __init__(self, engine: Any, folder: Path) -> None:
        """Keep the notes of who was killed in ``folder``."""
        self.engine, self.folder, self.calls = engine, folder, 0

    def __call__(self, items: Any, emit: Any, reduce: Any) -> list[Any]:
        """Run a step with a killer inside."""
        self.calls += 1
        if self.calls not in (1, 3):
            return self.engine(items, emit, reduce)
        flag = str(self.folder / f"killed-{self.calls}")
        return self.engine(items, partial(killing, emit=emit, flag=flag), reduce)


def timed(folder: Path, engine: Any) -> tuple[Prepared, dict[str, float]]:
    """Prepare, and return the seconds of each step and of all."""
    seconds, start = {}, time.perf_counter()

    def say(line: str) -> None:
        name, _, rest = line.partition(":")
        seconds[name] = float(rest.split()[-2])

    result = prepare(SOURCES, folder, engine=engine, say=say)
    return result, seconds | {"all": time.perf_counter() - start}


def files(folder: Path) -> dict[str, bytes]:
    """The files that are the result."""
    names = ["tokenizer.json", "*/shard-*.bin", "unique/*"]
    paths = [path for name in names for path in folder.glob(name)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def main() -> None:
    """Prepare, compare, report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {"one process": timed(folder / "one", map_reduce)}
        start = time.perf_counter()
        with RayEngine(2) as engine:
            started = time.perf_counter() - start
            runs["Ray, 2 workers"] = timed(folder / "ray", engine)
            if "--kill" in sys.argv:
                runs["Ray, 2 killed"] = timed(folder / "killed", Killing(engine, folder))
        killed = len(list(folder.glob("killed-*")))
        one, *others = (files(result.folder) for result, _ in runs.values())
    equal = [sum(one[name] == other.get(name) for name in one) for other in others]
    alone = runs["one process"][0]
    rows = [
        [step, f"{alone.counts.get(step, 0):,}" if step in alone.counts else ""]
        + [f"{seconds[step]:.0f}" for _, seconds in runs.values()]
        for step in runs["one process"][1]
    ]
    report(
        "prepare",
        environment("llmbook", "numpy", "ray"),
        f"The documentation of {', '.join(s.partition(':')[2] for s in SOURCES)}, of "
        f"{alone.characters['read']:,} characters, was prepared in one process and on Ray with two "
        f"workers ({killed} workers were killed by SIGKILL). Ray had started in {started:.0f} "
        f"seconds, which are not counted. Of {len(one)} files of "
        f"documents, tokenizer and tokens, {min(equal)} are equal to the byte to "
        "those of one process. Columns are seconds.",
        table(["step", "documents", *runs], rows),
    )


if __name__ == "__main__":
    main()
