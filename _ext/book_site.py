"""What this book asks of Sphinx beyond its configuration.

- Pages load nothing from a network: MathJax is copied into the site, Thebe's leftovers are dropped.
- A chapter shows its number: before its title, and in the numbers of its figures, equations and
  exercises, which count from one in each chapter (Figure 2.1 is the first of chapter 02).
- Cells tagged ``solution`` and ``check`` are folded under these words, and engine rooms under a
  line of their own (``engine_rooms.py``).
- Every page of the package reference says which chapter develops the module and which use it, and
  every name on it leads to its cell (``cell_links.py``).
- Exercises have ids of their own, classes name their bases, named tuples have no empty fields.
"""

from __future__ import annotations

import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.typing import ExtensionMetadata

ROOT = Path(__file__).resolve().parent.parent
# The package that is documented is the one in this tree, wherever another is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from book import PACKAGE, Chapter, chapters  # noqa: E402  (after the path that it is found on)

CHAPTER_PAGE = re.compile(r"chapters/(\d\d)_\w+")

# What a page can ask of MathJax; the whole is seven times as large.
MATHJAX = ("tex-svg.js", "input/tex/extensions", "a11y", "sre/mathmaps")
MATHJAX_MAPS = ("base.json", "en.json")


def chapter_number(page: str) -> str | None:
    """The two digits of a chapter's page, None for other pages."""
    match = CHAPTER_PAGE.fullmatch(page)
    return match and match[1]


def copy_mathjax(app: Sphinx) -> None:
    """Copy MathJax from its wheel into the site.

    Not by way of ``_static/``: Jupyter Book 1 adds every script it finds there to every page.
    """
    spec = find_spec("sphinx-mathjax-offline")
    if app.builder.format != "html" or spec is None or not spec.submodule_search_locations:
        return
    source = Path(next(iter(spec.submodule_search_locations)), "static", "mathjax")
    target = Path(app.outdir, "_static", "mathjax")
    for name in MATHJAX:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(
                source / name, target / name, ignore=_other_languages, dirs_exist_ok=True
            )
        else:
            shutil.copyfile(source / name, target / name)


def _other_languages(folder: str, names: list[str]) -> set[str]:
    """The speech rules of languages other than the book's."""
    return set(names) - set(MATHJAX_MAPS) if folder.endswith("mathmaps") else set()


def drop_thebe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Drop the scripts of Thebe, which would load from a CDN; the theme adds them even unused."""
    scripts = context.get("script_files", [])
    scripts[:] = [script for script in scripts if not _is_thebe(script)]


def _is_thebe(script: Any) -> bool:
    body = (getattr(script, "attributes", None) or {}).get("body", "")
    name = getattr(script, "filename", None) or script
    return "THEBE_JS_URL" in str(body) or "sphinx-thebe" in str(name)


class NumberTitle(SphinxTransform):
    """Put a chapter's number before its title.

    Sphinx's own section numbers start at one, and the first chapter is 00.
    """

    default_priority = 870  # Sphinx notes titles at 880

    def apply(self, **kwargs: Any) -> None:
        """Number the first title of the page."""
        number = chapter_number(self.env.docname)
        title = next(self.document.findall(nodes.title), None)
        if number and title is not None:
            title.insert(0, nodes.inline("", number, classes=["chapter-number"]))
            title.insert(1, nodes.Text(" "))


class TellExercisesApart(SphinxTransform):
    """Give the contents of each exercise an id of its own; sphinx-exercise gives all the same."""

    default_priority = 870

    def apply(self, **kwargs: Any) -> None:
        """Number them within the page."""
        sections = self.document.findall(nodes.section)
        alike = [section for section in sections if section["ids"] == ["exercise-content"]]
        for number, section in enumerate(alike, start=1):
            section["ids"] = [f"exercise-content-{number}"]


def restore_numbers(app: Sphinx, env: BuildEnvironment, pages: list[str]) -> None:
    """Give Sphinx back the numbers it gave last time: pages whose numbers changed are rewritten."""
    env.toc_fignumbers = getattr(env, "book_fignumbers", env.toc_fignumbers)


def number_by_chapter(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Number figures, tables, equations and exercises within their chapter: 1.1, 1.2, and so on.

    The list is of further pages to rewrite: none, for Sphinx has found them by its own numbers.
    """
    env.book_fignumbers = env.toc_fignumbers
    env.toc_fignumbers = {
        page: {kind: _within(page, numbers) for kind, numbers in kinds.items()}
        for page, kinds in env.toc_fignumbers.items()
    }
    return []


