"""A pytest plugin: how near each comparison of numbers came to its bound.

Floating-point numbers differ a little from processor to processor. A comparison that uses up its
bound here may fail elsewhere, so each should have room: an error of at most a tenth of the bound.
The plugin wraps the functions with which tests compare, and at the end lists those that had less.
It changes nothing else.

Use: ``pytest -p margins tests/test_NAME.py`` with ``tools`` on the path, or ``python
tools/margins.py chapters/NN_name.py`` for the comparisons of a chapter's cells. ``make
test-elsewhere`` runs the tests on the arithmetic of other processors.
"""

import functools
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOM = 0.1
# For each place in the tests, the largest share of a bound that an error took.
worst: dict[str, tuple[float, str]] = {}
# The bounds that torch.testing takes when none is given.
BOUNDS = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
}


def share(actual: Any, expected: Any, rtol: float, atol: float) -> float:
    """Return the largest error as a share of its bound."""
    a, b = (np.asarray(_plain(x), dtype=np.float64) for x in (actual, expected))
    if a.size == 0 or b.size == 0:
        return 0.0
    with np.errstate(all="ignore"):
        error, bound = np.abs(a - b), atol + rtol * np.abs(b)
        ratio = np.where(error == 0, 0.0, error / bound)
    return float(np.nanmax(np.where(np.isfinite(ratio), ratio, 0.0), initial=0.0))


def _plain(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", torch.float64).numpy() if x.is_floating_point() else [0.0]
    return x


def note(actual: Any, expected: Any, rtol: float, atol: float, kind: str) -> None:
    """Keep the share of one comparison, if it's the largest so far at its place."""
    frame = sys._getframe(2)
    while "margins" in frame.f_code.co_filename or "site-packages" in frame.f_code.co_filename:
        frame = frame.f_back
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    used = share(actual, expected, rtol, atol)
    if used > worst.get(place, (0.0, ""))[0]:
        worst[place] = used, kind


def _of_torch(compare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compare)
    def call(actual: Any, expected: Any, **options: Any) -> Any:
        for a, b in _leaves(actual, expected):
            dtype = getattr(a, "dtype", None)
            rtol, atol = BOUNDS.get(dtype, BOUNDS[torch.float64])
            rtol, atol = options.get("rtol") or rtol, options.get("atol") or atol
            if options.get("rtol") == 0:
                rtol = 0.0
            if options.get("atol") == 0:
                atol = 0.0
            note(a, b, rtol, atol, str(dtype))
        return compare(actual, expected, **options)

    return call


def _leaves(actual: Any, expected: Any) -> list[tuple[Any, Any]]:
    if isinstance(actual, torch.Tensor | np.ndarray | float):
        return [(actual, expected)]
    if isinstance(actual, dict):
        return [pair for k in actual for pair in _leaves(actual[k], expected[k])]
    if isinstance(actual, list | tuple):
        return [pair for a, b in zip(actual, expected, strict=False) for pair in _leaves(a, b)]
    return []


def _close(compare: Callable[..., Any], rtol: float, atol: float) -> Callable[..., Any]:
    """Wrap a function that takes both bounds by position or by name."""

    @functools.wraps(compare)
    def call(a: Any, b: Any, *bounds: float, **options: Any) -> Any:
        given = dict(zip(("rtol", "atol"), bounds, strict=False)) | options
        result = compare(a, b, *bounds, **options)
        if result is None or result:  # a comparison that fails here may be meant to
            dtype = str(getattr(a, "dtype", type(a).__name__))
            note(a, b, given.get("rtol", rtol), given.get("atol", atol), dtype)
        return result

    return call


def install() -> None:
    """Put the wrapped functions in the place of those that compare."""
    torch.testing.assert_close = _of_torch(torch.testing.assert_close)
    torch.allclose = _close(torch.allclose, 1e-5, 1e-8)
    np.allclose = _close(np.allclose, 1e-5, 1e-8)
    np.testing.assert_allclose = _close(np.testing.assert_allclose, 1e-7, 0.0)
    math.isclose = _isclose(math.isclose)


def _isclose(compare: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(compare)
    def call(a: float, b: float, *, rel_tol: float = 1e-9, abs_tol: float = 0.0) -> bool:
        result = compare(a, b, rel_tol=rel_tol, abs_tol=abs_tol)
        if result:
            note(a, b, rel_tol, abs_tol, "float")
        return result

    return call


def report() -> list[str]:
    """Return a line for each place with too little room, the nearest to its bound first."""
    tight = sorted(((used, place, kind) for place, (used, kind) in worst.items()), reverse=True)
    return [
        f"{used:8.2f} of the bound  {kind:15} {place}" for used, place, kind in tight if used > ROOM
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Wrap before the tests are imported, which may take a function by its name."""
    install()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the comparisons that are near their bounds."""
    lines = report()
    terminalreporter.write_line(
        f"{len(lines)} of {len(worst)} comparisons with less room than wanted"
    )
    for line in lines:
        terminalreporter.write_line(line)


if __name__ == "__main__":
    install()
    for chapter in sys.argv[1:]:
        runpy.run_path(chapter, run_name="__main__")
    print("\n".join(report()) or "all comparisons have room")
