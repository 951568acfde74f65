"""Test the package with the oldest libraries that it allows: ``make test-lowest``.

A lower bound in pyproject.toml is a promise to those who cannot take the newest of everything. uv
installs exactly the versions at the bounds into the environment that this runs in, with the
libraries that unit tests hold ours against; then the unit tests run. It begins in an environment
that has only uv and packaging.
"""

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("scale", "hub", "train", "eval")
# What our code is compared with; the rest of the extra "book" builds the site.
COMPARED = {"datasketch", "ftfy", "matplotlib", "scikit-learn", "tiktoken", "tokenizers"}
COMPARED |= {"transformers"}
# What runs the tests, and what they read, may be new.
TOOLS = ("beartype", "hypothesis", "ipython", "psutil", "pytest", "pytest-xdist", "sphinx")
# Tests of what a library lacks at its bound, by the beginning of their names, and why. (A test can
# also skip itself; then the reason is there.)
LACKING = {
    "tests/test_attention.py::test_attention_mask_is_transformers_sliding_window": (
        "transformers 5.0 names the arguments of its masks otherwise"
    ),
    "tests/test_model.py::test_a_model_can_be_copied_moved_and_compiled_into_a_graph": (
        "torch 2.6 does not see through the hook that checks shapes"
    ),
    "tests/test_optimization.py::test_states_of_other_algorithms_are_refused[AdamW-Adam": (
        "the states of Adam do not say before torch 2.7 that they are not AdamW's"
    ),
    "tests/test_training.py::test_what_is_no_probe": (
        "jaxtyping 0.2.38 refuses it before we can, in words of its own"
    ),
}
ONE_THREAD = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")


def declared(root: Path) -> list[Requirement]:
    """Return what the package itself asks for, with its extras, and what it is compared with."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]
    compared = [line for line in optional["book"] if Requirement(line).name in COMPARED]
    return [Requirement(line) for line in [*asked, *compared]]


def pins(root: Path, names: tuple[str, ...]) -> list[str]:
    """Return the lines of constraints.txt for some packages."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0].lower() in names]


def install(root: Path) -> int:
    """Install the package, its libraries at their lower bounds, and what runs the tests."""
    wanted = [str(requirement) for requirement in declared(root)]
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    options = ["--upgrade", "--resolution", "lowest-direct", "--editable", "."]
    return subprocess.run([*command, *options, *wanted, *pins(root, TOOLS)], cwd=root).returncode


def untested(requirements: list[Requirement]) -> Iterator[str]:
    """Say which bounds are not what is installed: then nobody knows whether they hold."""
    for requirement in requirements:
        bounds = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        here = metadata.version(requirement.name)
        if bounds != [Version(here)]:
            yield f"pyproject.toml allows {requirement}, but the lowest that goes here is {here}"


def test(arguments: list[str]) -> int:
    """Run the unit tests and doctests, or those that are named."""
    chosen = arguments or ["tests", "llmbook", "--ignore=tests/book", "--doctest-modules"]
    chosen += [f"--deselect={test}" for test in LACKING]
    # That an old library uses what a new one has deprecated is no fault of ours.
    chosen += ["-W", "default", "--disable-warnings", "-n", "2", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", *chosen]
    environment = os.environ | ONE_THREAD | {"PYTHONUTF8": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(arguments: list[str]) -> int:
    """Install what is not there, say what is, and test; return the exit status."""
    start = time.perf_counter()
    if code := install(ROOT):
        return code
    requirements = declared(ROOT)
    here = ", ".join(f"{r.name} {metadata.version(r.name)}" for r in requirements)
    print(f"installed in {time.perf_counter() - start:.0f} s: {here}", flush=True)
    print(*(f"left out: {test}: {why}" for test, why in LACKING.items()), sep="\n", flush=True)
    start = time.perf_counter()
    code = test(arguments)
    faults = list(untested(requirements))
    verdict = "FAILED" if code or faults else "passed"
    print(*faults, f"{verdict} in {time.perf_counter() - start:.0f} s", sep="\n")
    return 1 if code or faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
