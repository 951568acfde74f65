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
    n, width, height, left, rank_width, pitch = 3, 29, 24, 58, 105, 58  # as narrow as a phone
    ax = canvas(left + n * rank_width - 13, 18 + 4 * pitch + height + 4)
    states = ring_states(n)
    names = ("at first", "step 1", "step 2", "step 3", "step 4")
    for rank in range(n):
        middle = left + rank * rank_width + n * width / 2
        label(ax, middle, 8, f"rank {rank}", size=SMALL, color=GRAY)
    for number, (name, state) in enumerate(zip(names, states, strict=True)):
        y = 20 + pitch * number
        label(ax, left - 10, y + height / 2, name, size=SMALL, align="right")
        for rank, parts in enumerate(state):
            texts = ["+".join(map(str, sorted(part))) for part in parts]
            colors = [{1: BLUE, 2: ORANGE, 3: GREEN}[len(part)] for part in parts]
            x = left + rank * rank_width
            cells(ax, x, y, texts, width=width, height=height, color=colors, size=SMALL)
            if number < len(states) - 1 and rank < n - 1:
                part = (rank - number - 1) % n  # which it passes on, in both halves
                start = (x + (part + 0.5) * width, y + height + 2)
                arrow(ax, start, (start[0] + rank_width, y + pitch - 2), color=GRAY)
        if number < len(states) - 1:
            half = "reduce-scatter" if number < n - 1 else "all-gather"
            y += (height + pitch) / 2
            label(ax, 2, y, half, size=SMALL, color=GRAY, align="left", italic=True)
    save(
        ax,
        "distributed-ring",
        "A ring all-reduce on three ranks",
        "Three columns for three ranks, five rows for the states. At first each rank has three "
        "parts of its own. In steps 1 and 2, reduce-scatter, each rank adds the part that arrives "
        "from the one before, until each has one part with the numbers of all three. In steps 3 "
        "and 4, all-gather, the complete parts are copied around, until all ranks have all three.",
    )
