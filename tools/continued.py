"""Join the parts of a class that a chapter writes in several cells into one class for the module.

The first part is an ordinary class. A later cell goes on with it::

    #| export
    class Trainer(Trainer):  # continued
        def save(self, path: Path) -> None: ...

In the notebook that is a plain subclass of the same name, so every cell runs as it stands. In the
module there is one class: bases, decorators, docstring and fields of the first part, then the
methods of all parts in order. A method that a later part defines again takes the place of the
earlier one. What would mean one thing in the notebook and another in the module is refused.
"""

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from book import BookError, code_cells, parse
from nbformat import NotebookNode

EXPORT = re.compile(r"^#\s*\|\s*exports?\b", re.MULTILINE)
MARK = re.compile(r"#\s*continued\s*$")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (*FUNCTION, ast.ClassDef)


@dataclass
class Statement:
    """A statement on the top level of an exported cell, with the lines that belong to it."""

    cell: NotebookNode
    where: str  # the cell, in the words of messages
    node: ast.stmt
    lines: list[str]  # of the whole cell

    @property
    def start(self) -> int:
        """The index of its first line, decorators included."""
        decorators = getattr(self.node, "decorator_list", [])
        return min([self.node.lineno, *(d.lineno for d in decorators)]) - 1

    @property
    def end(self) -> int:
        """The index after its last line; comments at the end of a class belong to it."""
        end = self.node.end_lineno or self.node.lineno
        for index in range(end, len(self.lines)):
            if re.match(r"\s+#", self.lines[index]) and isinstance(self.node, ast.ClassDef):
                end = index + 1
            elif self.lines[index].strip():
                break
        return end

    @property
    def header(self) -> str:
        """The line that ends in the colon of a class."""
        return self.lines[_header_end(self) - 1]


@dataclass
class Member:
    """A piece of a class: what it defines, and its text with the comments above it."""

    name: str | None
    text: str
    gap: int  # empty lines before it
    node: ast.stmt


@dataclass
class Class:
    """A class that has more than one part."""

    first: Statement
    parts: list[Statement] = field(default_factory=list)


def join(notebook: NotebookNode, chapter: str) -> NotebookNode:
    """Return a copy of ``notebook`` in which each continued class is written in one piece."""
    notebook = copy.deepcopy(notebook)
    statements = list(_statements(notebook, chapter))
    classes = _continued(statements, _defined_elsewhere(notebook, statements))
    edits: dict[int, list[tuple[int, int, str]]] = {}
    for whole in classes:
        for part in (whole.first, *whole.parts):
            edits.setdefault(id(part.cell), []).append((part.start, part.end, ""))
        at = _place(whole, statements)
        cut = (at.start, at.end) if at is whole.first else (at.end, at.end)
        text = _joined(whole)
        edits[id(at.cell)] = [e for e in edits.setdefault(id(at.cell), []) if e[:2] != cut]
        edits[id(at.cell)].append((*cut, text if at is whole.first else f"\n\n{text}"))
    for cell in notebook.cells:
        if id(cell) in edits:
            cell.source = _edited(cell.source, edits[id(cell)])
    notebook.cells = [c for c in notebook.cells if id(c) not in edits or _says_something(c)]
    return notebook


def _edited(source: str, edits: list[tuple[int, int, str]]) -> str:
    lines = source.splitlines()
    for start, end, text in sorted(edits, reverse=True):
        lines[start:end] = text.splitlines()
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


def _says_something(cell: NotebookNode) -> bool:
    return any(line.strip() and not line.startswith("#") for line in cell.source.splitlines())


# --- find the parts -----------------------------------------------------------------------------


def _statements(notebook: NotebookNode, chapter: str) -> Iterator[Statement]:
    """Yield what the exported cells define or do, in order."""
    for number, cell in enumerate(code_cells(notebook), 1):
        if EXPORT.search(cell.source):
            where = f"{chapter}, code cell {number}"
            lines = cell.source.splitlines()
            for node in parse(cell.source, where).body:
                yield Statement(cell, where, node, lines)


