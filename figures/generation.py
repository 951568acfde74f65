"""The diagrams of chapter 14: a batch that generates, beams, a verified draft, a grid of bytes."""

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
    canvas,
    cells,
    label,
    save,
)

SIGN = "◆"


def draw_loop() -> None:
    """Three prompts of unequal length, padded, read at once, and continued until each has ended."""
    ax = canvas(720, 262)
    width, height, left = 46, 24, 96
    rows = (
        ([""] * 3 + [SIGN], ["Once", "upon", "a", "time", SIGN], "stop"),
        ([SIGN, "Mia", "bakes", "a"], ["cake", ".", SIGN, "", ""], "stop"),
        (["", SIGN, "The", "fox"], ["ran", "and", "ran", "and", "ran"], "length"),
    )
    places = ("-1 -1 -1 0", "0 1 2 3", "-1 0 1 2")
    edge = left + 4 * width
    label(ax, left + 2 * width, 18, "prompts, read at once", size=SMALL, color=GRAY)
    label(ax, edge + 24 + 2.5 * width, 18, "one token a step", size=SMALL, color=GRAY)
    for number, (prompt, added, reason) in enumerate(rows):
        y = 36 + 62 * number
        label(ax, left - 14, y + 12, f"row {number}", size=SMALL, align="right")
        colors = [BLUE if word else FAINT for word in prompt]
        cells(ax, left, y, prompt, width=width, height=height, color=colors, size=SMALL)
        for column, place in enumerate(places[number].split()):
            x = left + (column + 0.5) * width
            label(ax, x, y + 34, place, size=SMALL, color=GRAY)
        colors = [ORANGE if word else FAINT for word in added]
        cells(ax, edge + 24, y, added, width=width, height=height, color=colors, size=SMALL)
        for column in range(sum(map(bool, added))):
            x = edge + 24 + (column + 0.5) * width
            label(
                ax, x, y + 34, f"{column + len(prompt) - prompt.count('')}", size=SMALL, color=GRAY
            )
        label(ax, edge + 40 + 5 * width, y + 12, reason, size=SMALL, align="left", mono=True)
    label(ax, left - 14, 36 + 34, "position", size=SMALL, color=GRAY, align="right")
    x = edge + 24 + 1.5 * width
    arrow(ax, (x, 240), (x, 36 + 62 * 2 + height + 20), color=PURPLE)
    label(
        ax,
        x,
        250,
        "u = f(seed, row 2, step 1): no other row, no earlier step has a part in it",
        size=SMALL,
        color=PURPLE,
    )
    save(
        ax,
        "generation-loop",
        "A batch that generates",
        "Three prompts of one, four and three tokens stand in rows that end in the same column, "
        "with padding at position minus 1 before the shorter ones. Each row gets one token a step "
        "until it stops, by the sign that ends a text or by its length. The random number of a "
        "token depends on the seed, the number of its row and the step only.",
    )


def draw_beams() -> None:
    """Two beams over three steps, in which the greedy beginning loses."""
    ax = canvas(720, 242)
    kept, dropped = BLUE, GRAY
    nodes = {
        "start": (20, 106, SIGN, "", kept),
        "a": (170, 56, "the", "0.5", kept),
        "b": (170, 156, "a", "0.4", kept),
        "aa": (340, 20, "cat", "0.5 x 0.4 = 0.20", kept),
        "ab": (340, 70, "dog", "0.5 x 0.3 = 0.15", dropped),
        "ba": (340, 132, "fox", "0.4 x 0.9 = 0.36", kept),
        "bb": (340, 180, "hen", "0.4 x 0.1 = 0.04", dropped),
        "aaa": (560, 20, "sat", "0.20 x 0.5 = 0.10", kept),
        "baa": (560, 132, "ran", "0.36 x 0.8 = 0.29", kept),
    }
    boxes = {
        name: box(
            ax, x, y, 56 if not note else 130, 38, word, note, color=color, dashed=color is dropped
        )
        for name, (x, y, word, note, color) in nodes.items()
    }
    for child in nodes:
        if child != "start":
            parent = child[:-1] or "start"
            arrow(ax, boxes[parent].right, boxes[child].left, color=nodes[child][4])
    label(ax, 235, 230, "step 1", size=SMALL, color=GRAY)
    label(ax, 405, 230, "step 2", size=SMALL, color=GRAY)
    label(ax, 625, 230, "step 3", size=SMALL, color=GRAY)
    save(
        ax,
        "generation-beams",
        "Beam search with two beams",
        "From the start, the (0.5) and a (0.4) are kept. Their best continuations are a fox with "
        "0.36 and the cat with 0.20; the dog and a hen are dropped. After three steps a fox ran "
        "has 0.29, the cat sat 0.10, although the first word of the winner was the less likely.",
    )


