"""The diagrams of chapter 10: the residual stream, two blocks, feed-forward networks, experts."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Circle
from style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    OCHRE,
    ORANGE,
    PAPER,
    PURPLE,
    SMALL,
    Box,
    Point,
    arrow,
    box,
    bracket,
    canvas,
    cells,
    label,
    save,
)


def _plus(ax: Axes, x: float, y: float) -> Box:
    """A circle with a plus in it, where something is added to the stream."""
    ax.add_patch(Circle((x, y), 9, facecolor=PAPER, edgecolor=INK, linewidth=1.1))
    label(ax, x, y - 0.5, "+", size=12, bold=True)
    return Box(x - 9, y - 9, 18, 18)


def draw_stream() -> None:
    """Two blocks as four layers that read from one line and add to it."""
    ax = canvas(720, 216)
    y, top = 168.0, 62.0
    start = box(ax, 6, y - 20, 82, 40, "embedding", "of a token", color=GRAY)
    left = start.right
    for number, x in enumerate((128.0, 254.0, 388.0, 514.0)):
        is_attention = number % 2 == 0
        name, color = ("attention", BLUE) if is_attention else ("feed-\nforward", ORANGE)
        norm = box(ax, x - 17, y - 62, 34, 24, "norm", color=PURPLE, size=SMALL, radius=3)
        layer = box(ax, x - 17, top - 16, 86, 36, name, color=color)
        arrow(ax, (x, y), norm.bottom, gap=0)
        arrow(ax, norm.top, (x, top + 20))
        plus = _plus(ax, x + 84, y)
        arrow(ax, left, plus.left, width=2.2, gap=0)
        arrow(ax, layer.right, (plus.center[0], layer.right[1]), plus.top)
        left = plus.right
    end = box(ax, 626, y - 12, 34, 24, "norm", color=PURPLE, size=SMALL, radius=3)
    arrow(ax, left, end.left, width=2.2, gap=0)
    label(ax, 694, y, "logits")
    arrow(ax, end.right, (672, y))
    for first, last, number in ((110, 348, 1), (370, 608, 2)):
        bracket(ax, (last, 36), (first, 36), f"block {number}", depth=5)
    label(ax, 122, 148, "read", size=SMALL, italic=True, align="right")
    label(ax, 217, 92, "write", size=SMALL, italic=True, align="left")
    label(ax, 360, 204, "the residual stream: start + write + write + write + write", size=SMALL)
    save(
        ax,
        "blocks-stream",
        "The residual stream",
        "A line runs from the embedding of a token to the logits. Four layers, attention and "
        "feed-forward network of two blocks, each read from it through a norm and add their "
        "result to it. A last norm stands before the logits.",
    )


def _column(ax: Axes, x: float, *, pre: bool) -> None:
    """One block, read from bottom to top; the stream is the line at ``x``."""
    start, branch = (x, 388.0), x + 112
    for bottom, name, color in (
        (370.0, "attention", BLUE),
        (202.0, "feed-forward", ORANGE),
    ):
        layer_y = bottom - (88 if pre else 46)
        layer = box(ax, branch - 54, layer_y - 16, 108, 32, name, color=color)
        if pre:
            norm = box(ax, branch - 54, bottom - 52, 108, 24, "norm", color=PURPLE, radius=3)
            arrow(ax, (x, bottom), (branch, bottom), norm.bottom, gap=0)
            arrow(ax, norm.top, layer.bottom)
        else:
            arrow(ax, (x, bottom), (branch, bottom), layer.bottom, gap=0)
        plus = _plus(ax, x, bottom - (122 if pre else 90))
        arrow(ax, layer.top, (branch, plus.center[1]), plus.right)
        arrow(ax, start, plus.bottom, width=2.2, gap=0)
        start = plus.top
        if not pre:
            norm = box(ax, x - 30, bottom - 134, 60, 22, "norm", color=PURPLE, radius=3)
            arrow(ax, start, norm.bottom, width=2.2, gap=0)
            start = norm.top
    arrow(ax, start, (x, 22), width=2.2, gap=0)
    label(ax, x, 398, "x", italic=True, bold=True)


def draw_prepost() -> None:
    """The same two layers in a pre-norm and in a post-norm block."""
    ax = canvas(560, 410)
    label(ax, 145, 12, "pre-norm", bold=True)
    label(ax, 425, 12, "post-norm", bold=True)
    _column(ax, 90, pre=True)
    _column(ax, 370, pre=False)
    label(ax, 76, 300, "nothing\non the\nstream", size=SMALL, color=GRAY, align="right")
    label(ax, 334, 247, "a norm\non the\nstream", size=SMALL, color=GRAY, align="right")
    save(
        ax,
        "blocks-prepost",
        "Pre-norm and post-norm",
        "Two blocks from bottom to top. Pre-norm: branches go through norm and attention, then "
        "norm and feed-forward network, and are added to a stream that is a straight line. "
        "Post-norm: branches go through the layers alone, and after each addition the stream "
        "itself passes through a norm.",
    )


def draw_feedforward() -> None:
    """Two matrices, and three with a gate."""
    ax = canvas(720, 300)

    def vector(middle: float, y: float, width: float, text: str, color: str = GRAY) -> Box:
        return box(ax, middle - width / 2, y, width, 24, text, color=color, radius=2)

    label(ax, 160, 14, "plain: 2 matrices", bold=True)
    low = vector(160, 262, 72, "x: d")
    inner = vector(160, 172, 270, "4d", BLUE)
    active = vector(160, 106, 270, "4d", BLUE)
    out = vector(160, 34, 72, "d")
    arrow(ax, low.top, inner.bottom)
    label(ax, 172, 230, "up, 4d · d", align="left", size=SMALL)
    arrow(ax, inner.top, active.bottom)
    label(ax, 172, 152, "activation", align="left", size=SMALL)
    arrow(ax, active.top, out.bottom)
    label(ax, 172, 83, "down, d · 4d", align="left", size=SMALL)
    label(ax, 520, 14, "gated: 3 matrices", bold=True)
    low = vector(520, 262, 72, "x: d")
    gate = vector(414, 172, 180, "8d/3", ORANGE)
    up = vector(626, 172, 180, "8d/3", BLUE)
    product = vector(520, 106, 180, "8d/3", GREEN)
    out = vector(520, 34, 72, "d")
    arrow(ax, (508, 262), gate.bottom)
    arrow(ax, (532, 262), up.bottom)
    label(ax, 440, 234, "gate, 8d/3 · d", align="right", size=SMALL)
    label(ax, 604, 234, "up, 8d/3 · d", align="left", size=SMALL)
    arrow(ax, gate.top, (492, 130))
    arrow(ax, up.top, (548, 130))
    label(ax, 436, 152, "SiLU", align="right", size=SMALL)
    label(ax, 520, 152, "times", size=SMALL, italic=True)
    arrow(ax, product.top, out.bottom)
    label(ax, 532, 83, "down, d · 8d/3", align="left", size=SMALL)
    label(ax, 340, 272, "both: 8d²\nparameters", size=SMALL, color=GRAY)
    save(
        ax,
        "blocks-feedforward",
        "A plain and a gated feed-forward network",
        "Left: x of width d goes up to width 4d, through an activation, and down to d. Right: x "
        "goes through two matrices to width 8d/3 each; one, the gate, passes through SiLU and is "
        "multiplied with the other; a third matrix leads down to d. Both have 8 d squared "
        "parameters.",
    )


def draw_moe() -> None:
    """Five tokens, four experts, two choices each, one dropped."""
    ax = canvas(720, 330)
    colors = (BLUE, ORANGE, GREEN, OCHRE)
    tops = [20 + 62 * number for number in range(4)]
    choices = {"a": (0, 1), "b": (1, 3), "c": (0, 1), "d": (2, 3), "e": (3, 1)}
    label(ax, 35, 24, "tokens", size=SMALL, bold=True)
    box(ax, 98, 40, 62, 214, "router", color=PURPLE)
    gathered: dict[int, list[str]] = {number: [] for number in range(4)}
    sources: dict[str, Point] = {}
    for row, name in enumerate(choices):
        (cell,) = cells(ax, 20, 40 + 46 * row, [name], width=30, height=28)
        arrow(ax, cell.right, (98, cell.center[1]))
        sources[name] = cell.center
    for rank in range(2):
        for name, pair in choices.items():
            gathered[pair[rank]].append(name)
    for number, (top, color) in enumerate(zip(tops, colors, strict=True)):
        names = gathered[number]
        kept = names[:3]
        row = cells(ax, 240, top + 8, kept, width=30, height=28, color=color)
        arrow(ax, (160, 147 + (number - 1.5) * 34), (240, top + 22), color=color)
        expert = box(ax, 400, top + 4, 96, 36, f"expert {number + 1}", color=color)
        arrow(ax, row[-1].right, expert.left, color=color)
        arrow(ax, expert.right, (590, 147 + (number - 1.5) * 34), color=color)
        for place, name in enumerate(names[3:]):
            x = 300 + 30 * place
            box(ax, x, top + 40, 30, 20, color=GRAY, dashed=True, radius=2)
            label(ax, x + 15, top + 50, name, mono=True, color=GRAY)
            label(ax, x + 36, top + 50, "dropped", size=SMALL, color=GRAY, align="left")
    label(ax, 285, 12, "gather", size=SMALL, bold=True)
    label(ax, 448, 12, "compute", size=SMALL, bold=True)
    add = box(ax, 590, 40, 62, 214, "weigh\nand add", color=PURPLE)
    label(ax, 621, 24, "scatter", size=SMALL, bold=True)
    for name, (_, y) in sources.items():
        (cell,) = cells(ax, 682, y - 14, [name], width=30, height=28)
        arrow(ax, (652, y), cell.left)
    shared = box(ax, 400, 284, 96, 36, "shared", "sees all tokens", color=GRAY)
    arrow(ax, (35, 254), (35, 302), shared.left)
    arrow(ax, shared.right, (621, 302), add.bottom)
    save(
        ax,
        "blocks-moe",
        "A mixture of experts",
        "Five tokens a to e pass a router, which sends each to two of four experts. Expert 1 "
        "gathers a and c, expert 2 b, a and c, and drops e because it is full, expert 3 d, expert "
        "4 e, b and d. Results are weighted and added at the places of the tokens. A shared expert "
        "sees all tokens.",
    )
