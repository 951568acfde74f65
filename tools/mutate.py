"""Change the package at random places, one at a time, and see whether its tests notice.

A change is made where behavior may depend on it: a comparison, an operator, a number, a truth
value, a default, a condition, a statement that is left out. The tests that name the changed
function, all tests of its module, its doctests and then the tests of modules that import it are
run until one fails. What survives is
printed: either a test is missing, or the change makes no difference (read it to tell).

Use: ``.venv/bin/python tools/mutate.py --number 200 --seed 0``; a module's name as an argument
limits it to that module, and ``--own`` asks only the module's own tests, about ten seconds for each
change. A change that nothing notices costs all the tests that are asked, which without ``--own``
can be minutes. It isn't part of ``make test``.
"""

import argparse
import ast
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from book import PACKAGE, ROOT, imported_modules, read_text

COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.LShift: ">>",
    ast.RShift: "<<",
}
LIMIT = 400  # seconds for the tests of a change; those that never end are noticed, too


@dataclass(frozen=True)
class Mutation:
    """A piece of a module's source, from one offset to another, and what takes its place."""

    module: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        """What changes, and where."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{PACKAGE}/{self.module}.py:{self.line}: {old[:70]} -> {new[:70]}"


class Finder(ast.NodeVisitor):
    """Collects the mutations of one module."""

    def __init__(self, module: str, source: str) -> None:
        """Prepare to read ``source``."""
        self.module, self.source = module, source.encode()
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutation] = []

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node begins and ends, in bytes."""
        first = self.starts[node.lineno - 1] + node.col_offset
        return first, self.starts[node.end_lineno - 1] + node.end_col_offset

    def replace(self, node: ast.AST, new: str) -> None:
        """Put ``new`` in the place of a node."""
        self.change(node.lineno, *self.span(node), new)

    def change(self, line: int, start: int, end: int, new: str) -> None:
        """Keep one change."""
        old = self.source[start:end].decode()
        self.found.append(Mutation(self.module, line, start, end, old, new))

    def between(self, left: ast.AST, right: ast.AST, new: str) -> None:
        """Replace the operator between two operands, parentheses around it aside."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:end].decode()
        operator = gap.strip(" ()\n\t\\")
        if operator and "#" not in gap:
            at = start + len(gap[: gap.index(operator)].encode())
            self.change(left.end_lineno, at, at + len(operator.encode()), new)

    # --- what is changed ---

    def visit_Compare(self, node: ast.Compare) -> None:
        """Include the bound or exclude it, turn equality around."""
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            self.between(left, right, COMPARISONS[type(operator)])
            left = right
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Replace one operator by another."""
        if type(node.op) in OPERATORS and not isinstance(node.left, ast.JoinedStr):
            self.between(node.left, node.right, OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Turn and into or, or into and."""
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, "or" if isinstance(node.op, ast.And) else "and")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Leave out a not or a minus."""
        if isinstance(node.op, ast.Not | ast.USub):
            start, end = self.span(node.operand)
            self.replace(node, f"({self.source[start:end].decode()})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Count one more; double what is not whole; turn a truth value around."""
        value = node.value
        if isinstance(value, bool):
            self.replace(node, str(not value))
        elif isinstance(value, int):
            self.replace(node, str(value + 1))
        elif isinstance(value, float):
            self.replace(node, repr(value * 2 if value else 1.0))

    def visit_If(self, node: ast.If) -> None:
        """Do always, or never, what depends on a condition."""
        self.replace(node.test, "True")
        self.replace(node.test, "False")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Leave out a call that is made for its effect."""
        if isinstance(node.value, ast.Call):
            self.replace(node, "pass")
        if not isinstance(node.value, ast.Constant):  # not a docstring
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Leave out what is added to a variable."""
        self.replace(node, "pass")
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        """End the loop instead of going on."""
        self.replace(node, "break")

    def visit_Break(self, node: ast.Break) -> None:
        """Go on instead of ending the loop."""
        self.replace(node, "continue")

    # --- what is not ---

    def visit_Raise(self, node: ast.Raise) -> None:
        """Leave the words of messages alone; that they come is seen by their conditions."""

    def visit_keyword(self, node: ast.keyword) -> None:
        """Leave ``zip(..., strict=True)`` alone: it guards against faults of the program itself."""
        if node.arg != "strict":
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Leave annotations alone."""
        if node.value:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Leave types and lists of names alone."""
        target = node.targets[0]
        if not (isinstance(target, ast.Name) and (target.id == "__all__" or is_type(node.value))):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Look at defaults and at the body, not at annotations."""
        # A cache of another size gives the same results.
        kept = [d for d in node.decorator_list if "lru_cache" not in ast.dump(d)]
        for part in (*kept, *node.args.defaults, *node.args.kw_defaults, *node.body):
            if part is not None:
                self.visit(part)


def is_type(value: ast.expr) -> bool:
    """Tell whether a value looks like a type, such as ``int | None``."""
    return isinstance(value, ast.Subscript) or (
        isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    )


def mutations(module: str, source: str) -> list[Mutation]:
    """Return all mutations of a module, in order.

    >>> [str(m).split(": ")[1] for m in mutations("m", "def f(x=1):\\n    return x > 0")]
    ['1 -> 2', '> -> >=', '0 -> 1']
    """
    finder = Finder(module, source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda m: (m.start, m.new))


def chosen(modules: list[str], number: int, seed: int) -> list[Mutation]:
    """Return a random sample over all places of some modules."""
    every = [
        mutation
        for module in modules
        for mutation in mutations(module, read_text(ROOT / PACKAGE / f"{module}.py"))
    ]
    return random.Random(seed).sample(every, min(number, len(every)))


def words_of(source: str, node: ast.AST) -> set[str]:
    """Return the names that stand in a piece of code."""
    return set(re.findall(r"\w+", ast.get_source_segment(source, node) or ""))


def likely_tests(source: str, line: int, tests: str) -> list[str]:
    """Return the tests that name what is defined at a line, or else what makes use of it.

    >>> code = "def a():\\n    return 1\\ndef b():\\n    return a()"
    >>> likely_tests(code, 2, "def test_b():\\n    assert b() == 1\\ndef test_c(): pass")
    ['test_b']
    """
    parts = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    calls = {part.name: words_of(source, part) for part in parts}
    said = {n.name: words_of(tests, n) for n in ast.parse(tests).body if hasattr(n, "name")}
    names = {part.name for part in parts if part.lineno <= line <= part.end_lineno}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and node.lineno <= line <= node.end_lineno:
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    while True:
        found = [
            name
            for name, words in said.items()
            if name.lower().startswith("test") and words & names
        ]
        wider = names | {name for name, words in calls.items() if words & names}
        if found or wider == names:
            return found
        names = wider


def suites(module: str, modules: Iterable[str], line: int = 0) -> Iterator[list[str]]:
    """Yield what pytest is to run: the module's own tests, then those of modules that import it.

    The tests that are likely to notice a change at ``line`` come before all others.
    """
    source, tests = (
        read_text(ROOT / path) for path in (f"{PACKAGE}/{module}.py", f"tests/test_{module}.py")
    )
    if likely := likely_tests(source, line, tests):
        yield [f"tests/test_{module}.py::{name}" for name in likely]
    yield [f"tests/test_{module}.py"]
    yield [f"{PACKAGE}/{module}.py", "--doctest-modules"]
    for other in modules:
        if module in imported_modules(read_text(ROOT / PACKAGE / f"{other}.py"), other):
            yield [f"tests/test_{other}.py"]


def mutated_package(folder: Path, mutation: Mutation) -> None:
    """Lay out the package in ``folder``, with one file changed and links to the others."""
    (folder / PACKAGE).mkdir()
    for file in (ROOT / PACKAGE).iterdir():
        (folder / PACKAGE / file.name).symlink_to(file)
    path = folder / PACKAGE / f"{mutation.module}.py"
    source = path.read_bytes()
    path.unlink()
    start, end = mutation.start, mutation.end
    path.write_bytes(source[:start] + mutation.new.encode() + source[end:])


def run_tests(folder: Path, arguments: list[str]) -> int:
    """Run pytest in a fork of this process, which has loaded what is slow, on a changed package."""
    if child := os.fork():
        deadline, finished = time.monotonic() + LIMIT, 0
        try:
            while time.monotonic() < deadline:
                finished, status = os.waitpid(child, os.WNOHANG)
                if finished:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
        finally:  # it takes too long, or this process is told to stop
            if not finished:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # what it had started
        return -1
    code: int = 3
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        sys.dont_write_bytecode = True
        for stream in (1, 2):
            os.dup2(os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        import pytest

        options = "-x -q -p no:nbval -p no:cacheprovider -p no:xdist -c pyproject.toml"
        in_place = [a.replace(f"{PACKAGE}/", f"{folder}/{PACKAGE}/") for a in arguments]
        conftest = [] if "tests/" in arguments[0] else ["-p", "conftest"]
        code = pytest.main([*options.split(), "--rootdir", str(ROOT), *conftest, *in_place])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(int(code))


def survives(mutation: Mutation, modules: Iterable[str]) -> bool:
    """Tell whether all tests pass on a changed package."""
    with tempfile.TemporaryDirectory() as folder:
        mutated_package(Path(folder), mutation)
        return all(
            run_tests(Path(folder), suite) in (0, 5)
            for suite in suites(mutation.module, modules, mutation.line)
        )


def main() -> None:
    """Choose, change, run, and print what survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="all, if none is named")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    about = "ask only the module's own tests: faster, and stricter"
    parser.add_argument("--own", action="store_true", help=about)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # leaving no tests behind
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tests"))
    known = sorted(p.stem for p in (ROOT / PACKAGE).glob("[a-z]*.py"))
    sample = chosen(options.modules or known, options.number, options.seed)
    import torch  # noqa: F401

    alive: list[Mutation] = []
    for number, mutation in enumerate(sample, 1):
        start = time.monotonic()
        lives = survives(mutation, () if options.own else known)
        alive += [mutation] if lives else []
        verdict = "SURVIVED" if lives else "noticed"
        seconds = time.monotonic() - start
        print(f"{number}/{len(sample)} {verdict} {mutation} ({seconds:.0f} s)", flush=True)
    noticed = len(sample) - len(alive)
    print(f"{noticed} of {len(sample)} changes were noticed. Survived:")
    print("\n".join(f"  {mutation}" for mutation in alive) or "  none")


if __name__ == "__main__":
    main()
