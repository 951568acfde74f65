"""The diagrams of chapter 11: from text to probabilities, and one block in three kinds of files."""

from __future__ import annotations

from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import Circle
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
)

TOKENS = ("M", "i", "a", "lives", "in", "the", "b", "ar", "n", ".")
IDS = ("77", "105", "97", "417", "308", "260", "264", "271", "110", "46")


def draw_flow() -> None:
    """The whole model with the shapes of the preset tiny, and one of its blocks opened."""
    ax = canvas(720, 500)
    left, width = 16.0, 330.0
    middle = left + width / 2
    label(ax, middle, 16, "“Mia lives in the barn.”", italic=True)
    cells(ax, left, 30, TOKENS, width=width / 10, height=24, color=ORANGE, size=SMALL)
    ids = cells(ax, left, 56, IDS, width=width / 10, height=24, color=GRAY, size=SMALL)
    steps = (
        ("embedding", "a row of 64 numbers for each id", BLUE, 42, "(1, 10)"),
        ("three blocks", "each adds to the vectors", GREEN, 56, "(1, 10, 64)"),
        ("norm", "", GRAY, 28, "(1, 10, 64)"),
        ("lm_head", "a row of 64 numbers for each of 512 tokens", BLUE, 42, "(1, 10, 64)"),
        ("softmax", "", GRAY, 28, "(1, 10, 512)"),
    )
    y, start, blocks = 80.0, (middle, ids[0].y + 24), None
    for name, note, color, height, shape in steps:
        y += 26
        if name == "three blocks":
            for shift in (8, 4):
                box(ax, left + 40 + shift, y - shift, width - 80, height, color=color)
        part = box(ax, left + 40, y, width - 80, height, name, note, color=color)
        arrow(ax, start, part.top if name != "three blocks" else (middle, y - 8))
        label(ax, middle + 10, y - 14, shape, size=SMALL, align="left", mono=True)
        blocks = part if name == "three blocks" else blocks
        start, y = part.bottom, y + height
    arrow(ax, start, (middle, y + 26))
    label(ax, middle + 10, y + 12, "(1, 10, 512)", size=SMALL, align="left", mono=True)
    following = (*TOKENS[1:], "?")
    cells(ax, left, y + 28, following, width=width / 10, height=24, color=PURPLE, size=SMALL)
    words = "at each place: probabilities of the token that comes next"
    label(ax, middle, y + 66, words, size=SMALL)
    _open_block(ax, blocks)
    save(
        ax,
        "model-flow",
        "From text to probabilities of the next token",
        "The text Mia lives in the barn becomes ten ids of shape 1 by 10, then vectors of shape "
        "1 by 10 by 64. Three blocks, a normalization and the head follow, which makes logits of "
        "shape 1 by 10 by 512; the softmax makes probabilities of the next token at each place. "
        "A block is opened: norm, three maps to q, k and v with 2 heads of 10 by 32, rotation of "
        "q and k, attention with 2 times 10 by 10 weights, the output map, added to the stream; "
        "norm, gate and up of 10 by 176, SwiGLU, down, added to the stream.",
    )


def _open_block(ax: Axes, block: Box) -> None:
    """One block, its stream at the left and what is added to it at the right."""
    frame = box(ax, 404, 30, 308, 446, color=GREEN, paper=PAPER, radius=8)
    for corner, y in (((frame.x, frame.y + 6), block.y - 8), ((frame.x, 470), block.y + 56)):
        ax.plot((block.x + block.width + 8, corner[0]), (y, corner[1]), color=FAINT, zorder=0)
    label(ax, frame.x + 10, 46, "a block", bold=True, align="left", color=GREEN)
    stream, x, width = 424.0, 456.0, 246.0
    plus = {"attention": 258.0, "feed-forward": 430.0}
    norm = box(ax, x, 62, width, 24, "attention_norm", color=GRAY, mono=True, size=SMALL)
    third = (width - 12) / 3
    maps = [
        box(ax, x + i * (third + 6), 100, third, 36, name, "2 × (10, 32)", color=BLUE, size=SMALL)
        for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
    ]
    rope = box(ax, x, 150, 2 * third + 6, 22, "rotate by position", color=ORANGE, size=SMALL)
    heads = box(ax, x, 186, width, 40, "attention", "2 heads, weights (10, 10)", color=BLUE)
    output = box(ax, x, 240, width, 36, "o_proj", "(10, 64)", color=BLUE, size=SMALL)
    for part in maps:
        arrow(ax, (part.top[0], norm.y + 24), part.top)
        arrow(ax, part.bottom, (part.top[0], heads.y if part is maps[2] else rope.y))
    for part in maps[:2]:
        arrow(ax, (part.top[0], rope.y + 22), (part.top[0], heads.y))
    arrow(ax, heads.bottom, output.top)
    second = box(ax, x, 300, width, 24, "feed_forward_norm", color=GRAY, mono=True, size=SMALL)
    half = (width - 6) / 2
    pair = [
        box(ax, x + i * (half + 6), 338, half, 34, name, "(10, 176)", color=GREEN, size=SMALL)
        for i, name in enumerate(("gate_proj", "up_proj"))
    ]
    down = box(ax, x, 412, width, 36, "down_proj", "(10, 64)", color=GREEN, size=SMALL)
    gate = box(ax, x, 382, width, 20, "SwiGLU", color=ORANGE, size=SMALL)
    for part in pair:
        arrow(ax, (part.top[0], second.y + 24), part.top)
        arrow(ax, part.bottom, (part.top[0], gate.y))
    arrow(ax, gate.bottom, down.top)
    points = [52.0, *plus.values(), 470.0]
    for above, below in pairwise(points):
        arrow(ax, (stream, above + (7 if above > 60 else 0)), (stream, below - 7), color=INK)
    for part, y in ((norm, 74.0), (second, 312.0)):
        arrow(ax, (stream, y), part.left, gap=0)
    for part, y in ((output, plus["attention"]), (down, plus["feed-forward"])):
        ax.add_patch(Circle((stream, y), 7, facecolor=PAPER, edgecolor=INK, linewidth=1.1))
        label(ax, stream, y, "+", bold=True)
        arrow(ax, part.left, (stream + 7, y), gap=1)


