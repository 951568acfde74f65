"""Make the student's notebooks: every solution blanked, every output gone.

An exercise is three things in this order: a MyST ``{exercise}`` block with a label in a markdown
cell, code cells tagged ``solution``, and one code cell tagged ``check``. The blank of a solution
is the solution with the body of each function replaced by ``raise NotImplementedError``. A check
that a blank passes is no check, so the tests run each blank (see ``nbval_exercises.py``).
"""

import argparse
import ast
import copy
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from book import (
    PACKAGE,
    ROOT,
    BookError,
    Chapter,
    chapters,
    code_cells,
    notebook_text,
    read_notebook,
    read_text,
    tags,
    write_text,
)
from engine import fold
from nbformat import NotebookNode

EXERCISE = re.compile(
    r"^[ >]*`{3,}\{exercise(?:-start)?\}[^\n]*\n(?P<options>(?:[ >]*:[^\n]*\n)*)", re.MULTILINE
)
LABEL = re.compile(r"^[ >]*:label:[ ]*(\S+)[ ]*$", re.MULTILINE)
BLANK = "raise NotImplementedError"


@dataclass
class Exercise:
    """The label of an exercise, and its code cells in the notebook."""

    label: str
    solutions: list[NotebookNode] = field(default_factory=list)
    check: NotebookNode | None = None


def exercises(chapter: Chapter, notebook: NotebookNode) -> list[Exercise]:
    """Return the exercises of a chapter, or raise an error if one lacks a part of its three."""
    found: list[Exercise] = []
    previous: set[str] = set()
    code = code_cells(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for label in labels(chapter, cell.source):
                _require_whole(chapter, found)
                found.append(Exercise(label))
        role = tags(cell) & {"solution", "check"} if cell.cell_type == "code" else set()
        if role:
            where = f"{chapter.name}, code cell {code.index(cell) + 1}"
            _add(where, found, cell, role, previous)
        previous = role
    _require_whole(chapter, found)
    return found


def labels(chapter: Chapter, markdown: str) -> list[str]:
    """Return the labels of the exercises in a markdown cell."""
    options = [match["options"] for match in EXERCISE.finditer(markdown)]
    for option in options:
        if not LABEL.search(option):
            raise BookError(f"{chapter.name}: an exercise has no :label: line of its own")
    return [LABEL.search(option)[1] for option in options]


def _require_whole(chapter: Chapter, found: list[Exercise]) -> None:
    if found and not found[-1].solutions:
        raise BookError(f"{chapter.name}: no cell tagged solution follows {found[-1].label}")
    if found and found[-1].check is None:
        raise BookError(f"{chapter.name}: no cell tagged check follows {found[-1].label}")


def _add(
    where: str, found: list[Exercise], cell: NotebookNode, role: set[str], previous: set[str]
) -> None:
    """Give ``cell`` to the last exercise, if it may have it."""
    if len(role) == 2:
        raise BookError(f"{where}: tagged both solution and check")
    if not found:
        raise BookError(f"{where}: tagged {role.pop()}, but no exercise comes before it")
    last = found[-1]
    if last.check is not None:
        raise BookError(f"{where}: tagged {role.pop()}, but {last.label} has its check already")
    if role == {"check"}:
        last.check = cell
    elif last.solutions and previous != {"solution"}:
        raise BookError(f"{where}: the solution of {last.label} goes on after other cells")
    else:
        last.solutions.append(cell)


# --- blanks -------------------------------------------------------------------------------------


def blank(source: str, where: str) -> str:
    """Return ``source`` with the body of each function and method replaced by a blank.

    Signatures, decorators, docstrings and the attributes of classes stay. Comments in a body go:
    they tell how.

    >>> print(blank("def f(x):\\n    '''Double x.'''\\n    return 2 * x  # twice", "cell 1"))
    def f(x):
        '''Double x.'''
        raise NotImplementedError
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise BookError(f"{where}: a solution must be plain Python: {error}") from error
    functions = _outermost_functions(tree)
    if not functions:
        raise BookError(f"{where}: this solution has no function whose body could be blanked")
    # ast counts columns in bytes.
    lines = [line.encode() for line in source.splitlines()]
    for function in reversed(functions):
        _blank_body(lines, function)
    return b"\n".join(lines).decode()


def _outermost_functions(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return functions that are in no other function and that do something, in order."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [child] if _statements(child) else []
        else:
            found += _outermost_functions(child)
    return found


def _statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """Return the body without its docstring; nothing, for a body that is only ``...``."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    empty = (
        len(body) == 1
        and isinstance(body[0], ast.Expr)
        and (isinstance(body[0].value, ast.Constant) and body[0].value.value is ...)
    )
    return [] if empty else body


def _blank_body(lines: list[bytes], function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """Replace the statements of ``function`` in ``lines``, and the comments around them."""
    body = _statements(function)
    first, last = body[0], body[-1]
    start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) - 1
    before = lines[start][: first.col_offset]
    end = last.end_lineno
    while end < len(lines) and _is_comment_in(lines[end], function):
        end += 1
    if not before.strip():  # not a one-line function: its comments may come before
        while not lines[start - 1].strip() or lines[start - 1].lstrip().startswith(b"#"):
            start -= 1
    lines[start:end] = [before + BLANK.encode()]


def _is_comment_in(line: bytes, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    stripped = line.lstrip()
    return stripped.startswith(b"#") and len(line) - len(stripped) > function.col_offset


# --- the notebooks ------------------------------------------------------------------------------


def blanked(chapter: Chapter, notebook: NotebookNode, cell: NotebookNode) -> str:
    """Return the blank of one solution cell."""
    number = code_cells(notebook).index(cell) + 1
    return blank(cell.source, f"{chapter.name}, code cell {number}")


def student_notebook(chapter: Chapter) -> NotebookNode:
    """Return the chapter with every solution blanked and no outputs."""
    notebook = read_notebook(chapter.notebook)
    blanks = {
        cell.id: blanked(chapter, notebook, cell)
        for exercise in exercises(chapter, notebook)
        for cell in exercise.solutions
    }
    student = copy.deepcopy(notebook)
    student.metadata.pop(PACKAGE, None)
    for cell in code_cells(student):
        cell.source = blanks.get(cell.id, cell.source)
        cell.outputs, cell.execution_count = [], None
    fold(student.cells)
    return student


def write_workbook(root: Path) -> list[Path]:
    """Write all student notebooks, or none if a chapter has a fault; return their paths."""
    # In two folders, as in the book, so that the notebooks find their figures.
    folder = root / "_build" / "workbook"
    texts = {
        folder / "chapters" / chapter.notebook.name: notebook_text(student_notebook(chapter))
        for chapter in chapters(root)
    }
    figures = {
        folder / "figures" / path.name: read_text(path) for path in (root / "figures").glob("*.svg")
    }
    for path, text in (texts | figures).items():
        write_text(path, text)
    for path in {*folder.glob("**/*.ipynb"), *folder.glob("**/*.svg")} - {*texts, *figures}:
        path.unlink()
    return list(texts)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make notebooks with blanked solutions.")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        written = write_workbook(args.root)
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(written)} student notebooks in {args.root / '_build' / 'workbook' / 'chapters'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
