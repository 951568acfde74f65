"""What exercises need that a reader of the main line has not met: names from engine cells only."""

import ast
import re
import symtable
from collections.abc import Iterator
from dataclasses import dataclass

import engine
from book import PACKAGE, Chapter, code_cells, parse, tags
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from workbook import Exercise, exercises, labels

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
AWAIT = re.compile(r"\b(?:await|async(?= +(?:for|with)\b)) *")


def hidden_needs(chapter: Chapter, notebook: NotebookNode) -> Iterator[str]:
    """Yield each name that an exercise needs and that a reader of the main line has not met.

    A name is met where a cell of the main line before the exercise binds or uses it, or where the
    exercise's text says it. What a hidden cell imports from other libraries anyone can import.
    Methods count like names: a class that begins in the main line may go on in an engine room.
    """
    for exercise in exercises(chapter, notebook):
        met = set(_words(_text_of(chapter, notebook, exercise)))
        met |= {f".{word}" for word in met}
        hidden: dict[str, str] = {}
        needed: set[str] = set()
        for cell in _code_until(notebook, exercise.check):
            names = _names(cell.source)
            own = cell is exercise.check or any(cell is c for c in exercise.solutions)
            if own:
                needed |= names.used - met
                met |= names.bound
            elif engine.TAG in tags(cell):
                met |= names.of_others
                hidden |= dict.fromkeys(names.bound, engine.place(notebook, cell))
            else:
                met |= names.bound | names.used
        for name in sorted(needed & hidden.keys()):
            what = f"a method {name}" if name.startswith(".") else name
            yield (
                f"{exercise.label} needs {what}, which the main line never shows, only "
                f"{hidden[name]}, an engine cell: say it in the exercise, or show it before"
            )


def _text_of(chapter: Chapter, notebook: NotebookNode, exercise: Exercise) -> str:
    cells = (cell for cell in notebook.cells if cell.cell_type == "markdown")
    return next(c.source for c in cells if exercise.label in labels(chapter, c.source))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _code_until(notebook: NotebookNode, last: NotebookNode | None) -> Iterator[NotebookNode]:
    for cell in code_cells(notebook):
        yield cell
        if cell is last:
            return


@dataclass(frozen=True)
class Names:
    """The names of a cell: those it binds, those it takes from before, imports of others' code.

    Methods have a dot before their names, and so have attributes that are used.
    """

    bound: set[str]
    used: set[str]
    of_others: set[str]


def _names(source: str) -> Names:
    """Return what a cell binds and what it uses, as Python's own table of symbols has it."""
    # What only notebooks allow: magics become calls, and waiting changes no name.
    source = AWAIT.sub("", TransformerManager().transform_cell(source))
    tree = parse(source, "a cell")
    top = symtable.symtable(source, "a cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    bound |= {s.get_name() for s in top.get_symbols() if s.is_namespace()}
    used = {s.get_name() for s in top.get_symbols() if s.is_referenced()} | set(_globals(top))
    again = {
        base.id
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id == node.name  # a class that goes on
    }
    others = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] != PACKAGE
    }
    inner = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {f".{m.name}" for c in inner for m in c.body if isinstance(m, FUNCTION)}
    attributes = {f".{node.attr}" for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return Names(bound | methods, ((used | attributes) - bound - methods) | again, others)


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names that functions and classes in a cell take from outside."""
    for inner in table.get_children():
        yield from (s.get_name() for s in inner.get_symbols() if s.is_global())
        yield from _globals(inner)