def _defined_elsewhere(notebook: NotebookNode, exported: list[Statement]) -> set[str]:
    """The classes that cells define for the notebook alone."""
    cells = {id(statement.cell) for statement in exported}
    found = set()
    for cell in code_cells(notebook):
        if id(cell) not in cells:
            found |= set(re.findall(r"^class (\w+)", cell.source, re.MULTILINE))
    return found


def _continued(statements: list[Statement], elsewhere: set[str]) -> list[Class]:
    """Return the classes with several parts; complain of parts that continue nothing."""
    classes: dict[str, Class] = {}
    imported: set[str] = set()
    for statement in statements:
        node = statement.node
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [ast.unparse(base) for base in node.bases]
        marked = bool(MARK.search(statement.header))
        if not marked and node.name not in bases:
            imported.discard(node.name)
            classes[node.name] = Class(statement)
            continue
        said = f"{statement.where}: class {node.name}"
        if not marked:
            raise BookError(
                f"{said} has its own name as a base: to continue it, write "
                f"`class {node.name}({node.name}):  # continued`"
            )
        if bases != [node.name] or node.keywords:
            raise BookError(f"{said} is continued, so its one base must be {node.name}")
        if node.name not in classes:
            raise BookError(f"{said} continues {_what(node.name, imported, elsewhere)}")
        _check_part(statement, classes[node.name])
        classes[node.name].parts.append(statement)
    return [whole for whole in classes.values() if whole.parts]


def _what(name: str, imported: set[str], elsewhere: set[str]) -> str:
    """Say why ``name`` has no first part."""
    if name in imported:
        return "an imported class; only a class that this chapter exports can be continued"
    if name in elsewhere:
        return "a class whose first part is not exported"
    return "nothing: no earlier exported cell defines it"


def _check_part(part: Statement, whole: Class) -> None:
    """Refuse a part that the notebook and the module would understand differently."""
    node, first = part.node, whole.first.node
    assert isinstance(node, ast.ClassDef) and isinstance(first, ast.ClassDef)
    said = f"{part.where}: class {node.name}, continued"
    if node.decorator_list:
        raise BookError(f"{said}, has a decorator: decorators belong to the first part")
    if ast.get_docstring(node) is not None:
        raise BookError(f"{said}, has a docstring: it belongs to the first part")
    earlier = {n for p in (whole.first, *whole.parts) for n in _names(p.node)}
    for child in node.body:
        if _is_field(child) and _has_fields(first):
            assert isinstance(child, ast.AnnAssign)
            raise BookError(
                f"{said}, adds the field {ast.unparse(child.target)}: the first part has made "
                "the class with its fields already, so all of them belong there"
            )
        if not isinstance(child, (*FUNCTION, ast.Assign, ast.AnnAssign)):
            raise BookError(f"{said}, may hold methods and attributes only")
        for name in _asked_of_super(child, node.name):
            if name in earlier:
                raise BookError(
                    f"{said}, calls super().{name}, which an earlier part defines: the notebook "
                    "would call that one, the module the base's. Give the earlier one another name"
                )


def _names(node: ast.stmt) -> set[str]:
    """What a part of a class defines."""
    assert isinstance(node, ast.ClassDef)
    return {name for child in node.body if (name := _name(child))}


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, DEFINITION):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else None


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)


def _has_fields(node: ast.ClassDef) -> bool:
    """Say whether annotated names of the class body are its fields."""
    made = [ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list]
    bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    return "dataclass" in made or bool({"NamedTuple", "TypedDict"} & set(bases))


def _asked_of_super(node: ast.AST, owner: str) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Call):
            call = child.value
            named = call.args and ast.unparse(call.args[0]) != owner
            if isinstance(call.func, ast.Name) and call.func.id == "super" and not named:
                yield child.attr


# --- write one class ----------------------------------------------------------------------------


