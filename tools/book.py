"""The book as data: its chapters, their files, and safe ways to read and write them.

Every tool starts here, and every function takes the root of a book, so that the tests can run
the tools on a miniature book of their own.
"""

import ast
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llmbook"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
CHAPTER_NAME = re.compile(r"\d\d_[a-z][a-z0-9_]*")


class BookError(Exception):
    """A fault that an author can mend; its message says where it is and what to do."""


@dataclass(frozen=True)
class Chapter:
    """One chapter, known by its name: a script and a notebook that are a pair, and their module."""

    root: Path
    name: str

    @property
    def number(self) -> int:
        """The place in the book, from the name: 1 for 01_tinyworld."""
        return int(self.name[:2])

    @property
    def module(self) -> str:
        """The module of the package: tinyworld for 01_tinyworld."""
        return self.name[3:]

    @property
    def script(self) -> Path:
        """The cells as a py:percent script, which is what people review."""
        return self.root / "chapters" / f"{self.name}.py"

    @property
    def notebook(self) -> Path:
        """The same cells with their outputs."""
        return self.root / "chapters" / f"{self.name}.ipynb"

    @property
    def module_file(self) -> Path:
        """The file that the exported cells become."""
        return self.root / PACKAGE / f"{self.module}.py"

    @property
    def imports(self) -> list[str]:
        """The modules of the book that the script's cells import, in order."""
        return imported_modules(read_text(self.script), str(self.script))


def chapters(root: Path = ROOT) -> list[Chapter]:
    """Return the chapters that have a script, a notebook or both, in the order of the book."""
    files = (root / "chapters").glob("[0-9][0-9]_*")
    names = {file.stem for file in files if file.suffix in {".py", ".ipynb"}}
    for name in sorted(names):
        if not CHAPTER_NAME.fullmatch(name):
            raise BookError(
                f"chapters/{name}: a chapter is named like 07_batches, in small letters"
            )
    return [Chapter(root, name) for name in sorted(names)]


def parse(source: str, where: str) -> ast.Module:
    """Parse Python as a notebook may hold it, with ``await`` outside functions."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        return compile(source, where, "exec", flags=flags, dont_inherit=True)
    except SyntaxError as error:
        line = (error.text or "").rstrip()
        raise BookError(f"{where}, line {error.lineno}: {error.msg}\n    {line}") from error


def imported_modules(source: str, where: str) -> list[str]:
    """Return the modules of the package that ``source`` imports, anywhere in it, each once.

    ``from llmbook import name`` counts as an import of the module ``name``: the package itself
    defines nothing but its version.
    """
    found: list[str] = []
    for node in ast.walk(parse(source, where)):
        if isinstance(node, ast.Import):
            found += [
                alias.name.removeprefix(f"{PACKAGE}.")
                for alias in node.names
                if alias.name.startswith(f"{PACKAGE}.")
            ]
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            if origin in {PACKAGE, "."}:
                found += [alias.name for alias in node.names if not alias.name.startswith("__")]
            elif origin.startswith((f"{PACKAGE}.", ".")):
                found.append(origin.removeprefix(PACKAGE).lstrip("."))
    return list(dict.fromkeys(name.split(".")[0] for name in found))


def tags(cell: NotebookNode) -> set[str]:
    """Return the tags of a cell."""
    return set(cell.metadata.get("tags", []))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells, in order; ``cell 3`` in a message is the third of these."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def read_text(path: Path) -> str:
    """Read UTF-8 with any line ends as lines that end in a newline."""
    return path.read_text(encoding="utf-8")


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook of any 4.x format."""
    if not path.exists():
        raise BookError(f"{path.name} does not exist yet: run `make sync`")
    try:
        return nbformat.reads(read_text(path), as_version=4)
    except Exception as error:  # nbformat raises whatever its JSON or schema reader raises
        raise BookError(f"{path.name} is not a notebook: {error}") from error


def notebook_text(notebook: NotebookNode) -> str:
    """Return the text of a notebook file: sorted keys, an indent of one, a newline at the end."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def plain(text: str) -> str:
    """Return ``text`` without colors, unless it will be seen on a terminal."""
    return text if sys.stdout.isatty() else ANSI.sub("", text)


def write_text(path: Path, text: str) -> bool:
    """Write ``text`` at once or not at all; say whether the file had to change.

    The file appears under a temporary name in the same folder first, so that no reader
    sees half of it. A file that has this text already keeps its modification time.
    """
    data = text.encode()
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files that only their owner may read; keep the usual rights.
        Path(temporary).chmod(path.stat().st_mode if path.exists() else 0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True
