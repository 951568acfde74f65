"""Engine rooms: cells that make an idea fit for use, folded behind one line until asked for.

A **room** is a run of neighboring cells tagged ``engine``. Its first cell is a heading ``Engine
room: ...``, which is the line that stays visible; it has no other heading, and what comes after
begins with a heading that is not deeper. So a room is a section, and the site, JupyterLab and a
screen reader agree on where it ends. A **lone** engine cell is a single code cell, folded
under the comment that it begins with.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from book import code_cells, tags
from nbformat import NotebookNode

TAG = "engine"
TITLE = "Engine room: "
NOT_FOLDED = {"solution", "check"}
HEADING = re.compile(r"(#{1,6})[ \t]+(.*)")
FENCE = re.compile(r"[ >]*(`{3,}|~{3,}|:{3,})(.*)")
JOINED = re.compile(
    rf"^(?P<mark># %% \[markdown\].*\"{TAG}\".*\n)(?P<heading># #+ {TITLE}.*\n)(?:#\n)*(?=#)",
    re.MULTILINE,
)
# What JupyterLab keeps of a fold: for a heading, for a code cell.
FOLDED_HEADING, FOLDED_CODE = "jp-MarkdownHeadingCollapsed", "jupyter"


@dataclass(frozen=True)
class Room:
    """A run of neighboring engine cells, and the cell after it."""

    cells: list[NotebookNode]
    after: NotebookNode | None

    @property
    def first(self) -> NotebookNode:
        """The cell of which a line stays visible."""
        return self.cells[0]

    @property
    def is_lone(self) -> bool:
        """Whether this is one code cell, which needs no heading."""
        return len(self.cells) == 1 and self.first.cell_type == "code"


def rooms(cells: list[NotebookNode]) -> list[Room]:
    """Return the rooms among ``cells``, and the lone engine cells, in order."""
    found, run = [], []
    for cell in [*cells, None]:
        if cell is not None and TAG in tags(cell):
            run.append(cell)
        elif run:
            found.append(Room(run, cell))
            run = []
    return found


def headings(cell: NotebookNode | None) -> list[tuple[int, str]]:
    """Return level and text of each heading of a markdown cell; what is in a fence is no heading.

    >>> from nbformat.v4 import new_markdown_cell
    >>> headings(new_markdown_cell("# A\\n```\\n# b\\n```\\n## C"))
    [(1, 'A'), (2, 'C')]
    """
    found: list[tuple[int, str]] = []
    fence = ""
    for line in cell.source.splitlines() if cell and cell.cell_type == "markdown" else []:
        if mark := FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif not fence and (heading := HEADING.fullmatch(line.rstrip())):
            found.append((len(heading[1]), heading[2]))
    return found


def opening(cell: NotebookNode | None) -> tuple[int, str] | None:
    """Return level and text of the heading that a markdown cell begins with, if it does."""
    begins = cell is not None and HEADING.match(cell.source)
    return next(iter(headings(cell)), None) if begins else None


def comment(cell: NotebookNode) -> str | None:
    """Return the comment that a code cell begins with, after directives such as ``#| export``.

    >>> from nbformat.v4 import new_code_cell
    >>> comment(new_code_cell("#| export\\n# The imports of the module\\nimport os"))
    'The imports of the module'
    """
    lines = [line for line in cell.source.splitlines() if not re.match(r"#\s*\|", line)]
    first = next((line for line in lines if line.strip()), "")
    return first.lstrip("#: ").strip() or None if first.startswith("#") else None


def is_exported(source: str) -> bool:
    """Whether a cell becomes a part of the module."""
    return re.match(r"#\s*\|\s*export\b", source) is not None


# --- JupyterLab ---------------------------------------------------------------------------------


def fold(cells: list[NotebookNode]) -> None:
    """Fold the rooms among ``cells`` for JupyterLab, by metadata that the script does not hold."""
    for room in rooms(cells):
        if room.is_lone:
            room.first.metadata[FOLDED_CODE] = {"source_hidden": True}
        elif room.first.cell_type == "markdown":
            room.first.metadata[FOLDED_HEADING] = True


def fold_as(cells: list[NotebookNode], stored: list[NotebookNode]) -> None:
    """Fold and unfold the rooms among ``cells`` as a reader left them in ``stored``."""
    left = {cell.get("id"): cell.metadata for cell in stored}
    for first in (room.first for room in rooms(cells)):
        for key in (FOLDED_HEADING, FOLDED_CODE):
            first.metadata.pop(key, None)
            if key in left.get(first.id, {}):
                first.metadata[key] = left[first.id][key]


def separate_headings(script: str) -> str:
    """Give the heading of each room in a script a cell of its own.

    JupyterLab hides the cells after a heading, not what else is in the heading's cell.

    >>> print(separate_headings('# %% [markdown] tags=["engine"]\\n# ## Engine room: A\\n#\\n# B.'))
    # %% [markdown] tags=["engine"]
    # ## Engine room: A
    <BLANKLINE>
    # %% [markdown] tags=["engine"]
    # B.
    """
    return JOINED.sub(r"\g<mark>\g<heading>\n\g<mark>", script)


# --- rules --------------------------------------------------------------------------------------


def faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield what is wrong with the engine cells of a chapter, each with its place."""
    for cell in notebook.cells:
        role = NOT_FOLDED & tags(cell)
        if TAG in tags(cell) and role:
            yield f"{place(notebook, cell)}: a {role.pop()} is for the reader, not for the engine"
        elif TAG in tags(cell) and "{exercise" in cell.source and cell.cell_type == "markdown":
            yield f"{place(notebook, cell)}: an exercise is for the reader, not for the engine"
        for _, text in headings(cell) if TAG not in tags(cell) else []:
            if text.casefold().startswith(TITLE.strip(": ").casefold()):
                yield f"the heading {text!r} is of an engine room, but its cell has no tag {TAG}"
    for room in rooms(notebook.cells):
        yield from _faults_of(notebook, room)


def _faults_of(notebook: NotebookNode, room: Room) -> Iterator[str]:
    where = place(notebook, room.first)
    if room.is_lone:
        if comment(room.first) is None:
            yield f"{where}: a lone engine cell begins with a comment that says what it is"
        return
    heading = opening(room.first)
    if heading is None or not heading[1].startswith(TITLE) or heading[1] == TITLE.strip():
        yield f"{where}: an engine room opens with a heading `{TITLE}...` that says what is inside"
        return
    level, title = heading
    if room.first.source.strip().count("\n"):
        yield f"{title!r} has text in the cell of its heading: `make sync` sets it apart"
    inner = [text for cell in room.cells for _, text in headings(cell)][1:]
    yield from (f"{title!r} has another heading inside: {text!r}" for text in inner)
    if level == 1:
        yield f"{title!r} is on the level of the chapter's title; it closes a section: ###"
    if room.after is not None and (opening(room.after) or (level + 1,))[0] > level:
        after = place(notebook, room.after)
        yield f"{title!r} closes its section, but what follows, {after}, opens none of this level"


def place(notebook: NotebookNode, cell: NotebookNode) -> str:
    """Say which cell this is: a number for code, the first words for text."""
    if cell.cell_type == "code":
        number = next(i for i, c in enumerate(code_cells(notebook), 1) if c is cell)
        return f"code cell {number}"
    line = cell.source.strip().partition("\n")[0]
    return f"the cell {line if len(line) < 50 else line[:47] + '...'!r}"