def draw_speculation() -> None:
    """Four drafted tokens, one pass of the target, two accepted, one replaced."""
    ax = canvas(720, 250)
    width, left, height = 76, 130, 28
    text = ["The", "fox"]
    drafted = ["ran", "to", "his", "barn"]
    label(ax, left - 12, 40, "draft", align="right", bold=True)
    label(ax, left - 12, 54, "one by one", align="right", size=SMALL, color=GRAY)
    cells(ax, left, 30, text, width=width, height=height, color=BLUE)
    cells(ax, left + 2 * width, 30, drafted, width=width, height=height, color=ORANGE)
    label(ax, left - 12, 114, "target", align="right", bold=True)
    label(ax, left - 12, 128, "all at once", align="right", size=SMALL, color=GRAY)
    box(ax, left + width, 104, 5 * width, height, "one pass", color=GREEN)
    for column in range(1, 6):
        x = left + (column + 0.5) * width
        arrow(ax, (x, 30 + height), (x, 104), color=GRAY)
        arrow(ax, (x, 104 + height), (x, 160), color=GRAY)
        label(ax, x + 6, 148, f"p{column}", size=SMALL, align="left", color=GRAY)
    verdicts = (
        ("ran", "u q < p", GREEN),
        ("to", "u q < p", GREEN),
        ("her", "from p - q", PURPLE),
        ("", "unused", FAINT),
        ("", "unused", FAINT),
    )
    for column, (word, why, color) in enumerate(verdicts, 1):
        x = left + column * width
        box(ax, x, 160, width, 36, word, why, color=color, radius=2, dashed=not word)
    label(ax, left - 12, 178, "result", align="right", bold=True)
    label(
        ax,
        left + width,
        216,
        "two guesses pass, the third is replaced: three tokens for one pass of the target",
        size=SMALL,
        align="left",
        color=INK,
    )
    label(
        ax,
        left + width,
        232,
        "both caches then forget what was read after the last guess that passed",
        size=SMALL,
        align="left",
        color=GRAY,
    )
    save(
        ax,
        "generation-speculation",
        "One round of speculative decoding",
        "The draft model adds ran, to, his, barn to the text The fox, one by one. The target reads "
        "all of them in one pass and gives five distributions. The guesses ran and to pass, his "
        "is replaced by her, drawn from the rest p minus q, and what follows is not used.",
    )


def draw_grid() -> None:
    """The weights of one row on the grid of 255 points, and how far one of them moves."""
    ax = canvas(720, 170)
    left, right, y = 40, 680, 78
    arrow(ax, (left, y), (right + 20, y), color=GRAY, head=False)
    steps = 16
    gap = (right - left) / steps
    for tick in range(steps + 1):
        x = left + tick * gap
        ax.plot([x, x], [y - 6, y + 6], color=INK, linewidth=1)
    for tick, text in ((0, "-127"), (8, "0"), (9, "1"), (16, "127")):
        label(ax, left + tick * gap, y + 20, text, size=SMALL, mono=True)
    label(ax, left + 12.5 * gap, y + 20, "...", size=SMALL, mono=True)
    label(ax, left + 4 * gap, y + 20, "...", size=SMALL, mono=True)
    weights = (1.62, 3.1, 5.8, 7.75, 8.4, 9.3, 11.2, 13.45, 16.0)
    for weight in weights:
        x = left + weight * gap
        ax.plot([x], [y - 24], marker="o", color=BLUE, markersize=6)
        arrow(ax, (x, y - 20), (left + round(weight) * gap, y - 7), color=BLUE)
    label(ax, right, y - 40, "the largest |w| of the row is 127 steps", size=SMALL, align="right")
    x = left + 13 * gap
    arrow(ax, (x, y + 42), (x + gap, y + 42), color=ORANGE, both=True, gap=0)
    label(ax, x + gap / 2, y + 56, "s = max |w| / 127", size=SMALL, color=ORANGE)
    label(
        ax,
        left,
        y + 78,
        "a weight moves to the nearest point of the grid: at most s / 2 away",
        size=SMALL,
        align="left",
        color=GRAY,
    )
    save(
        ax,
        "generation-grid",
        "Rounding a row of weights to 8 bits",
        "A line with evenly spaced points from minus 127 to 127 steps. The weights of one row "
        "stand above it, and each moves to the nearest point, at most half a step away. The step "
        "is the largest absolute weight divided by 127.",
    )