def _within(page: str, numbers: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Count from one, after the chapter's number where the page is a chapter."""
    number = chapter_number(page)
    first = (int(number),) if number else ()
    in_order = sorted(numbers, key=lambda name: numbers[name])
    return {name: (*first, place) for place, name in enumerate(in_order, start=1)}


PROMPTS = {"tag_solution": "Solution", "tag_check": "Check"}


class FoldAnswers(SphinxPostTransform):
    """Fold cells tagged ``solution`` and ``check``, as myst-nb folds those tagged ``hide-cell``."""

    default_priority = 190  # before myst-nb's HideInputCells
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Mark the cells to fold, with the word to show."""
        for cell in self.document.findall(nodes.container):
            for tag, prompt in PROMPTS.items():
                if cell.get("nb_element") == "cell_code" and tag in cell["classes"]:
                    cell["hide_mode"] = "all"
                    cell["prompt_show"] = cell["prompt_hide"] = prompt


def name_chapters(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Say at the end of a module's docstring where it comes from and where it goes."""
    module = name.removeprefix(f"{PACKAGE}.")
    if what != "module" or module == name:
        return
    book = chapters(ROOT)
    for chapter in book:
        app.env.note_dependency(str(chapter.script))
    origin = [chapter for chapter in book if chapter.module == module]
    users = [chapter for chapter in book if module in chapter.imports and chapter not in origin]
    lines += ["", f"| **Developed in** {_links(origin) or 'no chapter'}"]
    lines += [f"| **Used by** {_links(users) or 'no chapter yet'}", ""]


def _links(found: list[Chapter]) -> str:
    return ", ".join(f":doc:`/chapters/{chapter.name}`" for chapter in found)


def name_bases(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Say at the end of a class's docstring which of our public classes it inherits from."""
    bases = [
        base
        for base in getattr(thing, "__bases__", ())
        if base.__module__.startswith(PACKAGE) and not base.__name__.startswith("_")
    ]
    if what == "class" and bases:
        links = ", ".join(f":py:class:`~{base.__module__}.{base.__qualname__}`" for base in bases)
        lines += ["", f"Inherits from {links}.", ""]


def name_defaults(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Write the defaults of data classes so that Sphinx can parse them, and constants by name."""
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    if what != "class" or not signature or module is None:
        return None
    signature = signature.replace("<factory>", "...")
    for constant, value in vars(module).items():
        if constant.isupper() and isinstance(value, str):
            signature = signature.replace(f"= {value!r}", f"= {constant}")
    return signature, returns


def skip_fields(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Skip the fields of named tuples, whose docstrings only count them; the signature has them."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field") else None


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register all of it."""
    app.setup_extension("engine_rooms")
    app.setup_extension("cell_links")
    app.connect("builder-inited", copy_mathjax)
    app.connect("html-page-context", drop_thebe, priority=900)  # after they were added
    app.add_transform(NumberTitle)
    app.add_transform(TellExercisesApart)
    app.connect("env-before-read-docs", restore_numbers)
    app.connect("env-get-updated", number_by_chapter, priority=900)  # after Sphinx numbered
    app.add_post_transform(FoldAnswers)
    app.connect("autodoc-process-docstring", name_chapters)
    app.connect("autodoc-process-docstring", name_bases)
    app.connect("autodoc-process-signature", name_defaults)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
