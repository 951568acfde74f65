"""Engine rooms on the site: sections and cells that are folded behind one line.

A section whose title begins with "Engine room: " becomes a ``<details>`` whose summary is that
title; so does a lone code cell tagged ``engine``, under the comment that it begins with. Numbers,
links and the search know nothing of it: the section stays a section, and its title a heading.
``engine_rooms.js`` does what a fold cannot do by itself: open for a link, and with all others.
"""

from __future__ import annotations

import html
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from engine import TAG, TITLE, comment
from nbformat.v4 import new_code_cell
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.typing import ExtensionMetadata

LABEL = TITLE.strip(": ")
SCRIPT = Path(__file__).with_suffix(".js")
# Hidden until the script can make it work; the words are the script's, and these say the most.
OPENER = """\
<div class="engine-opener" hidden><button type="button">\
Open all engine rooms</button> <span></span></div>
"""


class LabelRooms(SphinxTransform):
    """Set "Engine room" before a title apart from what is inside, on the page and in contents."""

    default_priority = 870  # Sphinx notes titles at 880

    def apply(self, **kwargs: Any) -> None:
        """Label the titles of the page."""
        for section in self.document.findall(nodes.section):
            title = section.next_node(nodes.title)
            if title is not None and title.astext().startswith(TITLE):
                _label(title)
                section["classes"].append("engine-room")


def _label(title: nodes.title) -> None:
    """Put label and colon into elements of their own; what follows begins with a capital."""
    text = title[0]
    rest = text.astext().removeprefix(TITLE)
    title.remove(text)
    title.insert(0, nodes.inline("", LABEL, classes=["engine-label"]))
    title.insert(1, nodes.inline("", ": ", classes=["engine-colon"]))
    title.insert(2, nodes.Text(rest[:1].upper() + rest[1:]))


class FoldRooms(SphinxPostTransform):
    """Fold rooms and lone engine cells, and offer to open them all."""

    default_priority = 195  # after what marks cells as hidden, before myst-nb hides them
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Fold what is to be folded on the page."""
        rooms = [s for s in self.document.findall(nodes.section) if "engine-room" in s["classes"]]
        lone = [cell for cell in self.document.findall(nodes.container) if _is_lone(cell)]
        for room in rooms:
            title, *content = room.children
            room.children = [*_details([title], "engine"), *content, _raw("</div></details>")]
        for cell in lone:
            says = comment(new_code_cell(cell.astext())) or "what only the package needs"
            label = f'<span class="engine-label">{LABEL}</span>'
            colon = '<span class="engine-colon">: </span>'
            line = _raw(f'<span class="engine-line">{label}{colon}{html.escape(says)}</span>')
            cell.children = [
                *_details([line], "engine engine-lone"),
                *cell.children,
                _raw("</div></details>"),
            ]
        if rooms or lone:
            _offer_to_open(self.document)


def _is_lone(cell: nodes.container) -> bool:
    """Whether this is an engine cell outside a room."""
    if cell.get("nb_element") != "cell_code" or f"tag_{TAG}" not in cell["classes"]:
        return False
    above = cell.parent
    while above is not None and "engine-room" not in above.get("classes", []):
        above = above.parent
    return above is None


def _details(summary: list[nodes.Node], classes: str) -> list[nodes.Node]:
    opened = _raw(f'<details class="{classes}"><summary>')
    return [opened, *summary, _raw('</summary><div class="engine-body">')]


def _raw(text: str) -> nodes.raw:
    return nodes.raw("", f"{text}\n", format="html")


def _offer_to_open(document: nodes.document) -> None:
    """Put the button below the table under the chapter's title, or before the first section."""
    chapter = next(iter(document.findall(nodes.section)), document)
    for place, child in enumerate(chapter.children):
        if isinstance(child, nodes.table):
            chapter.insert(place + 1, _raw(OPENER))
            return
        if isinstance(child, nodes.section):
            chapter.insert(place, _raw(OPENER))
            return
    chapter.append(_raw(OPENER))


def copy_script(app: Sphinx) -> None:
    """Copy the script into the site.

    Not by way of ``_static/``: Jupyter Book 1 adds every script it finds there to every page.
    """
    if app.builder.format == "html":
        folder = Path(app.outdir, "_static")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SCRIPT, folder / SCRIPT.name)


def add_script(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Add the script to pages that have something folded."""
    if '<details class="' in context.get("body", ""):
        app.add_js_file(SCRIPT.name, loading_method="defer")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register all of it."""
    app.connect("builder-inited", copy_script)
    app.connect("html-page-context", add_script)
    app.add_transform(LabelRooms)
    app.add_post_transform(FoldRooms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
