"""The diagrams of chapter 02: readers and their one result, and a web page in blocks."""

from __future__ import annotations

import itertools

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, arrow, box, canvas, label, save


def draw_readers() -> None:
    """Several sources, one kind of document, one report."""
    ax = canvas(720, 250)
    sources = (
        (8, "installed packages", "docstrings, comments,\nREADMEs", "read_installed_docs"),
        (90, "your files", "text, Markdown, HTML,\nJSON Lines, Parquet", "read_files"),
        (172, "a hub, a crawl", "data sets by name,\npages", "stream_hub"),
    )
    document = box(
        ax, 410, 62, 130, 90, "Document", "text\nid, source\nmetadata", color=BLUE, mono=True
    )
    report = box(ax, 410, 190, 130, 48, "ReadReport", "problems", color=ORANGE, mono=True)
    meeting = (360, document.left[1])
    for y, name, note, reader in sources:
        source = box(ax, 8, y, 150, 66, name, note, color=GRAY)
        right = source.right
        label(ax, 262, right[1] - 8, reader, size=SMALL, mono=True)
        arrow(ax, right, (meeting[0], right[1]), meeting, document.left)
    arrow(
        ax,
        (345, 205),
        (345, report.left[1]),
        report.left,
        color=ORANGE,
        dashed=True,
    )
    label(ax, 378, 228, "file:line", size=SMALL, color=ORANGE)
    stages = (
        (20, "cleaning", "chapter 03"),
        (86, "deduplication", "chapter 04"),
        (152, "tokenizer", "chapter 05"),
    )
    boxes = [box(ax, 602, y, 110, 46, name, note, color=GREEN) for y, name, note in stages]
    arrow(ax, document.right, (571, document.right[1]), (571, boxes[0].left[1]), boxes[0].left)
    for above, below in itertools.pairwise(boxes):
        arrow(ax, above.bottom, below.top)
    save(
        ax,
        "corpus-readers",
        "From several sources to one stream of documents",
        "Installed packages, files, and a hub or crawl are read by read_installed_docs, read_files "
        "and stream_hub. All give documents with text, id, source and metadata, which go on to "
        "cleaning, deduplication and the tokenizer. What cannot be read is noted in a report.",
    )


def draw_page() -> None:
    """A page as blocks, with the linked share of each."""
    ax = canvas(720, 300)
    box(ax, 8, 8, 440, 284, paper="#FFFFFF", color=GRAY, radius=8)
    blocks = (
        (18, 24, 420, 30, "menu", 100, GRAY),
        (18, 56, 420, 30, "cookie banner", 25, ORANGE),
        (18, 94, 290, 26, "headline", 0, BLUE),
        (18, 124, 290, 30, "paragraph", 0, BLUE),
        (18, 158, 290, 30, "paragraph with a link", 12, BLUE),
        (18, 192, 290, 26, "preformatted lines", 0, BLUE),
        (18, 222, 290, 30, "paragraph", 0, BLUE),
        (316, 94, 122, 158, "suggestions", 100, GRAY),
        (18, 258, 420, 26, "footer", 45, GRAY),
    )
    for x, y, width, height, name, share, color in blocks:
        shape = box(ax, x, y + (0 if y > 24 else -6), width, height, color=color, radius=3)
        middle = shape.center[1]
        if name == "suggestions":
            label(ax, *shape.center, f"{name}\n\n{share} %", size=SMALL)
            continue
        label(ax, x + 10, middle, name, size=SMALL, align="left")
        label(ax, x + width - 10, middle, f"{share} %", size=SMALL, align="right")
    document = box(ax, 560, 126, 150, 94, "Document", "long blocks,\nhardly linked", color=BLUE)
    arrow(ax, (448, 173), document.left, text="main content", color=BLUE)
    label(ax, 560, 30, "% of a block's characters", size=SMALL, align="left", color=GRAY)
    label(ax, 560, 44, "that are inside links", size=SMALL, align="left", color=GRAY)
    label(ax, 560, 262, "long, few links, not content:", size=SMALL, align="left", color=ORANGE)
    label(ax, 560, 276, "the simple rule is fooled", size=SMALL, align="left", color=ORANGE)
    save(
        ax,
        "corpus-page",
        "A web page in blocks",
        "Menu and suggestions are 100 percent linked, the footer 45, a cookie banner 25; headline, "
        "paragraphs and preformatted lines are 0 to 12 percent linked and are the main content.",
    )
