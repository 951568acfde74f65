"""The diagram of chapter 19: a conversation as tokens, by who wrote them and what is learned."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, SMALL, canvas, cells, label, save


def draw_chat_tokens() -> None:
    """The tokens of one exchange in two rows: template, user's words, and what is learned."""
    ax = canvas(720, 214)
    first = (
        ["<|endoftext|>", "<|im_start|>", "user", "⏎", "␣Which", "␣animal", "␣is", "␣Rosa", "?"],
        [GRAY] * 4 + [BLUE] * 5,
        [112, 104, 46, 28, 66, 74, 38, 60, 28],
    )
    second = (
        ["<|im_end|>", "⏎", "<|im_start|>", "assistant", "⏎", "␣Rosa", "␣is", "␣a", "␣goat", "."],
        [GRAY] * 5 + [GREEN] * 5,
        [90, 28, 104, 84, 28, 60, 38, 32, 58, 24],
    )
    for y, (words, colors, widths) in ((40, first), (130, second)):
        cells(ax, 16, y, words, width=widths, height=30, color=colors, size=SMALL)
    x = 16 + sum(second[2])
    cells(ax, x, 130, ["<|im_end|>"], width=[90], height=30, color=GREEN, size=SMALL)
    cells(ax, x + 90, 130, ["⏎"], width=[28], height=30, color=GRAY, size=SMALL)
    label(ax, 16, 20, "the template writes", color=GRAY, align="left", bold=True)
    label(ax, 306, 20, "the user writes", color=BLUE, align="left", bold=True)
    label(
        ax,
        350,
        112,
        "the assistant writes, and is what the model learns",
        color=GREEN,
        align="left",
        bold=True,
    )
    label(
        ax,
        350,
        182,
        "the end token belongs to it: a model that does not learn it hardly ever stops",
        size=SMALL,
        color=GREEN,
        align="left",
    )
    save(
        ax,
        "chat-tokens",
        "A conversation as tokens",
        "The tokens of one exchange. Gray, written by the template: end of text, im_start, user, "
        "newline; after the question im_end, newline, im_start, assistant, newline. Blue, written "
        "by the user: space Which, space animal, space is, space Rosa, question mark. Green, "
        "learned: space Rosa, space is, space a, space goat, period, and im_end. A last newline "
        "is gray again.",
    )
