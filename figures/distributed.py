"""The diagrams of chapter 18: a ring of ranks that add up their tensors."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, ORANGE, SMALL, arrow, canvas, cells, label, save


def ring_states(n: int) -> list[list[list[set[int]]]]:
    """After each step, for each rank and part: the ranks whose numbers are in it."""
    held = [[{rank} for _ in range(n)] for rank in range(n)]
    states = [[[set(part) for part in parts] for parts in held]]
    for step in range(2 * (n - 1)):
        before = [[set(part) for part in parts] for parts in held]
        for rank in range(n):
            part = (rank - step - 2) % n  # in the second round, counted from its own, the same
            if step < n - 1:
                held[rank][part] |= before[(rank - 1) % n][part]
            else:
                held[rank][part] = before[(rank - 1) % n][part]
        states.append([[set(part) for part in parts] for parts in held])
    return states


def draw_ring() -> None:
    """Three ranks, five states: two steps of reduce-scatter and two of all-gather."""
    ax = canvas(720, 210)
    n, width, left, step_width = 3, 33, 62, 134
    states = ring_states(n)
    titles = ("at first", "step 1", "step 2", "step 3", "step 4")
    for number, (title, state) in enumerate(zip(titles, states, strict=True)):
        x = left + step_width * number
        label(ax, x + 1.5 * width, 18, title, size=SMALL, color=GRAY)
        for rank, parts in enumerate(state):
            y = 36 + 52 * rank
            texts = ["+".join(map(str, sorted(part))) for part in parts]
            colors = [{1: BLUE, 2: ORANGE, 3: GREEN}[len(part)] for part in parts]
            cells(ax, x, y, texts, width=width, height=26, color=colors, size=SMALL)
            if number == 0:
                label(ax, 50, y + 13, f"rank {rank}", size=SMALL, align="right")
            if number < len(states) - 1 and rank < n - 1:
                here, there = (x + n * width + 3, y + 16), (x + step_width - 3, y + 62)
                arrow(ax, here, there, color=GRAY)
    label(ax, left + 1.95 * step_width, 196, "reduce-scatter", size=SMALL, color=GRAY, italic=True)
    label(ax, left + 3.95 * step_width, 196, "all-gather", size=SMALL, color=GRAY, italic=True)
    save(
        ax,
        "distributed-ring",
        "A ring all-reduce on three ranks",
        "Three rows for three ranks, five columns for the states. At first each rank has three "
        "parts of its own. In steps 1 and 2, reduce-scatter, each rank adds the part that arrives "
        "from the one before, until each has one part with the numbers of all three. In steps 3 "
        "and 4, all-gather, the complete parts are copied around, until all ranks have all three.",
    )
