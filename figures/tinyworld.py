"""The diagrams of chapter 01: the clock's tree of sentences, and the walk that a story takes."""

from __future__ import annotations

from style import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SMALL,
    Box,
    arrow,
    box,
    canvas,
    label,
    save,
)


def draw_clock_tree() -> None:
    """All sentences of the clock's language, with the probabilities along the branches."""
    ax = canvas(720, 236)

    def word(x: float, y: float, text: str, color: str) -> Box:
        return box(ax, x, y, 76, 34, text, color=color, mono=True)

    start = box(ax, 12, 101, 76, 34, "start", color=GRAY)
    tick, tock = word(180, 60, "tick", BLUE), word(180, 176, "tock", ORANGE)
    second = word(348, 24, "tock", ORANGE)
    stops = word(516, 24, ".", GREEN), word(348, 96, ".", GREEN), word(348, 176, ".", GREEN)
    branches = [
        (start, tick, "3/4"),
        (start, tock, "1/4"),
        (tick, second, "2/3"),
        (tick, stops[1], "1/3"),
        (second, stops[0], "1"),
        (tock, stops[2], "1"),
    ]
    for origin, target, probability in branches:
        arrow(ax, origin.right, target.left)
        x = (origin.right[0] + target.left[0]) / 2
        y = (origin.right[1] + target.left[1]) / 2
        slope = target.left[1] - origin.right[1]
        label(ax, x, y + (14 if slope > 0 else -14 if slope < 0 else -10), probability)
    label(ax, 656, 10, "probability", size=SMALL, color=GRAY)
    products = ("3/4 × 2/3 × 1 = 1/2", "3/4 × 1/3 = 1/4", "1/4 × 1 = 1/4")
    for stop, product in zip(stops, products, strict=True):
        label(ax, 714, stop.center[1], product, align="right", size=SMALL)
    save(
        ax,
        "clock-tree",
        "The clock's language",
        "A tree: tick with probability 3/4, then tock with 2/3 or a full stop with 1/3; or tock "
        "with 1/4, then a full stop. The sentences have the probabilities 1/2, 1/4 and 1/4.",
    )


def draw_story_walk() -> None:
    """The steps of a story, the number of branches at each, and an example."""
    ax = canvas(720, 318)
    width, height, gap = 112, 44, 30

    def step(column: int, y: float, name: str, note: str, color: str, example: str) -> Box:
        x = 12 + column * (width + gap)
        shape = box(ax, x, y, width, height, name, note, color=color)
        label(ax, shape.center[0], y + height + 13, example, size=SMALL, italic=True)
        return shape

    top, middle, low = 16, 128, 240
    opening = step(0, top, "opening", "6 branches", GRAY, "Long ago")
    hero = step(1, top, "hero", "48 branches", BLUE, ", Mia the fox")
    doing = step(2, top, "doing", "4 branches", GRAY, "went for a walk.")
    weather = step(3, top, "weather", "6 branches", GRAY, "Snow was falling.")
    fact = step(4, top, "fact", "40, 35, 30", ORANGE, "Mia lives in the barn.")
    visit = step(4, middle, "visit", "Then, or a fact", PURPLE, "Then")
    arrival = step(2, middle, "arrival", "47 × 3 + 16 × 3", PURPLE, "Tom the bear came by.")
    guest = step(1, middle, "guest fact", "40 branches", ORANGE, "Tom likes to eat rice.")
    closing = step(0, low, "closing", "6 branches", GREEN, "Mia smiled.")
    for a, b in ((opening, hero), (hero, doing), (doing, weather), (weather, fact)):
        arrow(ax, a.right, b.left)
    x, y = fact.right
    arrow(ax, (x, y - 8), (x + 14, y - 8), (x + 14, y + 10), (x, y + 10), width=1.0)
    label(ax, fact.center[0] + 44, top - 8, "3 times", size=SMALL, color=ORANGE)
    arrow(ax, (fact.bottom[0], fact.bottom[1] + 20), visit.top)
    arrow(ax, visit.left, arrival.right, text="0.7")
    arrow(ax, arrival.left, guest.right, text="4/7")
    arrow(ax, (guest.left[0], guest.left[1]), (closing.top[0], guest.left[1]), closing.top)
    y = closing.center[1]
    arrow(
        ax,
        (arrival.bottom[0], arrival.bottom[1] + 20),
        (arrival.bottom[0], y - 9),
        (closing.right[0], y - 9),
    )
    label(
        ax,
        arrival.bottom[0] - 8,
        y - 22,
        "3/7: a stranger, of whom nobody knows anything",
        size=SMALL,
        align="right",
    )
    arrow(
        ax,
        (visit.bottom[0], visit.bottom[1] + 20),
        (visit.bottom[0], y + 9),
        (closing.right[0], y + 9),
    )
    label(
        ax, visit.bottom[0] - 8, y + 22, "0.3: one more fact of the hero", size=SMALL, align="right"
    )
    save(
        ax,
        "story-walk",
        "The steps of a story",
        "Opening, hero, doing, weather and three facts follow each other. Then, with probability "
        "0.7, someone arrives: a guest, who brings a fact, or a stranger. Otherwise the hero gets "
        "one more fact. A closing ends every story.",
    )
