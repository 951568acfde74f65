"""The diagrams of chapter 04: MinHash under random orders, and signatures cut into bands."""

from __future__ import annotations

from style import (
    BLUE,
    FAINT,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SMALL,
    arrow,
    box,
    cells,
    label,
    save,
)
from style import canvas as paper

ONLY_A, ONLY_B, BOTH, NEITHER = "abc", "gh", "def", "ij"
ORDERS = ("edabgicjhf", "bjhfaecdgi", "ifhcegabdj")


def color_of(letter: str) -> str:
    """The color of a shingle: by the set or sets that have it."""
    for letters, color in ((ONLY_A, BLUE), (ONLY_B, ORANGE), (BOTH, GREEN)):
        if letter in letters:
            return color
    return FAINT


def draw_minhash() -> None:
    """Three orders of ten shingles; the first of those that occur is the minimum."""
    ax = paper(720, 218)
    x = 8
    for name, letters, color in (
        ("only in A", ONLY_A, BLUE),
        ("in A and B", BOTH, GREEN),
        ("only in B", ONLY_B, ORANGE),
        ("in neither", NEITHER, GRAY),
    ):
        label(ax, x, 16, name, size=SMALL, align="left", color=color)
        row = cells(
            ax,
            x,
            26,
            list(letters),
            width=24,
            color=[color_of(letter) for letter in letters],
        )
        x = row[-1].right[0] + 38
    label(ax, x + 6, 37, "J = 3 / 8", align="left", bold=True)
    for i, order in enumerate(ORDERS):
        y = 84 + 46 * i
        label(ax, 8, y + 11, f"order {i + 1}", align="left")
        row = cells(ax, 70, y, list(order), width=30, color=[color_of(letter) for letter in order])
        occurring = [letter for letter in order if letter not in NEITHER]
        in_a = next(letter for letter in order if letter in ONLY_A + BOTH)
        in_b = next(letter for letter in order if letter in ONLY_B + BOTH)
        first = row[order.index(occurring[0])]
        ax.add_patch(
            type(ax.patches[0])(
                (first.x, first.y),
                first.width,
                first.height,
                boxstyle="round,pad=0,rounding_size=2",
                fill=False,
                edgecolor=INK,
                linewidth=2.2,
            )
        )
        label(ax, 400, y + 11, f"A reports {in_a}", align="left", color=INK)
        label(ax, 494, y + 11, f"B reports {in_b}", align="left", color=INK)
        equal = in_a == in_b
        box(
            ax,
            600,
            y,
            108,
            22,
            "agree" if equal else "differ",
            color=GREEN if equal else GRAY,
            solid=equal,
            size=SMALL,
        )
    arrow(ax, (70, 74), (370, 74), color=GRAY, width=1)
    label(ax, 378, 74, "from first to last", size=SMALL, align="left", color=GRAY)
    save(
        ax,
        "deduplication-minhash",
        "MinHash under three random orders",
        "Ten shingles: a, b, c only in A; d, e, f in both; g, h only in B; i, j in neither. In "
        "order 1 the first is e, which both report. In order 2 it is b, which only A has; B "
        "reports h. In order 3 the first that occurs is f, which both report.",
    )


SIGNATURES = {
    "A": "31 7 52 8 19 4 66 23 90 12 5 47",
    "B": "31 9 52 2 19 4 70 23 11 12 6 40",
    "C": "18 7 33 8 19 4 66 25 90 13 5 41",
    "D": "50 1 28 6 77 4 15 39 62 12 8 47",
}


def draw_bands() -> None:
    """Four signatures in four bands of three rows; one bucket holds two documents."""
    ax = paper(720, 330)
    columns = {name: numbers.split() for name, numbers in SIGNATURES.items()}
    for j, name in enumerate(columns):
        label(ax, 122 + 52 * j, 16, name, bold=True)
    for i in range(12):
        band = i // 3
        y = 30 + 22 * i + 8 * band
        for j, name in enumerate(columns):
            meets = band == 1 and name in "AC"
            cells(
                ax,
                100 + 52 * j,
                y,
                [columns[name][i]],
                width=44,
                height=20,
                color=GREEN if meets else GRAY,
                size=SMALL,
            )
    for band in range(4):
        y = 30 + 74 * band
        label(ax, 8, y + 31, f"band {band + 1}", align="left")
        label(ax, 8, y + 45, "3 rows", size=SMALL, align="left", color=GRAY)
        arrow(ax, (306, y + 31), (368, y + 31), color=GRAY, width=1)
        buckets: dict[tuple[str, ...], str] = {}
        for name, numbers in columns.items():
            key = tuple(numbers[3 * band : 3 * band + 3])
            buckets[key] = buckets.get(key, "") + name
        x = 376.0
        for names in buckets.values():
            shared = len(names) > 1
            shape = box(
                ax,
                x,
                y + 14,
                34 if not shared else 60,
                34,
                "  ".join(names),
                color=GREEN if shared else PURPLE,
                solid=shared,
            )
            x = shape.right[0] + 10
        if band == 1:
            arrow(ax, (x + 2, y + 31), (590, y + 31), color=GREEN)
            box(ax, 594, y + 8, 118, 46, "candidates", "A and C", color=GREEN)
    label(ax, 306, 16, "hash of the band", size=SMALL, align="left", color=GRAY)
    label(ax, 424, 16, "buckets", size=SMALL, align="left", color=GRAY)
    save(
        ax,
        "deduplication-bands",
        "Signatures in bands",
        "The signatures of documents A, B, C and D, twelve numbers each, in four bands of three "
        "rows. In band 2, A and C hold 8, 19, 4 and share a bucket: they are candidates. All other "
        "buckets hold one document, though single rows agree in many places.",
    )
