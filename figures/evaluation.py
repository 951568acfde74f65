"""The diagrams of chapter 16: cutting a question into tokens, and the way to the harness."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, arrow, box, canvas, cells, label, save


def draw_seam() -> None:
    """One text, encoded as a whole, in two parts with a lone space, and jointly."""
    ax = canvas(720, 190)
    width, left = 62, 196
    rows = (
        ("one text", ["She", "␣lives", "␣in", "␣the", "␣barn"], [BLUE] * 4 + [GREEN]),
        ("separate", ["She", "␣lives", "␣in", "␣the", "␣", "barn"], [BLUE] * 4 + [ORANGE, ORANGE]),
        ("joint", ["She", "␣lives", "␣in", "␣the", "␣barn"], [BLUE] * 4 + [GREEN]),
    )
    remarks = ("as in training", "never seen in training", "space goes to the answer")
    for row, ((name, words, colors), remark) in enumerate(zip(rows, remarks, strict=True)):
        y = 34 + 52 * row
        label(ax, left - 14, y + 9, name, align="right", bold=True)
        label(ax, left - 14, y + 24, remark, size=SMALL, color=GRAY, align="right")
        cells(ax, left, y, words, width=width, height=32, color=colors)
    label(ax, left + 2 * width, 16, "context", size=SMALL, color=BLUE)
    label(ax, left + 4.5 * width, 16, "answer", size=SMALL, color=GREEN)
    save(
        ax,
        "evaluation-seam",
        "The seam between context and answer",
        "The text She lives in the barn in three ways. As one text: She, space lives, space in, "
        "space the, space barn. Separate, with the space in the context: the context ends in a "
        "token for a lone space, the answer is barn without a space. Joint: the same tokens as "
        "one text, the last one being the answer.",
    )


def draw_harness() -> None:
    """A task makes requests of three kinds; the adapter passes each on to a function of ours."""
    ax = canvas(720, 236)
    box(ax, 8, 96, 108, 52, "task", "YAML and jsonl", color=GRAY)
    rows = (
        ("loglikelihood", "score_continuations", "acc, perplexity"),
        ("loglikelihood_rolling", "window_log_probs", "bits per byte"),
        ("generate_until", "generate", "exact match"),
    )
    label(ax, 224, 16, "requests", size=SMALL, color=GRAY)
    label(ax, 438, 16, "LMEvalAdapter", size=SMALL, color=GRAY, mono=True)
    label(ax, 638, 16, "metrics", size=SMALL, color=GRAY)
    for number, (request, function, metric) in enumerate(rows):
        y = 34 + 68 * number
        box(ax, 148, y, 152, 40, request, color=BLUE, mono=True, size=SMALL)
        box(ax, 362, y, 152, 40, function, color=ORANGE, mono=True, size=SMALL)
        box(ax, 576, y, 128, 40, metric, color=GREEN, size=SMALL)
        arrow(ax, (118, 122), (146, y + 20), color=GRAY)
        arrow(ax, (302, y + 20), (360, y + 20), color=GRAY)
        arrow(ax, (516, y + 20), (574, y + 20), color=GRAY)
    save(
        ax,
        "evaluation-harness",
        "A task of the harness on our model",
        "A task, written as YAML with its data as jsonl, becomes requests of three kinds. The "
        "adapter passes each kind on to a function of this book: score_continuations, "
        "window_log_probs and generate. The harness makes metrics of what comes back.",
    )
