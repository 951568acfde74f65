"""The diagrams of chapter 07: inputs and targets, a chain of shards, a ring and its rows."""

from __future__ import annotations

import itertools
import math

from matplotlib.patches import Wedge
from style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SMALL,
    arrow,
    box,
    bracket,
    canvas,
    cells,
    label,
    save,
    tint,
)

SIGN = "◆"


def draw_shift() -> None:
    """A window of the stream, and inputs and targets as two views of it."""
    ax = canvas(720, 218)
    words = [SIGN, "The", "dough", "rises", SIGN, "Bake", "at", "220", SIGN]
    colors = [BLUE] * 4 + [ORANGE] * 4 + [GRAY]
    left, width = 108, 66
    label(ax, 96, 35, "the stream", size=SMALL, align="right")
    cells(ax, left, 22, words, width=width, height=26, color=colors)
    bracket(ax, (left + 4 * width, 16), (left + 2, 16), color=BLUE, depth=5)
    bracket(ax, (left + 8 * width - 2, 16), (left + 4 * width + 4, 16), color=ORANGE, depth=5)
    for y, name, part in ((88, "inputs", words[:-1]), (154, "targets", words[1:])):
        label(ax, 96, y + 13, name, align="right", bold=True)
        cells(ax, left, y, part, width=width, height=26, color=colors[:-1])
    for column in range(8):
        middle = left + (column + 0.5) * width
        arrow(ax, (middle, 114), (middle, 154), color=GRAY)
    label(ax, left + 8 * width + 8, 134, "predict", size=SMALL, color=GRAY, align="left")
    label(ax, left + 2 * width, 200, "first document", size=SMALL, color=BLUE)
    label(ax, left + 6 * width, 200, "second document", size=SMALL, color=ORANGE)
    save(
        ax,
        "batches-shift",
        "Inputs and targets",
        "The stream is: sign, The, dough, rises, sign, Bake, at, 220, sign. Inputs are its first "
        "eight tokens, targets its last eight; each input predicts the target below it. The sign "
        "opens a document as an input and ends it as a target.",
    )


def draw_shard() -> None:
    """Three shards, the header of one in detail, and the chain of digests."""
    ax = canvas(720, 300)
    tops = (20, 118, 216)
    for number, top in enumerate(tops):
        label(ax, 96, top + 4, f"shard-0000{number}.bin", size=SMALL, align="left", mono=True)
        box(ax, 10, top + 14, 80, 44, "header", "96 bytes", color=BLUE, radius=3)
        box(ax, 90, top + 14, 186, 44, "ids", "2 or 4 bytes each", color=GRAY, radius=3)
        box(ax, 276, top + 14, 84, 44, "ends", "8 bytes each", color=GREEN, radius=3)
    for above, below in itertools.pairwise(tops):
        arrow(ax, (50, above + 58), (50, below + 14), color=ORANGE)
        label(ax, 42, (above + below) / 2 + 36, "digest", size=SMALL, color=ORANGE, align="right")
    fields = (
        ("magic number, version", "is this such a file at all?", BLUE),
        ("numbers of tokens and documents", "is it complete?", BLUE),
        ("vocabulary size, end of text, fingerprint", "whose ids are these?", BLUE),
        ("number, whether it is the last", "is a shard missing?", BLUE),
        ("digest of the shard before", "do they belong together?", ORANGE),
        ("digest of this shard", "is every byte as it was?", ORANGE),
        ("checksum of the header", "and the header itself?", BLUE),
    )
    top, height = 44, 32
    for number, (field, question, color) in enumerate(fields):
        box(ax, 404, top + number * height, 306, height, color=color, radius=2)
        y = top + (number + 0.5) * height
        label(ax, 412, y - 6, field, size=SMALL, align="left", bold=True)
        label(ax, 412, y + 7, question, size=SMALL, align="left", italic=True)
    label(ax, 404, 32, "in each header", size=SMALL, align="left", color=GRAY)
    save(
        ax,
        "batches-shard",
        "A set of shards",
        "Three files, each with a header of 96 bytes, token ids, and the ends of documents. The "
        "header has a magic number and version, counts of tokens and documents, vocabulary size, "
        "the id of end of text, the tokenizer's fingerprint, the shard's number and whether it is "
        "the last, the digest of the shard before, its own digest, and a checksum of the header.",
    )


def draw_ring() -> None:
    """The ring of tokens, cut into windows from a random position, and a packed row."""
    ax = canvas(720, 250)
    middle, outer, thick = (150, 128), 104, 26
    sizes = (("A", 3, BLUE), ("B", 6, ORANGE), ("C", 2, GREEN), ("D", 5, PURPLE))
    letters = {"A": 1.0, "B": 1.5, "C": 0.5, "D": 1.5}  # clear of the cuts
    at = 0.0
    for name, size, color in sizes:
        begin, end = -90 + at * 22.5, -90 + (at + size) * 22.5
        wedge = Wedge(
            middle, outer, begin, end, width=thick, facecolor=tint(color), edgecolor=color
        )
        ax.add_patch(wedge)
        half = math.radians(begin + 22.5 * letters[name])
        radius = outer - thick / 2
        label(
            ax,
            middle[0] + radius * math.cos(half),
            middle[1] + radius * math.sin(half),
            name,
            bold=True,
        )
        sign = math.radians(end - 5)
        label(
            ax,
            middle[0] + radius * math.cos(sign),
            middle[1] + radius * math.sin(sign),
            SIGN,
            size=SMALL,
        )
        at += size
    for cut in range(4):
        angle = math.radians(-90 + (2 + 4 * cut) * 22.5)
        ends = [
            (middle[0] + r * math.cos(angle), middle[1] + r * math.sin(angle))
            for r in (outer - thick - 12, outer + 8)
        ]
        ax.plot(*zip(*ends, strict=True), color=INK, linewidth=1.4)
    label(ax, middle[0], middle[1] - 8, "16 tokens", bold=True)
    label(ax, middle[0], middle[1] + 10, "4 windows of 4", size=SMALL)
    label(ax, middle[0], middle[1] + 24, "from a random cut", size=SMALL)
    label(ax, 330, 34, "windows, T = 4", align="left", bold=True)
    colors = {name: color for name, _, color in sizes}
    windows = ("A1 B3", "B3 C1", "C1 D3", "D2 A2")
    packed = ("B6 C2", "D5 A3")
    for left, scale, rows in ((330, 38, windows), (530, 22, packed)):
        for number, row in enumerate(rows):
            x = float(left)
            for part in row.split():
                color, width = colors[part[0]], scale * int(part[1])
                box(ax, x, 48 + 28 * number, width, 24, part[0], color=color, radius=2)
                x += width
    label(ax, 530, 34, "packed rows, T = 8", align="left", bold=True)
    label(ax, 330, 178, "cuts fall anywhere, no padding", size=SMALL, align="left", color=GRAY)
    label(ax, 530, 122, "documents are whole,", size=SMALL, align="left", color=GRAY)
    label(ax, 530, 136, "padding where none fits", size=SMALL, align="left", color=GRAY)
    save(
        ax,
        "batches-ring",
        "A ring of tokens, cut into windows or packed into rows",
        "Sixteen tokens in four documents A, B, C and D of 3, 6, 2 and 5 tokens are closed to a "
        "ring. Cut from a random place on into four windows of four, all documents are cut. Packed "
        "into two rows of eight, B with C and D with A, every document stays whole.",
    )
