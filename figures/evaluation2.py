"""The diagram of the second half of chapter 16: how a task of the harness reaches our model."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, arrow, box, canvas, label, save


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