def _begin(node: ast.stmt) -> int:
    """The number of the first line, decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _joined(whole: Class) -> str:
    """Return the text of the class in one piece."""
    node, lines = whole.first.node, whole.first.lines
    assert isinstance(node, ast.ClassDef)
    head = lines[whole.first.start : _header_end(whole.first)]
    members = [m for m in _members(whole.first) if not _is_filler(m.node) or m.name]
    for part in whole.parts:
        for group in _groups(_members(part)):
            _put(members, group)
    text = "\n".join(head)
    for number, member in enumerate(members):
        text += "\n" * (1 + (member.gap if number else 0)) + member.text
    return text


def _header_end(statement: Statement) -> int:
    """The index after the line with the colon of a class."""
    assert isinstance(statement.node, ast.ClassDef)
    first = _begin(statement.node.body[0]) - 1
    while first > statement.start and (
        not statement.lines[first - 1].strip() or re.match(r"\s+#", statement.lines[first - 1])
    ):
        first -= 1
    return first


def _members(statement: Statement) -> list[Member]:
    assert isinstance(statement.node, ast.ClassDef)
    found, start = [], _header_end(statement)
    body = statement.node.body
    for child in body:
        end = statement.end if child is body[-1] else (child.end_lineno or child.lineno)
        chunk = statement.lines[start:end]
        gap = next((i for i, line in enumerate(chunk) if line.strip()), 0)
        found.append(Member(_name(child), "\n".join(chunk[gap:]).rstrip(), gap, child))
        start = end
    return found


def _is_filler(node: ast.stmt) -> bool:
    """``pass`` and ``...``, which a joined class does not need."""
    ellipsis = isinstance(node, ast.Expr) and ast.unparse(node) == "..."
    return isinstance(node, ast.Pass) or ellipsis


def _groups(members: list[Member]) -> Iterator[list[Member]]:
    """Group neighbors of one name: a property and its setter, overloads."""
    group: list[Member] = []
    for member in members:
        if group and member.name != group[-1].name:
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _put(members: list[Member], group: list[Member]) -> None:
    """Add ``group``, in the place of what had its name."""
    group[0].gap = 1
    places = [i for i, member in enumerate(members) if member.name == group[0].name]
    at = places[0] if places else len(members)
    members[:] = [member for i, member in enumerate(members) if i not in places]
    members[at:at] = group


# --- where it stands ----------------------------------------------------------------------------


def _place(whole: Class, statements: list[Statement]) -> Statement:
    """Return the statement in whose place, or after which, the joined class is to stand.

    That is its first part, unless the signature of a later part needs a name that is defined
    further on: then the class follows that name. Nothing in between may need the class itself.
    """
    order = {id(statement): place for place, statement in enumerate(statements)}
    first, at, why = order[id(whole.first)], order[id(whole.first)], ""
    for part in whole.parts:
        assert isinstance(part.node, ast.ClassDef)
        needed = {name for child in part.node.body for name in _needed_now(child)}
        for place in range(first + 1, order[id(part)]):
            named = needed & _defines(statements[place].node)
            if place > at and named and statements[place] not in whole.parts:
                at, why = place, f"{part.where} needs {sorted(named)[0]} in a signature"
    name = whole.first.node.name  # type: ignore[attr-defined]
    for statement in statements[first + 1 : at + 1]:
        if statement not in whole.parts and name in _needed_now(statement.node):
            raise BookError(
                f"{statement.where} needs {name} while {name} is not complete, since {why}. "
                f'Write "{name}" in quotes there, or define what is needed before the class'
            )
    return statements[at]


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, DEFINITION):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {child.id for t in targets if t for child in ast.walk(t) if isinstance(child, ast.Name)}


def _needed_now(node: ast.AST) -> set[str]:
    """The names that must exist when the statement runs, not when a function in it is called."""
    parts: list[ast.AST | None] = [node]
    if isinstance(node, FUNCTION):
        spec = node.args
        given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
        parts = [*node.decorator_list, *spec.defaults, *spec.kw_defaults, node.returns]
        parts += [parameter.annotation for parameter in given if parameter]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]
        return _loaded(parts) | {name for child in node.body for name in _needed_now(child)}
    return _loaded(parts)


def _loaded(parts: list[ast.AST | None]) -> set[str]:
    return {
        child.id
        for part in parts
        if part is not None
        for child in ast.walk(part)
        if isinstance(child, ast.Name)
    }
