"""The diagrams of chapter 01: the clock's tree of sentences, and the walk that a story takes."""

from __future__ import annotations

from itertools import pairwise

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

# Both are as narrow as a phone, so that their letters are shown there at nearly full size.
WIDTH = 360


def draw_clock_tree() -> None:
    """All sentences of the clock's language, with the probabilities along the branches."""
    ax = canvas(WIDTH, 196)

    def word(x: float, y: float, text: str, color: str) -> Box:
        return box(ax, x, y, 52, 32, text, color=color, mono=True)

    start = box(ax, 2, 82, 52, 32, "start", color=GRAY)
    tick, tock = word(92, 56, "tick", BLUE), word(92, 156, "tock", ORANGE)
    second = word(182, 24, "tock", ORANGE)
    stops = word(266, 24, ".", GREEN), word(266, 90, ".", GREEN), word(266, 156, ".", GREEN)
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
        label(ax, x - 4, y + (15 if slope > 0 else -13 if slope < 0 else -10), probability)
    label(ax, WIDTH - 2, 9, "probability", color=GRAY, align="right")
    for stop, product in zip(stops, ("1/2", "1/4", "1/4"), strict=True):
        label(ax, WIDTH - 4, stop.center[1], product, align="right", bold=True)
    save(
        ax,
        "clock-tree",
        "The clock's language",
        "A tree: tick with probability 3/4, then tock with 2/3 or a period with 1/3; or tock "
        "with 1/4, then a period. The sentences have the probabilities 1/2, 1/4 and 1/4.",
    )


def draw_story_walk() -> None:
    """The steps of a story, the number of branches at each, and an example."""
    ax = canvas(WIDTH, 618)
    width, height, pitch = 114, 38, 54

    def step(row: int, name: str, note: str, color: str, example: str = "") -> Box:
        shape = box(ax, 2, 4 + row * pitch, width, height, name, note, color=color)
        label(ax, shape.right[0] + 26, shape.center[1], example, align="left", italic=True)
        return shape

    main = [
        step(0, "opening", "6 branches", GRAY, "Long ago"),
        step(1, "hero", "48 branches", BLUE, ", Mia the fox"),
        step(2, "doing", "4 branches", GRAY, "went for a walk."),
        step(3, "weather", "6 branches", GRAY, "Snow was falling."),
        step(4, "fact, 3 times", "40, 35, 30 branches", ORANGE, "Mia lives in the tent."),
        step(5, "visit", "26 branches", PURPLE),
        step(6, "arrival", "189 branches", PURPLE),
    ]
    for above, below in pairwise(main):
        arrow(ax, above.bottom, below.top)
    x, y = main[4].right
    arrow(ax, (x, y + 8), (x + 15, y + 8), (x + 15, y - 8), (x, y - 8), width=1.0)
    visit, arrival = main[5:]

    def lane(column: int, y: float, name: str, note: str, color: str, example: str) -> Box:
        shape = box(ax, 2 + column * 121, y, width, 58, color=color)
        x, y = shape.center
        label(ax, x, y - 17, name, bold=True)
        label(ax, x, y - 2, note, size=SMALL)
        label(ax, x, y + 17, example, size=SMALL, italic=True)
        return shape

    guest = lane(0, 398, "a guest", "47 × 3 branches", PURPLE, "Ada the frog came by.")
    stranger = lane(1, 398, "a stranger", "16 × 3 branches", PURPLE, "Enzo came by. ...")
    further = lane(2, 398, "nobody comes", "25 further facts", ORANGE, "Mia is very calm.")
    fact = lane(0, 486, "guest fact", "40 branches", ORANGE, "Ada is very proud.")
    label(ax, visit.bottom[0] + 8, visit.bottom[1] + 8, "Then: 0.7", align="left")
    arrow(ax, visit.right, (further.top[0], visit.right[1]), further.top)
    label(ax, further.top[0] + 8, further.top[1] - 14, "0.3", align="left")
    arrow(ax, arrival.bottom, guest.top)
    label(ax, guest.top[0] + 8, guest.top[1] - 14, "4/7", align="left")
    arrow(ax, arrival.right, (stranger.top[0], arrival.right[1]), stranger.top)
    label(ax, stranger.top[0] + 8, stranger.top[1] - 14, "3/7", align="left")
    arrow(ax, guest.bottom, fact.top)
    closing = box(ax, 2 + 121, 574, width, height, "closing", "6 branches", color=GREEN)
    label(ax, closing.right[0] + 10, closing.center[1], "Mia smiled.", align="left", italic=True)
    arrow(ax, fact.bottom, (fact.bottom[0], closing.center[1]), closing.left)
    arrow(ax, stranger.bottom, closing.top)
    x = closing.top[0] + 30
    arrow(ax, further.bottom, (further.bottom[0], 552), (x, 552), (x, closing.y))
    save(
        ax,
        "story-walk",
        "The steps of a story",
        "Opening, hero, doing, weather and three facts follow each other. At the visit, Then has "
        "probability 0.7 and leads to an arrival: of a guest, in 4 of 7 cases, who brings a fact, "
        "or of a stranger, in 3 of 7. With probability 0.3 nobody comes, and one more fact about "
        "the hero is stated. A closing ends every story.",
    )
