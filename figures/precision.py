"""The diagrams of chapter 15: where the bits of each format go, and a step of training."""

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
    canvas,
    cells,
    label,
    save,
)

FORMATS = (
    ("float32", 1, 8, 23),
    ("tfloat32", 1, 8, 10),
    ("bfloat16", 1, 8, 7),
    ("float16", 1, 5, 10),
    ("float8_e4m3fn", 1, 4, 3),
    ("float8_e5m2", 1, 5, 2),
    ("float4_e2m1fn", 1, 2, 1),
    ("float8_e8m0fnu", 0, 8, 0),
)


def draw_layouts() -> None:
    """One row of bits for each format, by field; fields of rows stand under each other."""
    ax = canvas(720, 292)
    width, height, left = 15, 22, 160
    fields = (
        ("sign", PURPLE, left - 0.5 * width, "right"),
        ("exponent (range)", BLUE, left + width, "left"),
        ("fraction (digits)", GREEN, left + 10 * width, "left"),
    )
    for text, color, x, align in fields:
        label(ax, x, 14, text, size=SMALL, color=color, align=align)
    for number, (name, sign, exponent, fraction) in enumerate(FORMATS):
        y = 28 + 33 * number
        label(ax, left - 14 - width, y + height / 2, name, size=SMALL, align="right", mono=True)
        parts = (
            (sign, left - width, PURPLE),
            (exponent, left + 0.25 * width, BLUE),
            (fraction, left + 9.5 * width, GREEN),
        )
        for count, x, color in parts:
            if count:
                cells(ax, x, y, [""] * count, width=width, height=height, color=color, size=SMALL)
        total = f"{sign + exponent + fraction} bits"
        edge = left + (9.5 + fraction) * width if fraction else left + 8.25 * width
        label(ax, edge + 10, y + height / 2, total, size=SMALL, color=GRAY, align="left")
    save(
        ax,
        "precision-layouts",
        "Where the bits go",
        "For each format a row of bits. float32 has a sign, 8 bits of exponent and 23 of fraction, "
        "tfloat32 1, 8 and 10, bfloat16 1, 8 and 7, float16 1, 5 and 10, float8 e4m3 1, 4 and 3, "
        "float8 e5m2 1, 5 and 2, float4 e2m1 1, 2 and 1, and e8m0 has 8 bits of exponent only.",
    )


def draw_recipe() -> None:
    """Where a step has 16 bits and where 32, forward in the upper row and backward below."""
    ax = canvas(720, 264)
    label(ax, 14, 16, "forward", size=SMALL, color=GRAY, align="left", italic=True)
    label(ax, 14, 250, "backward", size=SMALL, color=GRAY, align="left", italic=True)
    box(ax, 14, 100, 128, 60, "master weights", "32 bits", color=BLUE)
    copies = box(ax, 182, 30, 122, 52, "copies", "16 bits, made anew", color=ORANGE)
    products = box(ax, 344, 30, 160, 52, "products", "factors 16, sums 32 bits", color=ORANGE)
    loss = box(ax, 544, 30, 162, 52, "norms, softmax, loss", "32 bits", color=BLUE)
    scale = box(ax, 564, 106, 122, 48, "times S", "float16 only", color=GREEN)
    back = box(ax, 344, 180, 160, 52, "products", "gradients in 16 bits", color=ORANGE)
    unscale = box(ax, 182, 180, 122, 52, "divided by S", "finite? then clip", color=GREEN)
    arrow(ax, (78, 100), (78, 56), copies.left, color=INK)
    label(ax, 90, 46, "cast", size=SMALL, color=GRAY)
    arrow(ax, copies.right, products.left, color=INK)
    arrow(ax, products.right, loss.left, color=INK)
    arrow(ax, loss.bottom, scale.top, color=INK)
    arrow(ax, scale.bottom, (scale.center[0], 206), back.right, color=INK)
    arrow(ax, products.bottom, back.top, color=GRAY, dashed=True)
    label(ax, 434, 131, "what it kept", size=SMALL, color=GRAY, align="left")
    arrow(ax, back.left, unscale.right, color=INK)
    label(ax, 324, 170, "to 32 bits", size=SMALL, color=GRAY)
    arrow(ax, unscale.left, (78, 206), (78, 160), color=INK)
    label(ax, 88, 190, "optimizer: adds", size=SMALL, color=GRAY, align="left")
    save(
        ax,
        "precision-recipe",
        "A training step in mixed precision",
        "Master weights in 32 bits are cast to copies in 16 bits, made anew in each step. They "
        "enter products whose factors have 16 bits and whose partial sums have 32. Norms, softmax "
        "and loss are in 32 bits. In float16 the loss is multiplied by a scale S. The backward "
        "pass has gradients in 16 bits between products and uses what the forward products kept. "
        "Gradients of weights are cast to 32 bits, divided by S, checked for infinities, clipped, "
        "and the optimizer adds its update to the master weights.",
    )
