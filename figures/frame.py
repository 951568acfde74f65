"""Two diagrams about the book itself: what it builds, and what becomes of a chapter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SMALL,
    TITLE,
    Box,
    arrow,
    box,
    canvas,
    label,
    save,
)


@dataclass(frozen=True)
class Part:
    """A part of the book, a band of the picture; its steps are ``(chapters, name, detail)``."""

    numeral: str
    title: str
    chapters: str
    color: str
    steps: tuple[tuple[str, str, str], ...]


PARTS = (
    Part(
        "I",
        "Foundations\nand data",
        "chapters 00–07",
        BLUE,
        (
            ("01 02", "raw text", "stories, web"),
            ("03", "clean", "filter, mask"),
            ("04", "deduplicate", "MinHash, LSH"),
            ("05 06", "tokens", "BPE, Unigram"),
            ("07", "batches", "shards, packing"),
        ),
    ),
    Part(
        "II",
        "Architecture",
        "chapters 08–11",
        GREEN,
        (
            ("08", "embedding", "and RoPE"),
            ("09", "attention", "heads, cache"),
            ("10", "SwiGLU", "norms, experts"),
            ("11", "logits", "the whole model"),
        ),
    ),
    Part(
        "III",
        "Pretraining",
        "chapters 12–18",
        ORANGE,
        (
            ("12", "loss, optimizer", "AdamW, Muon"),
            ("13 15 18", "training loop", "bf16, many devices"),
            ("14", "base model", "sampling"),
            ("16 17", "evaluation", "scaling laws"),
        ),
    ),
    Part(
        "IV",
        "Alignment",
        "chapters 19–25",
        PURPLE,
        (
            ("19 20", "instruction tuning", "chat format, LoRA"),
            ("21 22", "preferences", "RLHF, DPO"),
            ("23 24", "rewards, tools", "GRPO, reasoning"),
            ("25", "assistant", "chat, serve"),
        ),
    ),
)


def draw_pipeline() -> None:
    """The whole book: from raw text to an assistant, one band for each part."""
    band_height, pitch, left, right = 94, 116, 124, 702
    ax = canvas(720, 3 * pitch + band_height + 8)
    rows = []
    for number, part in enumerate(PARTS):
        y = 4 + number * pitch
        box(ax, 4, y, 712, band_height, color=part.color, radius=8)
        label(ax, 18, y + 21, part.numeral, size=15, bold=True, color=part.color, align="left")
        for line, words in enumerate(part.title.splitlines()):
            label(ax, 18, y + 41 + 16 * line, words, size=TITLE, bold=True, align="left")
        below = y + 45 + 16 * len(part.title.splitlines())
        label(ax, 18, below, part.chapters, size=SMALL, align="left")
        rows.append(_steps(ax, part, y + 21, left, right))
    _repeated(ax, rows[1][1], rows[1][2], GREEN)
    for upper, lower in pairwise(rows):
        _carry_on(ax, upper[-1], lower[0])
    save(
        ax,
        "pipeline",
        "From raw text to assistant",
        "Four bands, one for each part of the book. Part I, foundations and data: raw text is "
        "cleaned, deduplicated, cut into tokens and packed into batches. Part II, architecture: "
        "embedding and RoPE, then attention and SwiGLU, repeated N times, then logits. Part III, "
        "pretraining: loss and optimizer, training loop, base model, evaluation. Part IV, "
        "alignment: instruction tuning, preferences, rewards and tools, and the assistant.",
    )


def _steps(ax: Axes, part: Part, y: float, left: float, right: float) -> list[Box]:
    """Draw the boxes of a part from ``left`` to ``right``, each with its chapters' numbers."""
    gap, height = 24, 48
    width = (right - left - gap * (len(part.steps) - 1)) / len(part.steps)
    row: list[Box] = []
    for number, (chapters, step, detail) in enumerate(part.steps):
        goal = step == "assistant"
        ink = PAPER if goal else INK
        x = left + number * (width + gap)
        frame = box(ax, x, y, width, height, color=part.color, paper=PAPER, solid=goal)
        label(ax, frame.center[0], y + 22, step, bold=True, color=ink)
        label(ax, frame.center[0], y + 36, detail, size=SMALL, color=ink)
        _tabs(ax, x + 8, y - 7, chapters.split(), part.color, solid=not goal)
        if row:
            arrow(ax, row[-1].right, frame.left, color=part.color)
        row.append(frame)
    return row


def _tabs(ax: Axes, x: float, y: float, numbers: list[str], color: str, *, solid: bool) -> None:
    """Draw chapter numbers as tabs on a box."""
    for number in numbers:
        tab = box(ax, x, y, 20, 13, color=color, paper=PAPER, solid=solid, radius=4)
        label(ax, *tab.center, number, size=SMALL, bold=True, color=PAPER if solid else color)
        x += 23


def _repeated(ax: Axes, first: Box, last: Box, color: str) -> None:
    """Lead back from ``last`` to ``first``: the block is applied N times."""
    low = last.bottom[1] + 13
    arrow(ax, last.bottom, (last.bottom[0], low), (first.bottom[0], low), first.bottom, color=color)
    middle = (first.bottom[0] + last.bottom[0]) / 2
    tab = box(ax, middle - 22, low - 6.5, 44, 13, color=color, paper=PAPER, radius=4)
    label(ax, *tab.center, "× N", size=SMALL, bold=True)


def _carry_on(ax: Axes, end: Box, start: Box) -> None:
    """Lead from the end of one band to the start of the next."""
    turn = (end.bottom[1] + start.top[1]) / 2
    arrow(ax, end.bottom, (end.bottom[0], turn), (start.top[0], turn), start.top, color=INK)


def draw_press() -> None:
    """A chapter's way: from a source that people review to a package and a site."""
    ax = canvas(720, 212)
    upper, lower, height = 10, 148, 54
    source = box(
        ax, 10, upper, 142, height, "NN_name.py", "written, reviewed", color=BLUE, mono=True
    )
    notebook = box(
        ax, 232, upper, 142, height, "NN_name.ipynb", "run, with its outputs", color=BLUE, mono=True
    )
    module = box(
        ax, 454, upper, 122, height, "llmbook/name.py", "exported cells", color=GREEN, mono=True
    )
    later = box(ax, 636, upper, 74, height, "later\nchapters", color=GREEN)
    arrow(ax, source.right, notebook.left, both=True, text="jupytext")
    arrow(ax, notebook.right, module.left, text="nbdev")
    arrow(ax, module.right, later.left, text="import")

    site = box(ax, 10, lower, 142, height, "the site", "pages and API reference", color=PURPLE)
    outputs = box(ax, 232, lower, 142, height, "nbval", "every output compared", color=ORANGE)
    tests = box(ax, 454, lower, 122, height, "tests", "ours against theirs", color=ORANGE)
    arrow(ax, notebook.bottom, outputs.top)
    arrow(ax, module.bottom, tests.top)
    # Jupyter Book reads the notebook for the page and the module for the reference.
    turn, start = 106, notebook.x + 34
    arrow(ax, (start, notebook.bottom[1]), (start, turn), (site.top[0], turn), site.top)
    label(ax, (start + site.top[0]) / 2, turn - 8, "Jupyter Book", size=SMALL)
    save(
        ax,
        "press",
        "What becomes of a chapter",
        "NN_name.py and NN_name.ipynb are one chapter, kept alike by jupytext. nbdev exports cells "
        "of the notebook into llmbook/name.py, which later chapters import. nbval runs every "
        "notebook anew and compares its outputs, tests check the module, and Jupyter Book builds "
        "the site from the notebook and its stored outputs.",
    )