def draw_files() -> None:
    """Our parameters of a block, and the tensors that hold them in the files of three families."""
    ax = canvas(720, 388)
    top, pitch, height = 40, 27, 22
    ours = (
        ("attention_norm", GRAY),
        ("q_proj", BLUE),
        ("k_proj", BLUE),
        ("v_proj", BLUE),
        ("o_proj", BLUE),
        ("feed_forward_norm", GRAY),
        ("gate_proj", GREEN),
        ("up_proj", GREEN),
        ("down_proj", GREEN),
    )
    llama = ("input_layernorm", *(f"self_attn.{name}" for name, _ in ours[1:5]))
    llama += ("post_attention_layernorm", *(f"mlp.{name}" for name, _ in ours[6:]))
    for x, title in ((105, "GPT-2 (no gate)"), (355, "our block"), (600, "Llama, Qwen, Mistral")):
        label(ax, x, 20, title, bold=True)

    def row(number: int, x: float, width: float, name: str, color: str, rows: int = 1) -> Box:
        size = height + (rows - 1) * pitch
        y = top + number * pitch
        return box(ax, x, y, width, size, name, color=color, mono=True, size=SMALL, radius=3)

    middle = [row(i, 280, 150, name, color) for i, (name, color) in enumerate(ours)]
    for i, (name, (_, color)) in enumerate(zip(llama, ours, strict=True)):
        arrow(ax, middle[i].right, row(i, 490, 220, name, color).left, both=True, color=GRAY)
    old = {0: ("ln_1", 1), 1: ("attn.c_attn", 3), 4: ("attn.c_proj", 1), 5: ("ln_2", 1)}
    old |= {7: ("mlp.c_fc", 1), 8: ("mlp.c_proj", 1)}
    for number, (name, rows) in old.items():
        part = row(number, 10, 190, name, ours[number][1], rows)
        if rows == 3:
            label(ax, *(part.center[0], part.center[1] + 16), "q, k, v side by side", size=SMALL)
        for i in range(number, number + rows):
            y = middle[i].left[1]
            arrow(ax, middle[i].left, (part.x + part.width, y), both=True, color=GRAY)
            if ours[i][1] != GRAY:
                label(ax, 240, y - 8, "transposed", size=SMALL, color=GRAY)
    ax.plot((10, 710), (top + 9 * pitch + 8,) * 2, color=FAINT)
    y = top + 9 * pitch + 24
    label(ax, 10, y + 2, "Mixtral", bold=True, align="left")
    label(ax, 10, y + 20, "(experts, d_ff, d_model)", size=SMALL, align="left")
    label(ax, 10, y + 34, "is one parameter of ours", size=SMALL, align="left")
    for shift in (12, 8, 4, 0):
        frame = box(ax, 280 + shift, y + shift, 138, 50, color=GREEN, radius=3)
    label(ax, *frame.center, "experts.gate_proj", mono=True, size=SMALL)
    for number, name in enumerate(("experts.0.w1", "experts.1.w1", "…")):
        part = box(ax, 490, y + 22 * number, 220, 19, name, color=GREEN, mono=True, size=SMALL)
        arrow(ax, (430, y + 10 + 22 * number), part.left, both=True, color=GRAY)
    save(
        ax,
        "model-files",
        "A block's parameters in three kinds of files",
        "In the middle our parameters: attention_norm, q_proj, k_proj, v_proj, o_proj, "
        "feed_forward_norm, gate_proj, up_proj, down_proj. In a Llama file each has a tensor of "
        "its own. In a GPT-2 file q, k and v are one matrix side by side, attn.c_attn, and all "
        "matrices are transposed; there is no gate. In a Mixtral file each expert has its "
        "matrices, which are slices of our stacked parameters.",
    )
