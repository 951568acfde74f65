"""Run all that CI runs, in stages; stop at the first that fails.

Each stage is one command of an off-the-shelf tool and can be run by itself:
``python tools/test.py notebooks``.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
from book import ROOT, plain
from headers import stated_and_measured

PYTEST = ("-m", "pytest", "-q", "--color=no")
SITE = "_build/strict/_build/html"
# Two workers at once, each with one thread: more threads than cores only wait for each other.
TWO = ("-n", "2", "--dist", "loadfile")
ONE_THREAD = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")


@dataclass(frozen=True)
class Stage:
    """One command, by its arguments to Python."""

    name: str
    about: str
    arguments: tuple[str, ...]
    pin: bool = False  # to one thread for each of two workers
    remedy: str = ""  # what to do when it fails and the change was meant
    news: Callable[[], str] | None = None  # what to print when it passed


LINT = [
    Stage("lint", "ruff's rules", ("-m", "ruff", "check", "--quiet")),
    Stage("format", "ruff's layout", ("-m", "ruff", "format", "--check"), remedy="make format"),
    Stage(
        "names",
        "modules use only names that are exported, too",
        ("-m", "ruff", "check", "--quiet", "--isolated", "--select=F821,F822", "llmbook"),
    ),
    Stage("types", "mypy over the package", ("-m", "mypy")),
    Stage(
        "book",
        "the chapters as data: pairs, exports, outputs",
        (
            *PYTEST,
            "tests/book",
            *"tools/workbook.py tools/headers.py tools/tables.py tools/install.py".split(),
            *"tools/engine.py tools/needs.py _ext/cell_links.py".split(),
            "--doctest-modules",
        ),
    ),
]
SITE_STAGES = [
    Stage("site", "the site, warnings as errors", ("tools/build_book.py", "--strict")),
    Stage("links", "its links, images and requests", ("tools/check_site.py", SITE)),
]
UNIT = Stage(
    "unit",
    "unit tests and doctests, every shape checked",
    (*PYTEST, *TWO, *"tests llmbook --ignore=tests/book --doctest-modules -p no:nbval".split()),
    pin=True,
)
NOTEBOOKS = Stage(
    "notebooks",
    "every chapter run anew, outputs compared, exercises and their blanks proved",
    (*PYTEST, *TWO, *"chapters -p nbval_exercises --nbval-current-env -W default".split()),
    pin=True,
    remedy='if the new output is the right one: make sync ARGS="--force NN_name"',
    news=lambda: stated_and_measured(ROOT),
)
# Chapters load these; trained here, they cost a notebook no time, and two are trained at once.
MODELS = [
    Stage(
        name,
        f"the model {name!r}, which chapters share, is trained once",
        ("-c", f"from llmbook.training import pretrained; pretrained({name!r})"),
        pin=True,
    )
    for name in ("tinyworld", "documentation")
]
# Groups follow each other. The lanes of a group run side by side: those of the first use one core
# each, the stages of the others two.
GROUPS = [[LINT, SITE_STAGES], [[UNIT]], [[stage] for stage in MODELS], [[NOTEBOOKS]]]
STAGES = [stage for lanes in GROUPS for lane in lanes for stage in lane]


@dataclass
class Runner:
    """Runs stages and keeps their times; the first failure ends whatever else is running."""

    times: list[tuple[str, str, float]] = field(default_factory=list)
    failed: threading.Event = field(default_factory=threading.Event)
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run_group(self, lanes: list[list[Stage]]) -> None:
        """Run lanes side by side, and wait for all of them."""
        names = " beside ".join(", ".join(stage.name for stage in lane) for lane in lanes)
        print(f"running {names} ...", flush=True)
        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                for job in [pool.submit(self.run_lane, lane) for lane in lanes]:
                    job.result()
            except KeyboardInterrupt:
                self.stop()
                raise

    def run_lane(self, stages: Iterable[Stage]) -> None:
        """Run stages one after the other until one fails, here or in another lane."""
        for stage in stages:
            start = time.perf_counter()
            process = self._start(stage)
            if process is None:
                return
            output, _ = process.communicate()
            with self._lock:
                self._running.discard(process)
                seconds = time.perf_counter() - start
                self._report(stage, process.returncode, output.rstrip(), seconds)

    def _start(self, stage: Stage) -> subprocess.Popen[str] | None:
        with self._lock:
            if self.failed.is_set():
                return None
            process = subprocess.Popen(
                [sys.executable, *stage.arguments],
                cwd=ROOT,
                env=_environment(stage),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            self._running.add(process)
        return process

    def _report(self, stage: Stage, code: int, output: str, seconds: float) -> None:
        if code and self.failed.is_set():
            self.times.append((stage.name, "stopped", seconds))
            return
        if code:
            self.failed.set()
            print(f"\n{plain(output)}\n\n{stage.remedy}", flush=True)
        verdict = "FAILED" if code else "ok"
        last = output.splitlines()[-1] if output else ""
        print(f"{verdict:7} {stage.name:10} {seconds:6.1f} s  {last}", flush=True)
        if stage.news and not code:
            print(f"\n{stage.news()}\n", flush=True)
        self.times.append((stage.name, verdict, seconds))
        if code:
            self._end_running()

    def stop(self) -> None:
        """End everything that is running."""
        self.failed.set()
        with self._lock:
            self._end_running()

    def _end_running(self) -> None:
        # A stage starts workers, kernels or a site build, which would outlive it.
        for process in self._running:
            with suppress(psutil.NoSuchProcess):  # it ended by itself just now
                for each in list(_frozen(psutil.Process(process.pid))):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()


def _frozen(process: psutil.Process) -> Iterator[psutil.Process]:
    """Suspend a process, then its children, and so on: none can start another meanwhile."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        yield process
        for child in process.children():
            yield from _frozen(child)


def _environment(stage: Stage) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    always = {"PYTHONPATH": path, "PYTHONUTF8": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    return os.environ | always | (ONE_THREAD if stage.pin else {})


def run(names: Iterable[str]) -> bool:
    """Run the named stages, or all, in groups; say whether all passed."""
    runner, wanted = Runner(), set(names) or {stage.name for stage in STAGES}
    for group in GROUPS:
        lanes = [[stage for stage in lane if stage.name in wanted] for lane in group]
        if any(lanes) and not runner.failed.is_set():
            runner.run_group([lane for lane in lanes if lane])
    _print_summary(runner.times)
    return not runner.failed.is_set()


def _print_summary(times: list[tuple[str, str, float]]) -> None:
    print()
    for name, verdict, seconds in times:
        print(f"{name:12} {verdict:8} {seconds:7.1f} s")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Run all that CI runs, or the named stages.")
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", help=f"of: {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="say what each stage does")
    args = parser.parse_args()
    if args.list:
        for stage in STAGES:
            print(f"{stage.name:12} {stage.about}\n{'':12} python {' '.join(stage.arguments)}")
        return 0
    if unknown := set(args.stages) - set(names):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    # A log on Windows may know few characters; what a tool printed may hold any.
    sys.stdout.reconfigure(errors="replace")
    start = time.perf_counter()
    try:
        passed = run(args.stages)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"{'all passed' if passed else 'FAILED'} in {time.perf_counter() - start:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
