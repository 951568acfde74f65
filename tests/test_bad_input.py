"""What is refused is refused in words that help: for everything public, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import MODULES, Target, complaints, parameters, targets

import llmbook

TESTS = Path(__file__).parent


def test_bad_input_is_refused_by_the_name_of_the_argument():
    package = str(Path(llmbook.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, TESTS / "bad_input.py", "--json"],
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    complaints = json.loads(done.stdout)
    assert not complaints, "\n".join(complaints)


def silent(size: int = 3) -> None:
    """Take anything."""


def raw(size: int = 3) -> int:
    return size - 1


def wrong(size: int = 3) -> None:
    if type(size) is not int:
        raise KeyError("size")


def named(size: int = 3) -> None:
    if type(size) is not int:
        raise ValueError(f"size: expected a whole number, got {size!r}")


@pytest.mark.parametrize(
    "function, words",
    [
        (silent, "silent(size = a text): accepted against its annotation"),
        (raw, "raw(size = none): TypeError: unsupported operand"),
        (wrong, "wrong(size = a fraction): KeyError"),
    ],
)
def test_what_does_not_help_is_listed(function, words):
    found = list(
        complaints(Target(function.__name__, function, parameters(function), {"size": int}))
    )
    assert any(complaint.startswith(words) for complaint in found), found


def test_what_helps_is_not_listed():
    assert not list(complaints(Target("named", named, parameters(named), {"size": int})))
    broken = Target("broken", lambda size: 1 / 0, parameters(raw), {"size": int})
    assert "the example does not work" in next(complaints(broken))


def test_every_module_has_something_that_is_tried():
    tried = {module: len(list(targets(module))) for module in MODULES}
    assert min(tried.values()) >= 3 and sum(tried.values()) > 250, tried
