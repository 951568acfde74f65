"""``make test-lowest``: the oldest versions that pyproject.toml allows, and none beside them."""

from importlib import metadata

import lowest
from book import ROOT
from packaging.requirements import Requirement


def test_what_the_package_asks_for_and_is_compared_with_is_taken_from_pyproject() -> None:
    names = {requirement.name for requirement in lowest.declared(ROOT)}
    assert {"torch", "numpy", "pyarrow", "datasets", *lowest.COMPARED} <= names
    assert not names & {"jupyterlab", "mypy", "llmbook"}


def test_each_has_one_lower_bound() -> None:
    operators = [[s.operator for s in r.specifier] for r in lowest.declared(ROOT)]
    assert all(each.count(">=") == 1 for each in operators)


def test_what_runs_the_tests_is_pinned() -> None:
    assert len(lowest.pins(ROOT, lowest.TOOLS)) == len(lowest.TOOLS)


def test_a_bound_that_is_not_what_is_installed_is_named() -> None:
    here = metadata.version("numpy")
    asked = [Requirement(f"numpy>={here}"), Requirement("numpy>=0.9"), Requirement("numpy")]
    assert list(lowest.untested(asked)) == [
        f"pyproject.toml allows numpy>=0.9, but the lowest that goes here is {here}",
        f"pyproject.toml allows numpy, but the lowest that goes here is {here}",
    ]


def test_what_is_left_out_is_there() -> None:
    for test in lowest.LACKING:
        path, _, name = test.partition("::")
        assert f"\ndef {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), test
