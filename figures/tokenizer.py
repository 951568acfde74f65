"""The diagrams of chapter 05: the four forms of UTF-8, and the trainer's three structures."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, arrow, box, canvas, cells, label, save


def draw_utf8() -> None:
    """One row for each length: marker bits in gray, bits of the code point in blue."""
    ax = canvas(720, 236)
    for x, text in ((8, "code points"), (122, "bytes, bit by bit"), (664, "example")):
        label(ax, x, 14, text, size=SMALL, color=GRAY, align="left")
    rows = (
        ("up to 7F", ("0",), "a", "1100001"),
        ("up to 7FF", ("110", "10"), "é", "00011101001"),
        ("up to FFFF", ("1110", "10", "10"), "€", "0010000010101100"),
        ("up to 10FFFF", ("11110", "10", "10", "10"), "U+1F642", "000011111011001000010"),
    )
    for number, (reach, markers, example, bits) in enumerate(rows):
        y = 34 + 50 * number
        label(ax, 8, y + 14, reach, align="left", mono=True, size=SMALL)
        x, rest = 122.0, bits
        for marker in markers:
            free = 8 - len(marker)
            payload, rest = rest[:free], rest[free:]
            colors = [GRAY] * len(marker) + [BLUE] * free
            cells(ax, x, y, [*marker, *payload], width=15, height=28, color=colors, size=SMALL)
            x += 8 * 15 + 10
        label(ax, 664, y + 14, example, align="left", size=SMALL if len(example) > 1 else 12)
    save(
        ax,
        "tokenizer-utf8",
        "The four forms of UTF-8",
        "One byte: 0 and seven bits, for a. Two bytes: 110 with five bits, 10 with six, for é. "
        "Three bytes: 1110 with four bits, twice 10 with six, for the euro sign. Four bytes: 11110 "
        "with three bits, three times 10 with six, for a smiling face.",
    )


def draw_training() -> None:
    """Levels of counts, the index, and the words with their counts."""
    ax = canvas(720, 262)
    for x, text in (
        (8, "levels: a heap"),
        (190, "pairs waiting there"),
        (374, "index"),
        (500, "words"),
    ):
        label(ax, x, 14, text, size=SMALL, color=GRAY, align="left")
    levels = (
        (40, "15", ("h e", "t h")),
        (112, "4", ("e n",)),
        (184, "2", ("e r", "o t")),
    )
    words = (
        (40, ("t", "h", "e"), "9 times"),
        (112, ("t", "h", "e", "n"), "4 times"),
        (184, ("o", "t", "h", "e", "r"), "2 times"),
    )
    boxes = []
    for y, words_of, count in words:
        colors = [ORANGE if letter in "th" else GRAY for letter in words_of]
        row = cells(ax, 500, y + 4, words_of, width=28, height=28, color=colors)
        label(ax, 654, y + 18, count, size=SMALL, align="left")
        boxes.append(row[0])
    index = box(ax, 374, 76, 74, 100, "t h", "in words\n1, 2, 3", color=GREEN)
    for place, target in enumerate(boxes):
        arrow(ax, (448, 106 + 20 * place), target.left, color=GREEN)
    for y, count, pairs in levels:
        level = box(ax, 8, y, 74, 36, count, color=BLUE, solid=count == "15")
        colors = [ORANGE if pair == "t h" else GRAY for pair in pairs]
        row = cells(ax, 190, y + 4, pairs, width=46, height=28, color=colors, gap=6)
        arrow(ax, level.right, row[0].left)
        if count == "15":
            arrow(ax, row[-1].right, (340, 58), (340, 126), index.left, color=ORANGE)
            label(ax, 190, 26, "sorted by bytes, taken from the end", size=SMALL, align="left")
    label(ax, 8, 244, "9 + 4 + 2 = 15 occurrences of t h, in three different words", size=SMALL,
          align="left")  # fmt: skip
    save(
        ax,
        "tokenizer-training",
        "The trainer's three structures",
        "A heap of levels: 15 holds the pairs h e and t h, 4 holds e n, 2 holds e r and o t. The "
        "last pair of the top level, t h, is looked up in the index, which names the words the (9 "
        "times), then (4 times) and other (2 times). Only these are changed.",
    )
