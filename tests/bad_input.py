"""Feed every public function and class what it does not want, and list messages that do not help.

``tests/test_bad_input.py`` runs this file in a process of its own: the other tests check types and
shapes by a hook, whose errors would come before ours, and what is judged here is what a user sees.
``python tests/bad_input.py MODULE ...`` prints the list for some modules.

A call that works is made first. Then one parameter after the other gets what its annotation does
not allow, which must be refused, and what it allows but may be out of range.
A refusal is a ``ValueError`` or ``TypeError`` that names the parameter and shows what it got.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import io
import json
import re
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from bad_input_examples import (
    DIMENSIONS,
    EXAMPLES,
    MODULES,
    NOT_TRIED,
    OBJECTS,
    PARAMETERS,
    TAKES_ANYTHING,
)
from beartype.door import is_bearable

SOMETHING = type("Something", (), {"__repr__": lambda self: "<something>"})()
# One of each kind of thing that callers pass by mistake.
MISTAKES: dict[str, Callable[[], Any]] = {
    "an object": lambda: SOMETHING,
    "none": lambda: None,
    "a text": lambda: "nonsense",
    "an empty text": lambda: "",
    "bytes": lambda: b"bytes",
    "a number": lambda: 7,
    "a negative number": lambda: -3,
    "zero": lambda: 0,
    "a fraction": lambda: 2.5,
    "not a number": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "an empty list": lambda: [],
    "a list of objects": lambda: [SOMETHING],
    "a tensor with too many dimensions": lambda: torch.zeros(2, 1, 2, 1, 2, 1),
    "a tensor of whole numbers": lambda: torch.zeros(2, 3, dtype=torch.int32),
    "an array of numbers": lambda: np.zeros((2, 3)),
}


@dataclass(frozen=True)
class Target:
    """A function, or a class to be called, with the annotations of its parameters."""

    name: str
    call: Callable[..., Any]
    parameters: dict[str, inspect.Parameter]
    hints: dict[str, Any]


def targets(module: str) -> Iterator[Target]:
    """Yield what a module offers, without exceptions, records, and what is left out by name."""
    loaded = importlib.import_module(f"llmbook.{module}")
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if f"{module}.{name}" in NOT_TRIED or not (
            inspect.isclass(value) or inspect.isfunction(value)
        ):
            continue
        if inspect.isclass(value) and issubclass(value, BaseException | tuple):
            continue
        function = value.__init__ if inspect.isclass(value) else value
        hints = annotations(function)
        yield Target(f"{module}.{name}", value, parameters(value), hints)
    for name, make in OBJECTS.items():
        if name.startswith(f"{module}."):
            yield from methods(name, getattr(loaded, name.split(".")[1]), make)


def methods(name: str, kind: type, make: Callable[[], Any]) -> Iterator[Target]:
    """Yield the public methods of a class, each to be called on a new object."""
    for method, function in vars(kind).items():
        if method.startswith("_") or not isinstance(function, FunctionType | classmethod):
            continue
        if f"{name}.{method}" in NOT_TRIED:
            continue
        function = getattr(function, "__func__", function)
        own = {n: p for n, p in parameters(function).items() if n not in {"self", "cls"}}
        call = functools.partial(_call_method, make, method)
        yield Target(f"{name}.{method}", call, own, annotations(function))


def parameters(value: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be given one by one."""
    kinds = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    every = inspect.signature(value).parameters
    return {name: p for name, p in every.items() if p.kind not in kinds}


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations as types."""
    plain = inspect.unwrap(function)
    names = getattr(plain, "__globals__", {}) | {"torch": torch}  # some modules load it late
    return typing.get_type_hints(plain, names)


def _call_method(make: Callable[[], Any], method: str, **arguments: Any) -> Any:
    return getattr(make(), method)(**arguments)


def example(target: Target) -> dict[str, Any]:
    """Return arguments with which the call works."""
    given = EXAMPLES.get(target.name, {})
    given = dict(given() if callable(given) else given)
    for name, parameter in target.parameters.items():
        if name in given or parameter.default is not inspect.Parameter.empty:
            continue
        given[name] = fitting(name, target.hints.get(name))
    return given


def fitting(name: str, hint: Any) -> Any:
    """Return a value for a parameter by its name, or a tensor by the shape in its annotation."""
    if name in PARAMETERS:
        value = PARAMETERS[name]
        return value() if callable(value) else copy.deepcopy(value)
    for option in typing.get_args(hint) or (hint,):
        if hasattr(option, "dims"):
            return tensor(option)
    raise LookupError(f"{name}: no example for {hint}")


def tensor(hint: Any) -> Any:
    """Return a tensor or array as jaxtyping describes it."""
    shape: list[int] = []
    for dimension in hint.dims if isinstance(hint.dims, tuple) else ():
        name = getattr(dimension, "name", None)
        size = DIMENSIONS.get(name, 3) if name else getattr(dimension, "size", 3)
        shape += [2] if "Variadic" in type(dimension).__name__ else [size]
    shape = [2, 3] if hint.dims is ... else shape
    whole = any("int" in str(dtype) for dtype in hint.dtypes)
    truth = any("bool" in str(dtype) for dtype in hint.dtypes)
    generator = np.random.default_rng(0)
    if truth:
        array: np.ndarray = np.ones(shape, dtype=bool)
    elif whole:
        kind = next(d for d in ("int64", "uint64", "uint32", "int32") if d in hint.dtypes)
        array = generator.integers(0, 3, shape).astype(kind)
    else:
        kind = "float32" if "float32" in hint.dtypes else "float64"
        array = generator.random(shape).astype(kind)
    return array if hint.array_type is np.ndarray else torch.from_numpy(array)


def attempt(target: Target, arguments: dict[str, Any]) -> Exception | None:
    """Call, use up what a generator or a context yields first, and return what was raised."""
    silence = contextlib.redirect_stderr(io.StringIO())
    with silence, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = target.call(**arguments)
            if inspect.isgenerator(result):
                list(zip(range(3), result, strict=False))
            elif isinstance(result, contextlib._GeneratorContextManager):
                with result:
                    pass
        except Exception as error:
            return error
    return None


def complaints(target: Target) -> Iterator[str]:
    """Yield what is wrong with the refusals of one function or class."""
    try:
        working = example(target)
    except LookupError as error:
        yield f"{target.name}: {error}"
        return
    if error := attempt(target, working):
        yield f"{target.name}: the example does not work: {type(error).__name__}: {error}"
        return
    for name in target.parameters:
        for what, mistake in MISTAKES.items():
            value = mistake()
            arguments = example(target) | {name: value}
            error = attempt(target, arguments)
            if verdict := judge(target, name, value, error):
                yield f"{target.name}({name} = {what}): {verdict}"


def allowed(value: Any, hint: Any) -> bool:
    """Tell whether an annotation takes a value; a whole number is good for a fraction, too."""
    try:
        return is_bearable(value, hint) or (type(value) is int and is_bearable(float(value), hint))
    except Exception:  # a hint that cannot be read forbids nothing
        return True


def judge(target: Target, name: str, value: Any, error: Exception | None) -> str | None:
    """Return what is wrong with the answer to ``value``, if anything is."""
    hint = target.hints.get(name, Any)
    if error is None:
        # Everything has a truth value, and what is only kept or shown may be anything.
        excused = hint in (bool, bool | None) or f"{target.name}({name})" in TAKES_ANYTHING
        return None if excused or allowed(value, hint) else "accepted against its annotation"
    message = f"{type(error).__name__}: {str(error)[:160]}".splitlines()[0]
    ours = type(error).__module__.startswith("llmbook")
    if (ours or isinstance(error, OSError | ImportError)) and allowed(value, hint):
        return None  # the file that is named is not there, or not what it should be
    if not isinstance(error, ValueError | TypeError):
        return message
    # Arguments that contradict each other may be told by the name of either.
    named = any(re.search(rf"\b{re.escape(p)}\b", str(error)) for p in target.parameters)
    return None if named else message


def main(modules: list[str]) -> list[str]:
    """Return all complaints about some modules, working in an empty folder."""
    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for module in modules:
            for target in targets(module):
                found += complaints(target)
                torch.set_grad_enabled(True)
    return found


if __name__ == "__main__":
    chosen = [argument for argument in sys.argv[1:] if argument != "--json"] or MODULES
    found = main(chosen)
    print(json.dumps(found) if "--json" in sys.argv else "\n".join(found))
