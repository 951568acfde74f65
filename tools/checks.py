"""What must hold for the book, one function per rule: each takes a root and returns complaints.

``tests/book`` runs them on the book, and on a miniature with one fault after another to see that
they find it. Rules that need a kernel are elsewhere: nbval compares the outputs.
"""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import engine
import headers
import yaml
from book import (
    PACKAGE,
    BookError,
    Chapter,
    chapters,
    code_cells,
    imported_modules,
    parse,
    read_notebook,
    read_text,
    tags,
)
from nbformat import NotebookNode
from needs import hidden_needs
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from sync import out_of_date
from tables import not_current
from workbook import blanked, exercises
from wrong_answers import exercises_with_too_few

MAX_CELL_LINES, MAX_LINE = 30, 100
MAX_WHOLE_LINES = 60  # of an exported cell that is one function or class
UNBREAKABLE = ("# %%", "# |", "# :")  # cell markers with alt text, rows of tables, options
IGNORED_TAGS = {"nbval-ignore-output", "nbval-skip"}
IGNORED_MARK = re.compile(r"#\s*NBVAL_(?:IGNORE_OUTPUT|SKIP)")
MARKDOWN_IMAGE = re.compile(r"!\[\s*\]\(\s*([^)\s]*)")
IMAGE_DIRECTIVE = re.compile(
    r"^[ >]*(?:`{3,}|:{3,})\{(?:figure|image)\}\s*(?P<file>\S*)[^\n]*\n"
    r"(?P<options>(?:[ >]*:\w+:[^\n]*\n)*)",
    re.MULTILINE,
)
# The pages that people read without building the site.
PAGES = ("README.md", "CONTRIBUTING.md")
MARKDOWN_LINK = re.compile(r"\]\(\s*<?([^)>\s]+)")
MAKE_INSTALLS = re.compile(r'install.* --constraint (\S+) --editable "(\S+)"')
PRIVATE = re.compile(r"_(?!_|replace$|asdict$|fields$|make$)\w+")  # but what named tuples offer
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
Check = Callable[[Path], list[str]]


def notebooks(root: Path) -> Iterator[tuple[Chapter, NotebookNode]]:
    """Yield the chapters that have a notebook, with it; ``files_are_current`` misses the others."""
    for chapter in chapters(root):
        if chapter.notebook.exists():
            yield chapter, read_notebook(chapter.notebook)


def numbered_code(root: Path) -> Iterator[tuple[str, NotebookNode]]:
    """Yield each code cell and what to call it."""
    for chapter, notebook in notebooks(root):
        for number, cell in enumerate(code_cells(notebook), 1):
            yield f"{chapter.name}, code cell {number}", cell


# --- files and their order ----------------------------------------------------------------------


def files_are_current(root: Path) -> list[str]:
    """Script and notebook agree, the module is what they export, the outputs are of this code."""
    return out_of_date(root)


def each_chapter_has_its_companions(root: Path) -> list[str]:
    """Each module has tests, and a page in the reference."""
    found = []
    for chapter in chapters(root):
        for file in (f"tests/test_{chapter.module}.py", f"api/{chapter.module}.md"):
            if not (root / file).exists():
                found.append(f"{chapter.name}: {file} is missing")
    return found


def headers_are_whole(root: Path) -> list[str]:
    """Each chapter says first what it is, builds, needs and takes, and to which part it belongs."""
    return headers.faults(root)


def tables_are_current(root: Path) -> list[str]:
    """The tables of chapters on other pages are what the chapters say of themselves."""
    return [] if headers.faults(root) else not_current(root)


def links_lead_somewhere(root: Path) -> list[str]:
    """The relative links of pages that are read in the repository; the site's are checked there."""
    found = []
    for page in PAGES:
        for target in MARKDOWN_LINK.findall(read_text(root / page)):
            file = target.partition("#")[0]
            if file and "://" not in file and not (root / file).exists():
                found.append(f"{page}: {target} does not exist")
    return found


