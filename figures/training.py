"""The diagrams of chapter 13: the parts of the trainer, and what a kill leaves of a save."""

from __future__ import annotations

from style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    SMALL,
    arrow,
    box,
    bracket,
    canvas,
    label,
    save,
)

LOOP = (
    ("next batch", "a function of the step"),
    ("learn", "accumulate, divide, clip, update"),
    ("count", "report the step"),
    ("attend", "log, evaluate, save: what is due"),
)
PARTS = (
    ("objective", "sums and counts of micro-batches", "the batch does not fit", 1, GRAY),
    (
        "guard",
        "skips what is not finite, or a spike",
        "one bad batch spoils every weight",
        1,
        ORANGE,
    ),
    ("monitor", "means since the last row, speed", "nobody knows since when it is wrong", 2, GREEN),
    ("probes and sinks", "look on, and take what is logged", "is it learning at all?", 3, GREEN),
    ("checkpointer", "all that the next step depends on", "the machine restarted", 3, BLUE),
)


def draw_parts() -> None:
    """The loop of the trainer, the parts that it uses, and the failures that call for them."""
    ax = canvas(720, 300)
    label(ax, 115, 20, "the loop of the trainer", size=SMALL, color=GRAY)
    label(ax, 381, 20, "its parts", size=SMALL, color=GRAY)
    label(ax, 520, 20, "the failure that calls for it", size=SMALL, color=GRAY, align="left")
    steps = []
    for number, (name, note) in enumerate(LOOP):
        steps.append(box(ax, 30, 38 + 62 * number, 170, 44, name, note, color=BLUE, solid=False))
        if number:
            arrow(ax, (115, 20 + 62 * number), (115, 38 + 62 * number), color=INK)
    arrow(ax, (30, 246), (14, 246), (14, 60), (30, 60), color=INK)
    for number, (name, note, failure, step, color) in enumerate(PARTS):
        y = 38 + 50 * number
        shape = box(ax, 266, y, 230, 40, name, note, color=color)
        label(ax, 520, y + 20, failure, align="left", italic=True)
        arrow(ax, steps[step].right, shape.left, color=GRAY)
    save(
        ax,
        "training-parts",
        "The trainer and its parts",
        "On the left the loop of the trainer, four boxes in a circle: next batch, learn, count, "
        "attend. Learn uses the objective, which gives sums and counts of micro-batches because "
        "the batch does not fit, and the guard, which skips what is not finite or a spike because "
        "one bad batch spoils every weight. Count uses the monitor, with means since the last row "
        "and speed, because nobody knows since when it is wrong. Attend uses probes and sinks, "
        "which look on and take what is logged, because one asks whether it learns at all, and "
        "the checkpointer, with all that the next step depends on, because the machine restarted.",
    )


STAGES = (
    ("write the draft", "under another name", GRAY),
    ("fsync", "bytes are on the disk", GRAY),
    ("rename", "in one step", ORANGE),
    ("sweep", "only the last k stay", GRAY),
)
LEFT = (
    (("step-100", True), ("step-200", True), (".step-300.part", False)),
    (("step-100", True), ("step-200", True), (".step-300.part", False)),
    (("step-100", True), ("step-200", True), ("step-300", True)),
    (("step-200", True), ("step-300", True)),
)


def draw_checkpoint() -> None:
    """The stages of a save, and which files there are after a kill in each."""
    ax = canvas(720, 252)
    width, left = 150, 96
    label(ax, 84, 44, "save", align="right", bold=True)
    label(ax, 84, 128, "files after a\nkill here", size=SMALL, align="right")
    for number, ((name, note, color), files) in enumerate(zip(STAGES, LEFT, strict=True)):
        x = left + number * (width + 4)
        box(ax, x, 24, width - 10, 40, name, note, color=color)
        arrow(ax, (x + width / 2 - 5, 66), (x + width / 2 - 5, 94), color=GRAY, dashed=True)
        for place, (file, whole) in enumerate(files):
            y = 98 + 28 * place
            color = GREEN if whole else GRAY
            box(ax, x, y, width - 10, 24, color=color, dashed=not whole, radius=3)
            label(ax, x + width / 2 - 5, y + 12, file, size=SMALL, mono=True)
    bracket(ax, (left, 188), (left + 2 * width - 6, 188), "resumes from 200", color=GREEN)
    right = left + 2 * (width + 4)
    bracket(ax, (right, 188), (right + 2 * width - 6, 188), "resumes from 300", color=GREEN)
    label(ax, 402, 236, "dashed: swept away by the next save", size=SMALL, color=GRAY, italic=True)
    save(
        ax,
        "training-checkpoint",
        "What a kill leaves of a save",
        "Four stages of saving step 300: write the draft under another name, fsync, rename, sweep. "
        "After a kill in the first two there are the files of steps 100 and 200 and a draft, and "
        "training resumes from 200. After the rename there are 100, 200 and 300, after the sweep "
        "200 and 300, and training resumes from 300.",
    )
