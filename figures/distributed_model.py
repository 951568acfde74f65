"""The diagram of chapter 18 that shows a layer cut over two ranks."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, arrow, box, canvas, label, save


def draw_columns_rows() -> None:
    """Two ranks: columns of A, the activation, rows of C, and a sum."""
    ax = canvas(720, 196)
    x = box(ax, 8, 76, 72, 44, "X", "all tokens", color=GRAY)
    total = box(ax, 640, 76, 72, 44, "Y", "the same", color=GRAY)
    for rank, color in enumerate((BLUE, ORANGE)):
        y = 22 + 108 * rank
        label(ax, 300, y - 8, f"rank {rank}", size=SMALL, color=color, bold=True)
        first = box(ax, 150, y, 108, 44, f"A{rank}", "half the columns", color=color)
        inner = box(ax, 300, y, 74, 44, "φ", "each number", color=color)
        second = box(ax, 416, y, 108, 44, f"C{rank}", "half the rows", color=color)
        arrow(ax, x.right, first.left, color=GRAY)
        arrow(ax, first.right, inner.left, color=color)
        arrow(ax, inner.right, second.left, color=color)
        arrow(ax, second.right, (577, 98 + (rank * 2 - 1) * 12), color=color)
    label(ax, 44, 138, "copy", size=SMALL, color=GRAY)
    label(ax, 44, 152, "f", size=SMALL, color=GRAY, mono=True)
    box(ax, 562, 84, 44, 28, "+", color=GREEN)
    label(ax, 584, 130, "all-reduce", size=SMALL, color=GREEN)
    label(ax, 584, 144, "g", size=SMALL, color=GREEN, mono=True)
    arrow(ax, (608, 98), total.left, color=GREEN)
    save(
        ax,
        "distributed-columns-rows",
        "A feed-forward network on two ranks",
        "The input X is copied to two ranks, the operator f. Each multiplies it by half of the "
        "columns of A, applies the activation to each number, and multiplies by the matching half "
        "of the rows of C. The two products are added by an all-reduce, the operator g, and both "
        "ranks have Y.",
    )