def imports_follow_the_order(root: Path) -> list[str]:
    """A module imports from modules of earlier chapters only; a chapter may show its own, too."""
    found: list[str] = []
    earlier: set[str] = set()
    for chapter in chapters(root):
        found += _wrong_imports(root, chapter.module_file, earlier)
        earlier.add(chapter.module)
        found += _wrong_imports(root, chapter.script, earlier)
    return found


def _wrong_imports(root: Path, file: Path, allowed: set[str]) -> Iterator[str]:
    if not file.exists():
        return
    where, source = file.relative_to(root).as_posix(), read_text(file)
    for name in imported_modules(source, where):
        if name not in allowed:
            yield f"{where} imports {PACKAGE}.{name}, which no earlier chapter makes"
    for name in {"tests", "tools"} & set(_top_level_imports(source, where)):
        yield f"{where} imports {name}, which is not for readers"


def _top_level_imports(source: str, where: str) -> Iterator[str]:
    for node in ast.walk(parse(source, where)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


# --- cells --------------------------------------------------------------------------------------


def cells_are_short(root: Path) -> list[str]:
    """A code cell fits on a screen, and a line of a script in its window."""
    found = []
    for where, cell in numbered_code(root):
        lines = sum(bool(line.strip()) for line in cell.source.splitlines())
        most = MAX_WHOLE_LINES if _is_one_exported_thing(cell.source) else MAX_CELL_LINES
        if lines > most:
            found.append(f"{where} has {lines} lines; at most {most}")
    for script in (c.script for c in chapters(root) if c.script.exists()):
        for number, line in enumerate(read_text(script).splitlines(), 1):
            if len(line) > MAX_LINE and not line.startswith(UNBREAKABLE):
                found.append(
                    f"{script.name}, line {number} has {len(line)} characters; at most {MAX_LINE}"
                )
    return found


def _is_one_exported_thing(source: str) -> bool:
    """Whether a cell is one function or class of the package, which need not be cut in two."""
    if not engine.is_exported(source):
        return False
    body = parse(source, "an exported cell").body
    return len(body) == 1 and isinstance(body[0], (*FUNCTION, ast.ClassDef))


def outputs_are_clean(root: Path) -> list[str]:
    """No stored output is an error that was not expected, or a warning."""
    found = []
    for where, cell in numbered_code(root):
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                found.append(f"{where}: its stored output is an error: {output.ename}")
            elif output.get("name") == "stderr":
                found.append(f"{where} wrote to stderr: {output.text.strip().splitlines()[-1]}")
    return found


def few_outputs_are_ignored(root: Path) -> list[str]:
    """At most one in ten of a chapter's outputs escapes comparison, though one always may."""
    found = []
    for chapter, notebook in notebooks(root):
        shown = [cell for cell in code_cells(notebook) if _shows_text(cell)]
        ignored = [c for c in shown if IGNORED_TAGS & tags(c) or IGNORED_MARK.search(c.source)]
        most = max(1, len(shown) // 10)
        if len(ignored) > most:
            counts = f"{len(ignored)} of {len(shown)} outputs are not compared"
            found.append(f"{chapter.name}: {counts}; at most {most} may be")
    return found


def _shows_text(cell: NotebookNode) -> bool:
    return any(output.output_type in {"stream", "execute_result"} for output in cell.outputs)


def images_have_alt_text(root: Path) -> list[str]:
    """Who cannot see a plot or a figure is told what it shows."""
    found = []
    for where, cell in numbered_code(root):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
        if any(_is_image(output) for output in cell.outputs) and not alt:
            found.append(f"{where}: its plot has no alt text (mystnb.image.alt in its metadata)")
    for chapter, notebook in notebooks(root):
        for cell in (c for c in notebook.cells if c.cell_type == "markdown"):
            bare = [match[1] for match in MARKDOWN_IMAGE.finditer(cell.source)]
            bare += [
                match["file"]
                for match in IMAGE_DIRECTIVE.finditer(cell.source + "\n")
                if not re.search(r":alt:[^\S\n]*\S", match["options"])
            ]
            found += [f"{chapter.name}: the image {file} has no alt text" for file in bare]
    return found


def _is_image(output: NotebookNode) -> bool:
    return any(mime.startswith("image/") for mime in output.get("data", {}))


def exercises_are_whole(root: Path) -> list[str]:
    """Each exercise has a label, a solution that can be blanked, and a check that asserts."""
    found = []
    for chapter, notebook in notebooks(root):
        try:
            for exercise in exercises(chapter, notebook):
                for cell in exercise.solutions:
                    blanked(chapter, notebook, cell)
                tree = parse(exercise.check.source, f"{chapter.name}, {exercise.label}")
                if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
                    found.append(f"{chapter.name}: the check of {exercise.label} asserts nothing")
        except BookError as error:
            found.append(str(error))
    return found


def exercises_have_wrong_answers(root: Path) -> list[str]:
    """For each exercise at least three wrong answers are kept, which its check must refuse."""
    found = []
    for chapter, _ in notebooks(root):
        try:
            found += [
                f"{chapter.name}: fewer than three wrong answers to {label} are kept"
                for label in exercises_with_too_few(chapter)
            ]
        except BookError as error:
            found.append(str(error))
    return found


def engine_rooms_are_whole(root: Path) -> list[str]:
    """Each engine room is one section under one line, each lone engine cell under a comment."""
    return [
        f"{chapter.name}: {fault}"
        for chapter, notebook in notebooks(root)
        for fault in engine.faults(notebook)
    ]


def exercises_need_no_engine_room(root: Path) -> list[str]:
    """What an exercise takes for granted is in the main line, or in the exercise's text."""
    found = []
    for chapter, notebook in notebooks(root):
        try:
            found += [f"{chapter.name}: {need}" for need in hidden_needs(chapter, notebook)]
        except BookError as error:
            found.append(str(error))
    return found


# --- the package --------------------------------------------------------------------------------


def modules_are_documented(root: Path) -> list[str]:
    """Each module, public function and public class has a docstring, each function types."""
    found = []
    for where, tree in _modules(root):
        if not ast.get_docstring(tree):
            found.append(
                f"{where} has no docstring: its chapter has no line with > under the title"
            )
        for node in _public_definitions(tree):
            if not ast.get_docstring(node):
                found.append(f"{where}: {node.name} has no docstring")
            methods = _public_definitions(node) if isinstance(node, ast.ClassDef) else [node]
            untyped = [m.name for m in methods if isinstance(m, FUNCTION) and not _is_typed(m)]
            found += [f"{where}: {name} in {node.name} lacks type hints" for name in untyped]
    return found


def _public_definitions(node: ast.Module | ast.ClassDef) -> list[ast.stmt]:
    definitions = [child for child in node.body if isinstance(child, (*FUNCTION, ast.ClassDef))]
    return [d for d in definitions if not d.name.startswith("_") or d.name == "__init__"]


def _is_typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    spec = function.args
    given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    typed = all(p.annotation for p in given if p and p.arg not in {"self", "cls"})
    return typed and (function.returns is not None or function.name == "__init__")


def no_class_only_divides(root: Path) -> list[str]:
    """A private class with one subclass is that class in two pieces; cells can continue a class."""
    found = []
    for where, tree in _modules(root):
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        bases = [_base_name(base) for node in classes for base in node.bases]
        found += [
            f"{where}: {node.name} has one subclass: write that one class in several cells"
            for node in classes
            if node.name.startswith("_") and bases.count(node.name) == 1
        ]
    return found


def _base_name(base: ast.expr) -> str | None:
    """Return the name of a base class, without what it is made for: Base for Base[int]."""
    base = base.value if isinstance(base, ast.Subscript) else base
    return base.id if isinstance(base, ast.Name) else None


def no_private_names_are_borrowed(root: Path) -> list[str]:
    """What several modules need is public: no module uses another's names with an underscore."""
    found = []
    for where, tree in _modules(root):
        ours = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and _is_of_the_package(node):
                origin = ".".join([PACKAGE] * bool(node.level) + [node.module or ""]).strip(".")
                ours |= {alias.asname or alias.name for alias in node.names}
                found += [
                    f"{where} borrows {origin}.{alias.name}"
                    for alias in node.names
                    if alias.name.startswith("_")
                ]
        found += [
            f"{where} borrows {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in ours and PRIVATE.fullmatch(node.attr)
        ]
    return found


def _is_of_the_package(node: ast.ImportFrom) -> bool:
    return bool(node.level) or (node.module or "").split(".")[0] == PACKAGE


def _modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules that chapters make, with what to call them."""
    for chapter in (c for c in chapters(root) if c.module_file.exists()):
        where = f"{PACKAGE}/{chapter.module}.py"
        yield where, parse(read_text(chapter.module_file), where)


# --- environments -------------------------------------------------------------------------------


def requirements_are_pinned(root: Path) -> list[str]:
    """The versions in constraints.txt satisfy pyproject.toml and are those installed here."""
    pins, found = _pins(root), []
    for requirement in _requirements(root):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            found.append(f"{requirement.name} is not pinned in constraints.txt")
        elif pin not in requirement.specifier:
            found.append(f"pyproject.toml wants {requirement}, constraints.txt pins {pin}")
    # The first on the path is the one that is imported; setuptools brings older ones of its own.
    everything = reversed(list(metadata.distributions()))
    installed = {canonicalize_name(d.name): Version(d.version) for d in everything}
    # What is pinned but not installed belongs to other systems; +cpu and the like are builds.
    return found + [
        f"{name} {installed[name]} is installed, constraints.txt pins {pin}"
        for name, pin in pins.items()
        if name in installed and installed[name].public != pin.public
    ]


def _pins(root: Path) -> dict[str, Version]:
    lines = read_text(root / "constraints.txt").splitlines()
    pins = [line.split("#")[0].strip().split("==") for line in lines]
    return {canonicalize_name(pin[0]): Version(pin[1]) for pin in pins if len(pin) == 2}


def _requirements(root: Path) -> list[Requirement]:
    """Return what pyproject.toml asks for on this system, with all extras."""
    project = _project(root)
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    wanted = [r for r in map(Requirement, texts) if not r.marker or r.marker.evaluate()]
    return [r for r in wanted if r.name != project["name"]]


def _project(root: Path) -> dict[str, Any]:
    return tomllib.loads(read_text(root / "pyproject.toml"))["project"]


def conda_agrees_with_pip(root: Path) -> list[str]:
    """environment.yml has a Python that will do, and installs what the Makefile does."""
    found = []
    conda = yaml.safe_load(read_text(root / "environment.yml"))["dependencies"]
    pip = next((entry["pip"] for entry in conda if isinstance(entry, dict)), [])
    made = MAKE_INSTALLS.search(read_text(root / "Makefile"))
    wanted = [f"-c {made[1]}", f"-e {made[2]}"] if made else []
    if pip != wanted:
        found.append(f"environment.yml gives pip {pip}, the Makefile {wanted}")
    versions = [str(entry).removeprefix("python=") for entry in conda if "python=" in entry]
    allowed = SpecifierSet(_project(root)["requires-python"])
    if not versions or versions[0] not in allowed:
        found.append(f"environment.yml has python {versions}, pyproject.toml wants {allowed}")
    return found


CHECKS: list[Check] = [
    files_are_current,
    each_chapter_has_its_companions,
    headers_are_whole,
    tables_are_current,
    links_lead_somewhere,
    imports_follow_the_order,
    cells_are_short,
    outputs_are_clean,
    few_outputs_are_ignored,
    images_have_alt_text,
    exercises_are_whole,
    exercises_have_wrong_answers,
    engine_rooms_are_whole,
    exercises_need_no_engine_room,
    modules_are_documented,
    no_class_only_divides,
    no_private_names_are_borrowed,
    requirements_are_pinned,
    conda_agrees_with_pip,
]


def complaints(check: Check, root: Path) -> list[str]:
    """Run one check; a fault that keeps it from running is a complaint as well."""
    try:
        return check(root)
    except BookError as error:
        return [str(error)]
