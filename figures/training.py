"""The diagrams of chapter 13: the layers of the trainer, and what a kill leaves of a save."""

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

LAYERS = (
    ("the loop", "locks, Ctrl-C, sinks; goes on from a checkpoint", "the run was stopped", BLUE),
    ("checkpoints", "everything that the next step depends on", "the machine restarted", BLUE),
    ("measurements", "norms, ratios, scales, speed", "nobody knows since when it is wrong", GREEN),
    ("evaluation", "sums over counts; random states set back", "is it learning at all?", GREEN),
    ("guard", "skip what is not finite, or a spike", "one bad batch spoils every weight", ORANGE),
    ("steps", "divide, clip, set the rate, update", "it climbs, or diverges", GRAY),
    ("gradients", "micro-batches: sums and counts", "the batch does not fit", GRAY),
)


def draw_layers() -> None:
    """Seven classes, each on top of the one before, and why."""
    ax = canvas(720, 352)
    height, top = 38, 38
    label(ax, 205, 20, "layer, and what it adds", size=SMALL, color=GRAY)
    label(ax, 440, 20, "the failure that calls for it", size=SMALL, color=GRAY, align="left")
    for number, (name, note, failure, color) in enumerate(LAYERS):
        y = top + number * (height + 6)
        shape = box(ax, 30, y, 350, height, name, note, color=color, solid=number == 0)
        label(ax, 440, y + height / 2, failure, align="left", italic=True)
        arrow(ax, (432, y + height / 2), shape.right, color=GRAY)
    arrow(ax, (15, top + 7 * height + 36), (15, top), color=INK)
    save(
        ax,
        "training-layers",
        "The layers of the trainer",
        "Seven boxes, from the bottom up. Gradients: micro-batches, sums and counts, because the "
        "batch does not fit. Steps: divide, clip, set the rate, update, because training climbs or "
        "diverges. Guard: skip what is not finite, or a spike, because one bad batch spoils every "
        "weight. Evaluation: sums over counts, random states set back, because one asks whether it "
        "learns at all. Measurements: norms, ratios, scales, because nobody knows since when "
        "it is wrong. Checkpoints: everything that the next step depends on, because the machine "
        "restarted. The loop: locks, Ctrl-C, sinks, because the run was stopped.",
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
