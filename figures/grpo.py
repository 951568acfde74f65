"""The diagram of chapter 23: a group of replies whose rewards differ, and one that is idle."""

from __future__ import annotations

from matplotlib.axes import Axes
from style import BLUE, GRAY, GREEN, INK, ORANGE, SMALL, box, canvas, cells, label, save

WIDTHS = {
    "␣Rosa": 42,
    "␣is": 26,
    "␣a": 22,
    "␣goat": 42,
    "␣fox": 36,
    ".": 14,
    "end": 30,
    "␣One": 36,
    "␣day": 36,
}
RIGHT = ("␣Rosa", "␣is", "␣a", "␣goat", ".", "end")
MIXED = (
    (RIGHT, "1", "+0.87"),
    (("␣Rosa", "␣is", "␣a", "␣fox", ".", "end"), "0", "−0.87"),
    (("␣Rosa", "␣is", "␣a", "␣goat", ".", "␣One"), "0", "−0.87"),
    (("␣a", "␣goat", ".", "end"), "1", "+0.87"),
)
ALIKE = ((RIGHT, "1", "0"),) * 4
COLORS = {"+": GREEN, "−": ORANGE, "0": GRAY}


def panel(
    ax: Axes, x: float, rows: tuple[tuple[tuple[str, ...], str, str], ...], mean: str, end: str
) -> None:
    """Draw one prompt, its replies with reward and advantage, and what that comes to."""
    box(ax, x, 16, 336, 28, "What kind of animal is Rosa?", color=BLUE, mono=True, size=SMALL)
    label(ax, x, 62, "four replies are drawn", size=SMALL, color=GRAY, align="left")
    label(ax, x + 254, 62, "reward", size=SMALL, color=GRAY)
    label(ax, x + 310, 62, "advantage", size=SMALL, color=GRAY)
    for number, (words, reward, advantage) in enumerate(rows):
        y, color = 76 + 36 * number, COLORS[advantage[0]]
        cells(
            ax,
            x,
            y,
            words,
            width=[WIDTHS[word] for word in words],
            height=26,
            color=color,
            size=SMALL,
        )
        label(ax, x + 254, y + 13, reward)
        label(ax, x + 310, y + 13, advantage, color=INK if color == GRAY else color, bold=True)
    label(ax, x + 254, 232, f"mean {mean}", size=SMALL, color=GRAY)
    label(ax, x, 252, end, size=SMALL, align="left", italic=True)


def draw_grpo_group() -> None:
    """Two groups of four replies to the same prompt: one that teaches, and one that is idle."""
    ax = canvas(720, 272)
    panel(ax, 12, MIXED, "0.5", "green tokens become likelier, orange ones less likely")
    panel(ax, 374, ALIKE, "1", "all rewards are the mean: nothing to learn")
    save(
        ax,
        "grpo-group",
        "The group is the critic",
        "Two groups of four replies to the question what kind of animal Rosa is. In the first, "
        "Rosa is a goat, with an end, gets reward 1; Rosa is a fox gets 0; Rosa is a goat, "
        "followed by One and no end, gets 0; a goat, with an end, gets 1. Their mean is 0.5, and "
        "over the deviation the advantages are plus 0.87 for the first and the last, whose tokens "
        "are green, and minus 0.87 for the others, whose tokens are orange. In the second group "
        "all four replies are alike and right: the mean is 1, and all advantages are 0.",
    )
