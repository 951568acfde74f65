"""The diagrams of chapter 16: three ways to cut a question and its answer into tokens."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, canvas, cells, label, save


def draw_seam() -> None:
    """One text, encoded as a whole, in two parts with a lone space, and jointly."""
    ax = canvas(720, 190)
    width, left = 62, 196
    rows = (
        ("one text", ["She", "␣lives", "␣in", "␣the", "␣barn"], [BLUE] * 4 + [GREEN]),
        ("separate", ["She", "␣lives", "␣in", "␣the", "␣", "barn"], [BLUE] * 4 + [ORANGE, ORANGE]),
        ("joint", ["She", "␣lives", "␣in", "␣the", "␣barn"], [BLUE] * 4 + [GREEN]),
    )
    remarks = ("as in training", "never seen in training", "space goes to the answer")
    for row, ((name, words, colors), remark) in enumerate(zip(rows, remarks, strict=True)):
        y = 34 + 52 * row
        label(ax, left - 14, y + 9, name, align="right", bold=True)
        label(ax, left - 14, y + 24, remark, size=SMALL, color=GRAY, align="right")
        cells(ax, left, y, words, width=width, height=32, color=colors)
    label(ax, left + 2 * width, 16, "context", size=SMALL, color=BLUE)
    label(ax, left + 4.5 * width, 16, "answer", size=SMALL, color=GREEN)
    save(
        ax,
        "evaluation-seam",
        "The seam between context and answer",
        "The text She lives in the barn in three ways. As one text: She, space lives, space in, "
        "space the, space barn. Separate, with the space in the context: the context ends in a "
        "token for a lone space, the answer is barn without a space. Joint: the same tokens as "
        "one text, the last one being the answer.",
    )
