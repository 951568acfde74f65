"""The diagrams of chapter 09: soft look-up, matrices, heads, caches, tiles, an induction head."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from style import (
    BLUE,
    FAINT,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SMALL,
    Box,
    arrow,
    box,
    canvas,
    cells,
    label,
    save,
    tint,
)


def grid(
    ax: Axes, x: float, y: float, rows: int, columns: int, *, size: float = 14, color: str = GRAY
) -> Box:
    """Draw a matrix as a grid of cells; ``color`` may name one for each column."""
    colors = [color] * columns if isinstance(color, str) else color
    for row in range(rows):
        for column in range(columns):
            ax.add_patch(
                Rectangle(
                    (x + column * size, y + row * size),
                    size,
                    size,
                    facecolor=tint(colors[column], 0.25),
                    edgecolor=PAPER,
                    linewidth=1,
                )
            )
    ax.add_patch(
        Rectangle((x, y), columns * size, rows * size, fill=False, edgecolor=INK, linewidth=0.9)
    )
    return Box(x, y, columns * size, rows * size)


def draw_lookup() -> None:
    """A dictionary that finds nothing, and a soft look-up that mixes."""
    ax = canvas(720, 222)
    label(ax, 10, 16, "a dictionary", align="left", bold=True)
    ask = box(ax, 10, 86, 56, 28, "pie", color=ORANGE, mono=True)
    rows = (("bread", "220"), ("cake", "180"), ("meringue", "100"))
    for number, (key, value) in enumerate(rows):
        y = 42 + 44 * number
        one = box(ax, 122, y, 84, 28, key, color=BLUE, mono=True)
        box(ax, 206, y, 48, 28, value, color=GREEN, mono=True)
        arrow(ax, ask.right, one.left, color=GRAY)
        label(ax, 104, (48, 91, 152)[number], "≠", color=GRAY)
    label(ax, 164, 32, "keys", size=SMALL, color=BLUE)
    label(ax, 230, 32, "values", size=SMALL, color=GREEN)
    label(ax, 164, 190, "KeyError: 'pie'", mono=True, color=ORANGE)

    left = 308
    label(ax, left, 16, "soft look-up", align="left", bold=True)
    ask = box(ax, left, 82, 66, 36, "pie", "(1, −1)", color=ORANGE, size=9)
    soft = (
        ("bread", "(−2, 0)", "−2", 0.0064, "220"),
        ("cake", "(2, −1)", "3", 0.946499, "180"),
        ("meringue", "(2, 2)", "0", 0.0471, "100"),
    )
    for number, (key, vector, score, weight, value) in enumerate(soft):
        y = 38 + 44 * number
        one = box(ax, left + 92, y, 78, 36, key, vector, color=BLUE, size=9)
        arrow(ax, ask.right, one.left, color=GRAY)
        label(ax, left + 194, y + 18, score, mono=True)
        ax.add_patch(Rectangle((left + 222, y + 10), 76, 16, facecolor=FAINT, edgecolor="none"))
        ax.add_patch(
            Rectangle((left + 222, y + 10), 76 * weight, 16, facecolor=PURPLE, edgecolor="none")
        )
        label(ax, left + 304, y + 18, f"{weight:.3f}", size=SMALL, align="left", color=PURPLE)
        box(ax, left + 344, y + 4, 52, 28, value, color=GREEN, mono=True)
    label(ax, left + 131, 28, "keys", size=SMALL, color=BLUE)
    label(ax, left + 194, 28, "scores", size=SMALL)
    label(ax, left + 260, 28, "weights (softmax)", size=SMALL, color=PURPLE)
    label(ax, left + 370, 28, "values", size=SMALL, color=GREEN)
    label(
        ax,
        left + 202,
        190,
        "0.006 · 220 + 0.946 · 180 + 0.047 · 100 = 176",
        mono=True,
        size=9,
    )
    save(
        ax,
        "attention-lookup",
        "A dictionary and a soft look-up",
        "Left: the query pie is compared with the keys bread, cake and meringue; none is "
        "equal, and the result is a KeyError. Right: keys and query are vectors; the scores "
        "of pie with bread, cake and meringue are -2, 3 and 0, the weights 0.006, 0.946 "
        "and 0.047, and the answer is the weighted mean of 220, 180 and 100, which is 176.",
    )


def draw_flow() -> None:
    """From the vectors of tokens to what they have gathered, with shapes."""
    ax = canvas(720, 270)
    x = grid(ax, 40, 86, 6, 4, size=15)
    label(ax, x.center[0], 74, "x", bold=True)
    label(ax, x.center[0], 190, "n × d_model", size=SMALL)
    parts = []
    for number, (name, color) in enumerate((("Q", ORANGE), ("K", BLUE), ("V", GREEN))):
        y = 14 + 88 * number
        part = grid(ax, 200, y, 6, 2, size=12, color=color)
        arrow(ax, x.right, part.left, color=GRAY)
        label(ax, 236, y + 26, name, bold=True, color=color, align="left")
        label(ax, 236, y + 44, "n × d", size=SMALL, align="left")
        parts.append(part)
    for at_x, at_y, name, color in (
        (136, 76, "W_Q", ORANGE),
        (152, 122, "W_K", BLUE),
        (136, 192, "W_V", GREEN),
    ):
        ax.text(at_x, at_y, f"${name}$", fontsize=10, color=color, ha="center")
    weights_x = 372
    for row in range(6):
        for column in range(6):
            strength = 0.75 if (row, column) == (4, 1) else 0.2 if column <= row else 0.0
            ax.add_patch(
                Rectangle(
                    (weights_x + 16 * column, 42 + 16 * row),
                    16,
                    16,
                    facecolor=tint(PURPLE, strength),
                    edgecolor=PAPER,
                    linewidth=1,
                )
            )
    weights = Box(weights_x, 42, 96, 96)
    ax.add_patch(Rectangle((weights_x, 42), 96, 96, fill=False, edgecolor=INK, linewidth=0.9))
    label(ax, weights.center[0], 30, "weights", bold=True, color=PURPLE)
    label(ax, weights.center[0], 152, "n × n", size=SMALL)
    arrow(ax, (282, 50), (weights_x, 78), color=ORANGE)
    arrow(ax, (282, 138), (weights_x, 106), color=BLUE)
    label(ax, 328, 44, "scores", size=SMALL, color=GRAY)
    label(ax, 328, 150, "÷ √d, mask,", size=SMALL, color=GRAY)
    label(ax, 328, 162, "softmax", size=SMALL, color=GRAY)
    out = grid(ax, 590, 86, 6, 2, size=15, color=PURPLE)
    label(ax, out.center[0], 74, "output", bold=True)
    label(ax, out.center[0], 190, "n × d", size=SMALL)
    arrow(ax, weights.right, (out.x, 116), color=PURPLE)
    arrow(ax, (282, 225), (540, 225), (540, 148), (out.x, 148), color=GREEN)
    label(ax, 410, 216, "values, mixed with the weights of each row", size=SMALL, color=GREEN)
    label(ax, 40, 250, "each token by itself", size=SMALL, align="left", color=GRAY)
    label(ax, weights.center[0], 250, "tokens meet only here", size=SMALL, color=GRAY)
    label(ax, 690, 250, "each token by itself", size=SMALL, align="right", color=GRAY)
    save(
        ax,
        "attention-flow",
        "Attention as a flow of matrices",
        "x, n by d_model, is multiplied by W_Q, W_K and W_V to Q, K and V, n by d each. Q and "
        "K give n by n scores, which are divided by the root of d, masked, and put through "
        "softmax. The weights mix the rows of V to the output, n by d. Tokens meet only in "
        "the weights.",
    )


def draw_heads() -> None:
    """A wide matrix, cut into heads and put together again."""
    ax = canvas(720, 200)
    both = [BLUE, BLUE, ORANGE, ORANGE]
    wide = grid(ax, 20, 50, 6, 4, size=16, color=both)
    label(ax, wide.center[0], 36, "x W", bold=True)
    label(ax, wide.center[0], 162, "(6, 4)", size=SMALL, mono=True)
    split = [
        grid(ax, 168 + 44 * h, 50, 6, 2, size=16, color=c) for h, c in ((0, BLUE), (1, ORANGE))
    ]
    label(ax, 206, 36, "view", bold=True)
    label(ax, 206, 162, "(6, 2, 2)", size=SMALL, mono=True)
    arrow(ax, wide.right, split[0].left)
    heads = [
        grid(ax, 330, 14, 6, 2, size=13, color=BLUE),
        grid(ax, 366, 60, 6, 2, size=13, color=ORANGE),
    ]
    label(ax, 326, 158, "transpose", bold=True, align="left")
    label(ax, 326, 174, "(2, 6, 2): heads in front", size=SMALL, align="left")
    arrow(ax, split[1].right, (heads[0].x, 98))
    attend = box(ax, 452, 76, 84, 44, "attention", "in each head", color=PURPLE)
    arrow(ax, (394, 98), attend.left)
    out = grid(ax, 600, 50, 6, 4, size=16, color=both)
    arrow(ax, attend.right, out.left)
    label(ax, out.center[0], 36, "side by side", bold=True)
    label(ax, out.center[0], 162, "(6, 4), then W_O", size=SMALL, mono=True)
    save(
        ax,
        "attention-heads",
        "From a wide matrix to heads and back",
        "A matrix of 6 rows and 4 columns, two columns for each of two heads. View makes 6 by "
        "2 by 2 of it, transpose 2 by 6 by 2: heads in front. After attention in each head "
        "the columns stand side by side again, 6 by 4, and the output projection mixes them.",
    )


def draw_kinds() -> None:
    """Which heads of queries read which keys and values."""
    ax = canvas(720, 208)
    kinds = (
        ("multi-head", [0, 1, 2, 3]),
        ("grouped-query", [0, 0, 1, 1]),
        ("multi-query", [0, 0, 0, 0]),
        ("latent", [0, 1, 2, 3]),
    )
    for number, (name, reads) in enumerate(kinds):
        left = 62 + 166 * number
        label(ax, left + 74, 14, name, bold=True)
        latent = name == "latent"
        n = max(reads) + 1
        width = 34
        places = [left + (148 - n * 38 + 4) / 2 + 38 * h for h in range(n)]
        for head, target in enumerate(reads):
            q = box(ax, left + 38 * head, 32, width, 24, "q", color=ORANGE, radius=3)
            arrow(ax, q.bottom, (places[target] + width / 2, 92), color=GRAY)
        for place in places:
            box(ax, place, 92, width, 28, "k, v", color=BLUE, solid=not latent, dashed=latent,
                radius=3, size=9)  # fmt: skip
        if latent:
            c = box(ax, left + 42, 154, 64, 28, "latent", color=GREEN, solid=True, radius=3, size=9)
            for place in places:
                arrow(ax, (c.center[0], c.y), (place + width / 2, 120), color=GREEN)
        cached = {"multi-head": "8", "grouped-query": "4", "multi-query": "2"}.get(name)
        if cached:
            label(ax, left + 74, 142, f"kept: {cached} vectors of d", size=SMALL, color=BLUE)
        else:
            label(ax, left + 74, 198, "kept: the latent", size=SMALL, color=GREEN)
    for y, text in ((44, "queries"), (106, "keys,\nvalues")):
        label(ax, 6, y, text, size=SMALL, align="left", color=GRAY)
    save(
        ax,
        "attention-kinds",
        "Multi-head, grouped-query, multi-query and latent attention",
        "Four heads of queries in each of four panels. Multi-head: four keys and values, one "
        "for each. Grouped-query: two, each read by two heads. Multi-query: one, read by all. "
        "Latent: four that are not kept but made from one latent vector, which is.",
    )


def draw_cache() -> None:
    """Slots of a cache for rows of unequal lengths, and a ring."""
    ax = canvas(720, 268)
    size = 40
    label(ax, 20, 16, "no window: 8 slots, position t in slot t", align="left", bold=True)
    for row, length in enumerate((5, 3, 6)):
        y = 44 + 32 * row
        label(ax, 20, y + 12, f"row {row}", size=SMALL, align="left")
        texts = [str(p) if p < length else "" for p in range(8)]
        colors = [BLUE if p < length else FAINT for p in range(8)]
        cells(ax, 70, y, texts, width=size, height=24, color=colors)
        box(ax, 70 + size * length, y, size, 24, "next", color=ORANGE, radius=2, size=SMALL)
        label(ax, 404, y + 12, f"length {length}", size=SMALL, align="left", color=GRAY)
    for slot in range(8):
        label(ax, 70 + size * (slot + 0.5), 36, str(slot), size=SMALL, color=GRAY)

    top = 166
    label(ax, 20, top, "window of 4: a ring of 4 slots, position t in slot t mod 4", align="left",
          bold=True)  # fmt: skip
    stages = (("length 3", [0, 1, 2, None], 3), ("length 6", [4, 5, 2, 3], 2),
              ("length 7", [4, 5, 6, 3], 3))  # fmt: skip
    for number, (name, held, following) in enumerate(stages):
        left = 70 + 220 * number
        y = top + 34
        for slot in range(4):
            label(ax, left + size * (slot + 0.5), y - 8, str(slot), size=SMALL, color=GRAY)
        cells(ax, left, y, ["" if p is None else str(p) for p in held], width=size, height=24,
              color=[FAINT if p is None else BLUE for p in held])  # fmt: skip
        at = left + size * (following + 0.5)
        position = {3: 3, 6: 6, 7: 7}[int(name[-1])]
        arrow(ax, (at, y + 50), (at, y + 24), color=ORANGE)
        label(ax, at, y + 58, f"next: {position}", size=SMALL, color=ORANGE)
        label(ax, left, y + 58, name, size=SMALL, align="left", color=GRAY)
    save(
        ax,
        "attention-cache",
        "Slots of a cache, and of a ring",
        "Without a window there are eight slots for each row. Row 0 has positions 0 to 4, row "
        "1 has 0 to 2, row 2 has 0 to 5; the next token goes into the slot after them. With a "
        "window of 4 there are four slots: at length 3 they hold 0, 1, 2 and nothing; at "
        "length 6, 4, 5, 2, 3, and position 6 will overwrite 2; at length 7, 4, 5, 6, 3, and "
        "position 7 will overwrite 3.",
    )


def draw_tiles() -> None:
    """Tiles of a causal matrix of scores, and what passes along a row of them."""
    ax = canvas(720, 262)
    left, top, size = 96, 40, 50
    for row in range(4):
        for column in range(4):
            x, y = left + size * column, top + size * row
            if column > row:
                box(ax, x, y, size, size, color=GRAY, paper=PAPER, dashed=True, radius=1)
                if row != 2:  # an arrow passes there
                    label(ax, x + size / 2, y + size / 2, "skip", size=SMALL, color=GRAY)
                continue
            active = row == 2
            box(ax, x, y, size, size, color=PURPLE if active else BLUE, radius=1)
            if column == row:
                corner = ((x + 1, y + 1), (x + size - 1, y + 1), (x + size - 1, y + size - 1))
                ax.fill(*zip(*corner, strict=True), color=PAPER, zorder=2)
    for n in range(4):
        label(ax, left + size * (n + 0.5), top - 10, f"K{'₁₂₃₄'[n]}, V{'₁₂₃₄'[n]}", size=SMALL)
        label(ax, left - 10, top + size * (n + 0.5), f"Q{'₁₂₃₄'[n]}", size=SMALL, align="right")
    y = top + 2.5 * size
    for column in range(2):
        arrow(ax, (left + size * (column + 0.5), y), (left + size * (column + 1.5), y), width=1.6)
    label(ax, left + 2 * size, top + 4 * size + 14, "blocks of keys", size=SMALL, color=GRAY)
    x = 352
    arrow(ax, (left + size * 2.5, y), (x, y), width=1.6)
    steps = box(ax, x, 46, 348, 84, color=PURPLE)
    label(ax, x + 12, 60, "in each tile", size=SMALL, align="left", bold=True)
    for line, text in enumerate(
        (
            "S = Q₃ Kⱼᵀ / √d,   m′ = max(m, largest of S)",
            "ℓ ← exp(m − m′) ℓ + sum of exp(S − m′)",
            "a ← exp(m − m′) a + exp(S − m′) Vⱼ,   m ← m′",
        )
    ):
        label(ax, x + 12, 78 + 17 * line, text, size=9, align="left")
    done = box(ax, x, 148, 348, 34, color=GREEN)
    label(ax, x + 12, 165, "at the end of the row:  O₃ = a / ℓ,   L₃ = m + log ℓ", size=9,
          align="left")  # fmt: skip
    arrow(ax, steps.bottom, done.top)
    label(ax, x, 204, "kept for the backward pass: Q, K, V, O and L, all linear in n", size=SMALL,
          align="left", color=GRAY)  # fmt: skip
    label(ax, x, 218, "never in memory as a whole: the n × n scores and weights", size=SMALL,
          align="left", color=GRAY)  # fmt: skip
    save(
        ax,
        "attention-tiles",
        "Causal attention in tiles",
        "A matrix of 4 by 4 tiles, blocks of queries downward and of keys to the right. Tiles "
        "above the diagonal are skipped, those on it are masked in part. Along the third row "
        "m, l and a pass from tile to tile; in each tile scores are made, the maximum "
        "updated, and l and a rescaled and added to. At the end of the row the output a / l "
        "and the log-sum-exp m + log l are kept.",
    )


def draw_induction() -> None:
    """The two heads that complete a pattern."""
    ax = canvas(720, 238)
    tokens = ["ra", "ka", "mo", "ti", "ra", "ka"]
    width, left = 84, 40
    middle = [left + width * (n + 0.5) for n in range(7)]
    rows = {"tokens": 196, "after layer 1": 118, "after layer 2": 40}
    for name, y in rows.items():
        label(ax, left + 7 * width + 4, y + 13, name, size=SMALL, align="left", color=GRAY)
    boxes = []
    for n, token in enumerate(tokens):
        color = BLUE if token == "ka" else GREEN if token == "mo" else GRAY
        boxes.append(box(ax, left + width * n + 12, 196, 60, 26, token, color=color, mono=True))
        if n not in (2, 5):
            box(ax, left + width * n + 12, 118, 60, 26, token, color=color, mono=True)
    noted = box(ax, middle[2] - 38, 112, 76, 38, "mo", "“after ka”", color=GREEN)
    asks = box(ax, middle[5] - 38, 112, 76, 38, "ka", "“after ka?”", color=BLUE)
    result = box(ax, middle[5] - 38, 34, 76, 38, "mo", "comes next", color=GREEN, solid=True)
    arrow(ax, boxes[1].top, (noted.x + 14, noted.y + noted.height), color=ORANGE, width=1.8)
    arrow(ax, boxes[2].top, noted.bottom, color=GRAY)
    arrow(ax, boxes[5].top, asks.bottom, color=GRAY)
    arrow(ax, asks.top, result.bottom, color=GRAY)
    arrow(ax, noted.top, (result.x, result.center[1]), color=PURPLE, width=1.8)
    label(ax, middle[1] - 30, 170, "previous-token head", size=SMALL, color=ORANGE)
    label(ax, middle[3] + 4, 62, "induction head: its query finds that note", size=SMALL,
          color=PURPLE, align="right")  # fmt: skip
    save(
        ax,
        "attention-induction",
        "An induction head and its partner",
        "The tokens are ra, ka, mo, ti, ra, ka. In layer 1 the previous-token head writes "
        "into mo that it stands after ka. In layer 2 the last ka asks which token stands "
        "after ka, finds mo, and copies it: mo comes next.",
    )
