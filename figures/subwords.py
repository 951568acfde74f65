"""The diagrams of chapter 06: three ways to a vocabulary, and the lattice of a word."""

from __future__ import annotations

from style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    SMALL,
    arrow,
    box,
    bracket,
    canvas,
    label,
    save,
)

WORD = "unlocked"
STEP, LEFT, LINE = 78, 48, 132  # between places, of the first place, and their height


def draw_lattice() -> None:
    """Every piece an arc, every segmentation a path."""
    ax = canvas(720, 252)
    x = [LEFT + STEP * place for place in range(len(WORD) + 1)]
    for i, letter in enumerate(WORD):
        arrow(ax, (x[i] + 4, LINE), (x[i + 1] - 4, LINE), color=GRAY, width=0.9)
        label(ax, (x[i] + x[i + 1]) / 2, LINE + 13, letter, mono=True)
    arcs = (
        ("un 0.1", 0, 2, 0.26, BLUE),
        ("lock 0.1", 2, 6, 0.2, GRAY),
        ("ed 0.1", 6, 8, 0.26, GRAY),
        ("unlock 0.015", 0, 6, 0.42, GRAY),
        ("locked 0.02", 2, 8, 0.42, BLUE),
    )
    for text, start, end, bend, color in arcs:
        first, last = (x[start], LINE - 6), (x[end], LINE - 6)
        arrow(ax, first, last, bend=bend, color=color, width=2 if color == BLUE else 1.1)
        middle = (first[0] + last[0]) / 2
        height = LINE - 15 - bend * (last[0] - first[0]) / 2
        label(ax, middle, height, text, size=SMALL, color=color if color == BLUE else INK)
    for place, where in enumerate(x):
        ax.plot(where, LINE, "o", color=INK, markersize=7, zorder=3)
        label(ax, where, LINE + 24, str(place), size=SMALL, color=GRAY)
    bracket(ax, (x[0], 170), (x[2], 170), "all paths to 2: sum α", color=ORANGE)
    bracket(ax, (x[2] + 8, 170), (x[6] - 8, 170), "the arc: q(lock)", color=GREEN)
    bracket(ax, (x[6], 170), (x[8], 170), "all paths from 6: sum β", color=ORANGE)
    label(
        ax,
        360,
        228,
        "probability that lock is used = α at 2, times q(lock), times β at 6, over the sum of all",
        size=SMALL,
    )
    save(
        ax,
        "subwords-lattice",
        "The lattice of a word",
        "Nine places in a row, numbered 0 to 8, around the eight letters of unlocked. Arrows "
        "between neighbors are single letters. Arcs are the pieces un, lock, ed, unlock and locked "
        "with their probabilities. The path un, locked is the best. Brackets show how the "
        "posterior of lock is the sum over paths to place 2, times the piece, times the "
        "sum over paths from 6.",
    )


def draw_families() -> None:
    """Growing by merges, shrinking by pruning; and how each encodes."""
    ax = canvas(720, 240)
    columns = ((128, "starts from"), (330, "trains by"), (532, "encodes by"))
    for left, name in columns:
        label(ax, left + 90, 14, name, size=SMALL, color=GRAY)
    rows = (
        (
            "BPE",
            GRAY,
            "bytes",
            "joining the pair\nthat is most frequent",
            "replaying the joins\nin the order learned",
        ),
        (
            "WordPiece",
            ORANGE,
            "characters",
            "joining the pair that\nraises likelihood most",
            "the longest match,\nfrom left to right",
        ),
        (
            "Unigram",
            BLUE,
            "all frequent strings",
            "dropping the pieces\nthat are missed least",
            "the best path\nthrough all cuts",
        ),
    )
    for number, (name, color, start, train, encode) in enumerate(rows):
        y = 28 + 74 * number
        label(ax, 8, y + 20, name, align="left", bold=True, color=color)
        way = "many to few" if name == "Unigram" else "few to many"
        label(ax, 8, y + 38, way, align="left", size=SMALL, color=GRAY)
        shapes = [
            box(ax, left, y, 180, 56, note=text, color=color, paper=PAPER)
            for (left, _), text in zip(columns, (start, train, encode), strict=True)
        ]
        arrow(ax, shapes[0].right, shapes[1].left, color=color)
        arrow(ax, shapes[1].right, shapes[2].left, color=color)
    save(
        ax,
        "subwords-families",
        "Three ways to a vocabulary",
        "BPE starts from bytes, joins the most frequent pair, and encodes by replaying the joins. "
        "WordPiece starts from characters, joins the pair that raises the likelihood most, and "
        "encodes by the longest match. Unigram starts from all frequent strings, drops the pieces "
        "that are missed least, and encodes by the best path through all cuts.",
    )
