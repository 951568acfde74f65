"""The diagrams of chapter 12: the loss in chunks, and which optimizer a parameter gets."""

from __future__ import annotations

from style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SMALL,
    arrow,
    box,
    bracket,
    canvas,
    cells,
    label,
    save,
)


def draw_chunks() -> None:
    """A chunk of hidden states on its way to the loss and to both gradients."""
    ax = canvas(720, 292)
    left, top, width, height = 14, 44, 92, 22
    label(ax, left + width / 2, 30, "hidden", bold=True)
    label(ax, left + width / 2, top + 8 * height + 14, "n × d_model", size=SMALL, color=GRAY)
    for row in range(8):
        color = BLUE if row in (2, 3) else GRAY
        box(ax, left, top + row * height, width, height, color=color, radius=2)
    bracket(
        ax,
        (left + width + 4, top + 4 * height - 2),
        (left + width + 4, top + 2 * height + 2),
        color=BLUE,
        depth=5,
    )
    label(ax, 140, top + 3 * height - 20, "times", size=SMALL)
    label(ax, 140, top + 3 * height - 8, "headᵀ", size=SMALL, mono=True)
    stages = (("logits", "z", BLUE), ("probabilities", "p", GREEN), ("gradient", "p − y", ORANGE))
    x, y, wide = 168, top + 2 * height, 128
    for number, (name, text, color) in enumerate(stages):
        at = x + number * 156
        for row in range(2):
            cells(ax, at, y + row * height, [text], width=wide, height=height, color=color)
        label(ax, at + wide / 2, y - 12, name, size=SMALL, color=color, bold=True)
        if number:
            arrow(ax, (at - 28, y + height), (at, y + height))
    arrow(ax, (left + width + 16, y + height), (x, y + height), color=BLUE)
    bracket(
        ax,
        (x, y + 2 * height + 6),
        (x + 2 * 156 + wide, y + 2 * height + 6),
        "one buffer, chunk × vocab_size, overwritten; freed, and made anew for the next chunk",
        depth=6,
    )
    loss = box(ax, 168, 202, 128, 46, "loss", "summed up", color=GREEN)
    rows = box(ax, 324, 202, 150, 46, "d hidden", "(p − y) · head: these rows", color=BLUE)
    head = box(ax, 502, 202, 178, 46, "d head", "(p − y)ᵀ · hidden: added", color=PURPLE)
    for target in (loss, rows, head):
        arrow(ax, (target.center[0], 172), target.top, color=GRAY)
    label(ax, loss.center[0], 260, "1 number", size=SMALL, color=GRAY)
    label(ax, rows.center[0], 260, "n × d_model", size=SMALL, color=GRAY)
    label(ax, head.center[0], 260, "vocab_size × d_model", size=SMALL, color=GRAY)
    label(ax, 424, 282, "what remains when all chunks are done", size=SMALL, color=INK, italic=True)
    save(
        ax,
        "optimization-chunks",
        "The loss, chunk by chunk",
        "Of eight rows of hidden states two are a chunk. Times the transposed head they give "
        "logits, overwritten by probabilities and then by p minus y, in one buffer of chunk by "
        "vocab_size that is freed, and made anew for the next chunk. From it come the summed loss, "
        "the gradient of hidden, whose rows are p minus y times the head, and the gradient of the "
        "head, to which p minus y transposed times hidden is added.",
    )


def draw_groups() -> None:
    """Four kinds of parameters, and for each its optimizer and its decay."""
    ax = canvas(720, 236)
    columns = (
        (14, 196, "parameter"),
        (222, 206, "why"),
        (440, 130, "optimizer"),
        (582, 124, "decay"),
    )
    for x, width, name in columns:
        label(ax, x + width / 2, 18, name, bold=True)
    kinds = (
        (
            "embedding",
            "also if tied to the head",
            "a table: rows are looked up",
            "AdamW",
            "none",
            BLUE,
        ),
        ("gains, biases", "vectors", "nothing gained if small", "AdamW", "none", GREEN),
        (
            "matrices of blocks",
            "experts too, as a stack",
            "they act on vectors",
            "Muon",
            "yes",
            ORANGE,
        ),
        ("head", "if it is not tied", "a row for each token", "AdamW", "yes", PURPLE),
    )
    for number, (name, note, why, optimizer, decay, color) in enumerate(kinds):
        y = 36 + 50 * number
        for (x, width, _), text, small in zip(
            columns, (name, "", optimizer, decay), (note, why, "", ""), strict=True
        ):
            solid = text == "Muon"
            box(ax, x, y, width, 42, text, small, color=color, solid=solid)
    save(
        ax,
        "optimization-groups",
        "Which optimizer and which decay",
        "Embedding, also if tied: AdamW, no decay, as it is a table whose rows are looked up. "
        "Gains and biases: AdamW, no decay. Matrices of the blocks, stacks of experts too: Muon, "
        "with decay, as they act on vectors. A head that is not tied: AdamW, with decay.",
    )
