"""Links from a name in the package's reference to the cell that develops it.

Each exported cell of a chapter has an anchor for every name that it defines: ``def-Trainer``, and
``def-Trainer.save`` where a class is written in several cells. The reference has a link to it after
the signature, beside the one to the source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import Any

from book import PACKAGE, BookError, parse
from docutils import nodes
from engine import is_exported
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata

CHAPTER_PAGE = re.compile(r"chapters/(\d\d)_(\w+)")
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def defined(source: str) -> Iterator[str]:
    """Yield the names that a cell defines: functions, classes, their methods, and constants.

    >>> list(defined("LIMIT = 3\\nclass A:\\n    def f(self): ..."))
    ['LIMIT', 'A', 'A.f']
    """
    for node in parse(source, "an exported cell").body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, DEFINITION) and not _goes_on(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{m.name}" for m in node.body if isinstance(m, DEFINITION))


def _goes_on(node: ast.stmt) -> bool:
    """Whether this is a further part of a class: ``class Trainer(Trainer)``."""
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return any(isinstance(base, ast.Name) and base.id == node.name for base in bases)


def definitions(env: BuildEnvironment) -> dict[str, set[str]]:
    """Return the names that each page has anchors for."""
    if not hasattr(env, "book_definitions"):
        env.book_definitions = {}
    return env.book_definitions


class AnchorDefinitions(SphinxTransform):
    """Give exported cells the anchors of what they define."""

    default_priority = 870

    def apply(self, **kwargs: Any) -> None:
        """Anchor each name at the last version of what it means, a class where it begins."""
        cells: dict[str, nodes.container] = {}
        for cell in self.document.findall(nodes.container):
            if cell.get("nb_element") != "cell_code" or not is_exported(cell.astext()):
                continue
            try:
                names = list(defined(cell.children[0].astext()))
            except BookError:  # which the checks report; here it only has no anchors
                continue
            cells |= {name: cell for name in names if not re.search(r"(^|\.)_", name)}
        for name, cell in cells.items():
            cell["ids"].append(f"def-{name}")
        definitions(self.env)[self.env.docname] = set(cells)


class LinkToCells(SphinxPostTransform):
    """Add a link to the cell to each signature in the reference."""

    default_priority = 110  # after the link to the source
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Add the links of a page."""
        known = definitions(self.env)
        matches = filter(None, map(CHAPTER_PAGE.fullmatch, known))
        pages = {f"{PACKAGE}.{match[2]}": match for match in matches}
        for signature in self.document.findall(addnodes.desc_signature):
            page, name = pages.get(signature.get("module")), signature.get("fullname")
            if page and name in known[page[0]]:
                word = f"[chapter {page[1]}]"
                text = nodes.inline("", word, classes=["viewcode-link", "cell-link"])
                origin = self.env.docname
                link = make_refnode(self.app.builder, origin, page[0], f"def-{name}", text)
                signature += link


def forget(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    """Forget the names of a page that is read again."""
    definitions(env).pop(page, None)


def merge(app: Sphinx, env: BuildEnvironment, pages: Iterable[str], other: Any) -> None:
    """Take over what another process has read."""
    found = definitions(other)
    definitions(env).update({page: found[page] for page in pages if page in found})


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register all of it."""
    app.add_transform(AnchorDefinitions)
    app.add_post_transform(LinkToCells)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 1}
