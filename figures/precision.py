"""The diagrams of chapter 15: where the bits of each format go."""

from __future__ import annotations

from style import BLUE, GRAY, GREEN, PURPLE, SMALL, canvas, cells, label, save

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
