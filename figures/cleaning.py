"""The diagrams of chapter 03: how a letter becomes mojibake, and the steps of the pipeline."""

from __future__ import annotations

import itertools

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, arrow, box, canvas, cells, label, save


def draw_mojibake() -> None:
    """One letter, two bytes, two readings, and the way back."""
    ax = canvas(720, 190)
    letter = box(ax, 40, 66, 90, 58, "é", "one letter", color=BLUE, size=14)
    bytes_row = cells(ax, 300, 72, ["C3", "A9"], width=56, height=34, color=GRAY, size=11)
    label(ax, 356, 58, "two bytes", size=SMALL)
    damaged = box(ax, 590, 66, 90, 58, "Ã ©", "two characters", color=ORANGE, size=14)
    left, right = bytes_row
    arrow(ax, (130, 84), (left.x, 84), text="write UTF-8")
    arrow(ax, (right.x + 56, 84), (590, 84), text="read Windows-1252", color=ORANGE)
    below = 158
    arrow(ax, damaged.bottom, (635, below), (right.center[0], below), right.bottom, color=GREEN)
    arrow(ax, left.bottom, (left.center[0], below), (85, below), letter.bottom, color=GREEN)
    label(ax, 205, below + 14, "then read UTF-8", size=SMALL, color=GREEN)
    label(ax, 515, below + 14, "the repair: write Windows-1252", size=SMALL, color=GREEN)
    save(
        ax,
        "cleaning-mojibake",
        "How a letter becomes two",
        "The letter e with acute is written in UTF-8 as the two bytes C3 and A9. Read as "
        "Windows-1252 they are two characters. The repair writes these in Windows-1252, which "
        "gives the same bytes, and reads them as UTF-8.",
    )


def draw_pipeline() -> None:
    """The steps of clean_documents, in order, with what each looks at."""
    ax = canvas(720, 220)
    steps = (
        ("normalize", "one spelling", BLUE, False),
        ("licenses", "cut notices", BLUE, False),
        ("lines", "cut repeats", BLUE, False),
        ("rules", "drop non-prose", ORANGE, False),
    )
    later = (
        ("language", "drop others", ORANGE, True),
        ("classifier", "drop the worst", ORANGE, True),
        ("test", "drop overlap", ORANGE, True),
        ("mask", "put <EMAIL>", GREEN, False),
    )
    rows = []
    for y, row in ((20, steps), (112, later)):
        rows.append(
            [
                box(ax, 110 + 155 * i, y, 125, 56, name, note, color=color, dashed=dashed)
                for i, (name, note, color, dashed) in enumerate(row)
            ]
        )
    label(ax, 44, 48, "documents", size=SMALL)
    arrow(ax, (76, 48), rows[0][0].left)
    for row in rows:
        for one, next_one in itertools.pairwise(row):
            arrow(ax, one.right, next_one.left)
    turn = rows[0][-1].right
    arrow(ax, turn, (712, turn[1]), (712, 94), (88, 94), (88, 140), rows[1][0].left)
    label(ax, 110, 196, "blue edits the text", size=SMALL, color=BLUE, align="left")
    label(ax, 265, 196, "orange drops documents", size=SMALL, color=ORANGE, align="left")
    label(ax, 440, 196, "dashed only when asked", size=SMALL, color=GRAY, align="left")
    save(
        ax,
        "cleaning-pipeline",
        "The steps of the pipeline",
        "Documents are normalized, lose license notices and repeated lines, and are judged by "
        "rules; optionally by language, classifier and overlap with a test; at last addresses "
        "are masked. The first three steps edit the text, the next four drop documents.",
    )
