"""The diagrams of chapter 08: lookup, the rotation of a pair, two layouts, position ids."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.patches import Arc, Circle
from style import (
    BLUE,
    FAINT,
    GRAY,
    GREEN,
    INK,
    OCHRE,
    ORANGE,
    PURPLE,
    SMALL,
    Point,
    arrow,
    bracket,
    canvas,
    cells,
    label,
    save,
)


def draw_lookup() -> None:
    """Three one-hot rows times a table of five rows are three rows of the table."""
    ax = canvas(720, 210)
    ids, colors = (3, 0, 3), {0: BLUE, 3: ORANGE}
    size, top = 26, 66
    label(ax, 45, 30, "ids", bold=True)
    label(ax, 175, 30, "one-hot rows", bold=True)
    label(ax, 405, 30, "table $E$", bold=True)
    label(ax, 615, 30, "rows looked up", bold=True)
    for row, token in enumerate(ids):
        y = top + row * (size + 4)
        cells(ax, 30, y, [str(token)], width=30, height=size, color=colors[token])
        hot = ["1" if place == token else "0" for place in range(5)]
        tints = [colors[token] if place == token else FAINT for place in range(5)]
        cells(ax, 110, y, hot, width=size, height=size, color=tints)
        cells(ax, 560, y, [""] * 4, width=size, height=size, color=colors[token])
        label(ax, 674, y + size / 2, f"$E_{token}$", align="left", color=colors[token])
    arrow(ax, (66, top + 43), (104, top + 43))
    label(ax, 286, top + 43, "×", size=16)
    label(ax, 522, top + 43, "=", size=16)
    for row in range(5):
        y = 48 + row * size
        color = colors.get(row, GRAY)
        cells(ax, 350, y, [""] * 4, width=size, height=size, color=color)
        label(ax, 338, y + size / 2, str(row), align="right", size=SMALL, color=color, mono=True)
    label(ax, 175, 178, "3 × 5", size=SMALL, color=GRAY)
    label(ax, 402, 194, "5 × 4", size=SMALL, color=GRAY)
    label(ax, 612, 178, "3 × 4", size=SMALL, color=GRAY)
    save(
        ax,
        "positions-lookup",
        "Looking up rows is a matrix product",
        "The ids 3, 0 and 3 as one-hot rows of five places, times a table of five rows and four "
        "columns, give row 3, row 0 and row 3 of the table.",
    )


def _ray(ax: Axes, middle: Point, degrees: float, radius: float, name: str, color: str) -> None:
    """An arrow from the middle, counterclockwise by so many degrees, with a name at its end."""
    angle = math.radians(degrees)
    end = middle[0] + radius * math.cos(angle), middle[1] - radius * math.sin(angle)
    arrow(ax, middle, end, color=color, width=1.8, gap=0)
    away = radius + 14
    label(
        ax,
        middle[0] + away * math.cos(angle),
        middle[1] - away * math.sin(angle),
        name,
        color=color,
        bold=True,
    )


def draw_rotation() -> None:
    """A query and a key at positions (0, 0), (3, 1) and (6, 4)."""
    ax = canvas(720, 262)
    step, q_at, k_at, radius = 32.0, 20.0, 62.0, 82.0
    panels = ((120, 0, 0), (360, 3, 1), (600, 6, 4))
    for x, m, n in panels:
        middle = (float(x), 138.0)
        ax.add_patch(Circle(middle, radius, fill=False, edgecolor=FAINT, linewidth=1.4))
        ax.add_patch(Circle(middle, 2, color=INK))
        for start, turns, color, size in ((q_at, m, BLUE, 60), (k_at, n, ORANGE, 84)):
            if turns:
                first, last = start, start + turns * step
                ax.add_patch(
                    Arc(middle, size, size, theta1=-last, theta2=-first, color=color, linewidth=1.3)
                )
                ghost = math.radians(start)
                ends = [
                    (middle[0] + r * math.cos(ghost), middle[1] - r * math.sin(ghost))
                    for r in (4, radius)
                ]
                ax.plot(*zip(*ends, strict=True), color=color, linewidth=0.9, linestyle=(0, (2, 2)))
        q_now, k_now = q_at + m * step, k_at + n * step
        ax.add_patch(
            Arc(
                middle,
                116,
                116,
                theta1=-max(q_now, k_now),
                theta2=-min(q_now, k_now),
                color=GREEN,
                linewidth=3,
            )
        )
        _ray(ax, middle, q_now, radius, "q", BLUE)
        _ray(ax, middle, k_now, radius, "k", ORANGE)
        label(ax, x, 18, f"m = {m},  n = {n}", bold=True)
    label(ax, 120, 250, "angle from k to q: α", size=SMALL, color=GREEN)
    label(ax, 360, 250, "turned by 3ω and ω: α + 2ω", size=SMALL, color=GREEN)
    label(ax, 600, 250, "turned by 6ω and 4ω: α + 2ω", size=SMALL, color=GREEN)
    save(
        ax,
        "positions-rotation",
        "The angle between query and key depends on the difference of positions",
        "Three planes with a query and a key. At positions 0 and 0 the angle from key to query is "
        "alpha, at 3 and 1 it has changed by 2 omega, and at 6 and 4 it is the same as at 3 and 1, "
        "though both have turned further.",
    )


def draw_layouts() -> None:
    """Eight dimensions interleaved and in halves, with the permutation between."""
    ax = canvas(720, 232)
    colors = (BLUE, ORANGE, GREEN, PURPLE)
    left, width, height, upper, lower = 150.0, 66.0, 30.0, 52.0, 150.0
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    label(ax, 136, upper + 9, "interleaved", align="right", bold=True)
    label(ax, 136, upper + 24, "paper, Meta", align="right", size=SMALL, color=GRAY)
    label(ax, 136, lower + 9, "half-split", align="right", bold=True)
    label(ax, 136, lower + 24, "Hugging Face", align="right", size=SMALL, color=GRAY)
    names = [f"$x_{i}$" for i in range(8)]
    cells(
        ax,
        left,
        upper,
        names,
        width=width,
        height=height,
        color=[colors[i // 2] for i in range(8)],
        mono=False,
    )
    cells(
        ax,
        left,
        lower,
        [names[i] for i in order],
        width=width,
        height=height,
        color=[colors[i // 2] for i in order],
        mono=False,
    )
    for place, i in enumerate(order):
        start = left + (i + 0.5) * width, upper + height
        end = left + (place + 0.5) * width, lower
        arrow(ax, start, end, color=colors[i // 2])
    for pair in range(4):
        x = left + 2 * pair * width
        bracket(
            ax,
            (x + 1.6 * width, upper - 5),
            (x + 0.4 * width, upper - 5),
            f"pair {pair}",
            color=colors[pair],
            depth=5,
        )
    bracket(
        ax,
        (left + 0.5 * width, lower + height + 5),
        (left + 4.5 * width, lower + height + 5),
        "pair 0",
        color=BLUE,
        depth=6,
    )
    save(
        ax,
        "positions-layouts",
        "Two layouts of the pairs of a head",
        "Interleaved, neighbors are a pair: dimensions 0 and 1, 2 and 3, and so on. Half-split, "
        "the even dimensions 0, 2, 4, 6 come first, then 1, 3, 5, 7, so that a pair is half of the "
        "vector apart.",
    )


def draw_ids() -> None:
    """Position ids in a packed row, and of a token that is generated."""
    ax = canvas(720, 222)
    left, width, height = 150.0, 58.0, 26.0
    row = "◆ To bake ◆ Let it rest ◆ Slice".split()
    ids = [0, 1, 2, 0, 1, 2, 3, 0, 1]
    colors = [BLUE] * 3 + [ORANGE] * 4 + [GREEN] * 2
    label(ax, 136, 33, "a packed row", align="right", bold=True)
    label(ax, 136, 63, "position ids", align="right", size=SMALL, color=GRAY)
    cells(ax, left, 20, row, width=width, height=height, color=colors)
    cells(ax, left, 50, [str(i) for i in ids], width=width, height=height, color=colors, mono=True)
    label(ax, 136, 133, "keys that are kept", align="right", bold=True)
    label(ax, 136, 163, "position ids", align="right", size=SMALL, color=GRAY)
    cells(ax, left, 120, "◆ Let it rest for".split(), width=width, height=height, color=GRAY)
    cells(ax, left, 150, [str(i) for i in range(5)], width=width, height=height, color=GRAY)
    x = left + 5 * width + 40
    cells(ax, x, 120, ["an"], width=width, height=height, color=OCHRE)
    cells(ax, x, 150, ["5"], width=width, height=height, color=OCHRE)
    label(ax, x + width + 12, 133, "the new token", align="left", bold=True)
    label(ax, x + width + 12, 163, "goes on, not 0", align="left", size=SMALL, color=GRAY)
    middle, newest = left + 2.5 * width, x + width / 2
    arrow(ax, (newest, 178), (newest, 206), (middle, 206), (middle, 178))
    label(ax, left + 4.4 * width, 196, "attends to", size=SMALL)
    save(
        ax,
        "positions-ids",
        "Position ids of a packed row and of a generated token",
        "A packed row of nine tokens in three documents has the position ids 0 1 2, 0 1 2 3, 0 1. "
        "In generation the keys at positions 0 to 4 are kept and the new token has position 5.",
    )
