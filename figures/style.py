"""The visual language of the book's diagrams: one palette, a few shapes, one way to save.

    from style import BLUE, arrow, box, canvas, label, save

    def draw_chain() -> None:
        ax = canvas(300, 60)
        text = box(ax, 0, 10, 110, 40, "text", "bytes")
        tokens = box(ax, 190, 10, 110, 40, "tokens", "numbers", color=BLUE)
        arrow(ax, text.right, tokens.left, text="encode")
        save(ax, "chain", "From text to tokens", "Text is encoded into tokens.")

One unit is one point, the origin is at the top left and y grows downward, so that a picture is laid
out as it is read. A picture 720 wide fills a column of the site. Diagrams are dark ink on white
paper: the site inverts them in dark mode, other viewers show an ordinary picture. A module of
diagrams is a file in this folder whose functions ``draw_*`` take no arguments and call ``save``;
``make figures`` runs them all.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Curve

plt.style.use("llmbook.book")

# The palette of llmbook/book.mplstyle, by name.
BLUE, ORANGE, GREEN, PURPLE, OCHRE, SKY, GRAY = (
    f"#{color.lstrip('#')}" for color in mpl.rcParams["axes.prop_cycle"].by_key()["color"]
)
INK, FAINT, PAPER = "#222222", "#E4E4E4", "#FFFFFF"

# Font sizes in points: the smallest is still legible when a phone shows 720 points in 350 pixels
# and the reader zooms once.
TITLE, TEXT, SMALL = 12.0, 10.0, 8.5
LINE = 1.3  # height of a line in font sizes

Point = tuple[float, float]

# Where `save` writes. `draw.py` points it elsewhere to compare with what is committed.
folder = Path(__file__).parent


def tint(color: str, strength: float = 0.12) -> str:
    """Mix ``color`` with white paper: strength 0 is white, 1 the color itself."""
    return to_hex([1 - strength * (1 - channel) for channel in to_rgb(color)])


@dataclass(frozen=True)
class Box:
    """A rectangle given by its top left corner; its properties are points to draw arrows to."""

    x: float
    y: float
    width: float
    height: float

    @property
    def center(self) -> Point:
        """The middle."""
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def left(self) -> Point:
        """The middle of the left side."""
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        """The middle of the right side."""
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        """The middle of the upper side."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        """The middle of the lower side."""
        return self.x + self.width / 2, self.y + self.height


def canvas(width: float, height: float) -> Axes:
    """Empty white paper of ``width`` by ``height`` points, y growing downward."""
    figure = plt.figure(figsize=(width / 72, height / 72), layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return ax


def label(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = TEXT,
    color: str = INK,
    align: str = "center",
    bold: bool = False,
    mono: bool = False,
    italic: bool = False,
) -> None:
    """Write ``text``, vertically centered on ``y``; ``align`` says which part of it is at ``x``."""
    # Centering the ink would lift "gap" above "text" beside it; lower-case letters are what align.
    drop = 0.36 * size if "\n" not in text else 0
    ax.text(
        x,
        y + drop,
        text,
        fontsize=size,
        color=color,
        ha=align,
        va="center" if "\n" in text else "baseline",
        weight="bold" if bold else "normal",
        style="italic" if italic else "normal",
        family="DejaVu Sans Mono" if mono else "DejaVu Sans",
        linespacing=LINE,
    )


def box(
    ax: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    note: str = "",
    *,
    color: str = GRAY,
    paper: str | None = None,
    solid: bool = False,
    dashed: bool = False,
    mono: bool = False,
    size: float = TEXT,
    radius: float = 5,
) -> Box:
    """Draw a rounded box with ``text`` in it and a smaller ``note`` under that.

    It is filled with a pale tint of its color, or with ``paper``. A ``solid`` box is filled with
    the color itself and written on in white: for the one thing that a diagram is about. A
    ``dashed`` one is something that comes and goes.
    """
    shape = Box(x, y, width, height)
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle=f"round,pad=0,rounding_size={radius}",
            facecolor=color if solid else paper or tint(color),
            edgecolor=color,
            linewidth=1.1,
            linestyle=(0, (3, 2)) if dashed else "solid",
        )
    )
    _stacked(ax, shape, text, note, size=size, mono=mono, ink=PAPER if solid else INK)
    return shape


def _stacked(
    ax: Axes, shape: Box, text: str, note: str, *, size: float, mono: bool, ink: str
) -> None:
    """Write ``text`` and ``note`` one above the other, centered in ``shape`` together."""
    middle_x, middle_y = shape.center
    text_height = LINE * size * len(text.splitlines())
    note_height = LINE * SMALL * len(note.splitlines())
    if text:
        y = middle_y - note_height / 2
        label(ax, middle_x, y, text, size=size, color=ink, bold=not mono, mono=mono)
    if note:
        label(ax, middle_x, middle_y + text_height / 2, note, size=SMALL, color=ink)


def cells(
    ax: Axes,
    x: float,
    y: float,
    texts: Sequence[str],
    *,
    width: float | Sequence[float] = 36,
    height: float = 22,
    color: str | Sequence[str] = GRAY,
    gap: float = 0,
    mono: bool = True,
    size: float = TEXT,
) -> list[Box]:
    """Draw a row of adjoining cells, for tokens, bytes or the entries of a vector."""
    widths = [float(width)] * len(texts) if isinstance(width, int | float) else width
    colors = [color] * len(texts) if isinstance(color, str) else color
    row = []
    for text, cell_width, cell_color in zip(texts, widths, colors, strict=True):
        cell = box(ax, x, y, cell_width, height, color=cell_color, radius=2)
        label(ax, *cell.center, text, mono=mono, size=size)
        row.append(cell)
        x += cell_width + gap
    return row


def arrow(
    ax: Axes,
    *points: Point,
    text: str = "",
    color: str = INK,
    bend: float = 0,
    head: bool = True,
    both: bool = False,
    dashed: bool = False,
    width: float = 1.2,
    gap: float = 2,
) -> None:
    """Draw an arrow through ``points``, with ``text`` above the middle of its first segment.

    Between two points it may ``bend`` to the left of its way (0.2 is a gentle arc, negative bends
    right); through more it turns rounded corners. It keeps ``gap`` points away from where it starts
    and ends, and has a head, heads at ``both`` ends, or none.
    """
    if len(points) < 2:
        raise ValueError(f"points: an arrow needs at least two, got {len(points)}")
    start, *corners, end = points
    if bend and not corners:
        corners = [
            (
                (start[0] + end[0]) / 2 + bend * (end[1] - start[1]),
                (start[1] + end[1]) / 2 - bend * (end[0] - start[0]),
            )
        ]
    start, end = (
        _toward(start, (corners or [end])[0], gap),
        _toward(end, (corners or [start])[-1], gap),
    )
    shaft = [start, *corners, end]
    if both:
        shaft[0] = _head(ax, shaft[1], start, color)
    if head:
        shaft[-1] = _head(ax, shaft[-2], end, color)
    ax.add_patch(
        PathPatch(
            Curve(shaft, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3]) if bend else _rounded(shaft),
            fill=False,
            edgecolor=color,
            linewidth=width,
            linestyle=(0, (3, 2)) if dashed else "solid",
            capstyle="butt",
        )
    )
    if text:
        (x0, y0), (x1, y1) = points[:2]
        x, y = (x0 + x1 + bend * (y1 - y0)) / 2, (y0 + y1 - bend * (x1 - x0)) / 2
        label(ax, x, y - 0.9 * SMALL, text, size=SMALL, color=color)


def _head(ax: Axes, origin: Point, tip: Point, color: str) -> Point:
    """Draw the head of an arrow that comes from ``origin``; return where the shaft meets it."""
    length, half_width = 6.0, 2.8
    base = _toward(tip, origin, length)
    size = max(math.dist(base, tip), 1e-9)
    across = half_width * (tip[1] - base[1]) / size, half_width * (base[0] - tip[0]) / size
    sides = [(base[0] + sign * across[0], base[1] + sign * across[1]) for sign in (1, -1)]
    ax.add_patch(Polygon([tip, *sides], facecolor=color, edgecolor="none"))
    return base


def _rounded(points: Sequence[Point], radius: float = 6) -> Curve:
    """Straight segments through ``points``, their corners rounded."""
    vertices, codes = [points[0]], [Curve.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        vertices += [_toward(corner, before, radius), corner, _toward(corner, after, radius)]
        codes += [Curve.LINETO, Curve.CURVE3, Curve.CURVE3]
    return Curve([*vertices, points[-1]], [*codes, Curve.LINETO])


def _toward(start: Point, end: Point, distance: float) -> Point:
    """The point that lies ``distance`` from ``start``, at most half-way, on the way to ``end``."""
    share = min(0.5, distance / max(math.dist(start, end), 1e-9))
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def bracket(
    ax: Axes, start: Point, end: Point, text: str = "", *, color: str = GRAY, depth: float = 6
) -> None:
    """Span ``start`` to ``end`` with a bracket and write ``text`` beyond it.

    The bracket opens to the left of the way from start to end as seen on paper: drawn from left to
    right it stands under what it spans, drawn from right to left above it.
    """
    (x0, y0), (x1, y1) = start, end
    length = math.dist(start, end)
    away = -(y1 - y0) / length, (x1 - x0) / length

    def shifted(x: float, y: float, by: float) -> Point:
        return x + by * away[0], y + by * away[1]

    middle = (x0 + x1) / 2, (y0 + y1) / 2
    rim = [start, shifted(x0, y0, depth), shifted(x1, y1, depth), end]
    tick = [shifted(*middle, depth), shifted(*middle, 1.7 * depth)]
    for line in (rim, tick):
        ax.plot(*zip(*line, strict=True), color=color, linewidth=1.1, solid_capstyle="round")
    if text:
        align = "center" if abs(away[1]) > 0.5 else ("left" if away[0] > 0 else "right")
        beyond = 1.7 * depth + (0.8 * SMALL * (1 + text.count("\n")) if align == "center" else 4)
        label(ax, *shifted(*middle, beyond), text, size=SMALL, color=color, align=align)


def save(ax: Axes, name: str, title: str, description: str) -> None:
    """Write the picture to ``<name>.svg``, the same bytes every time, and close it.

    ``title`` and ``description`` are for readers who do not see it: a name, and what it says in
    words.
    """
    buffer = io.StringIO()
    # Without these the file would carry the date and the version, and change with every drawing.
    anonymous = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"savefig.bbox": "standard", "svg.fonttype": "path"}):
        ax.figure.savefig(buffer, format="svg", metadata=anonymous)
    plt.close(ax.figure)
    _write(folder / f"{name}.svg", _described(buffer.getvalue(), title, description))


def _described(svg: str, title: str, description: str) -> str:
    """Give the picture a title and a description, which screen readers read in its place."""
    opening = svg.index("<svg")
    body = svg.index(">", opening)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'{svg[opening:body]} role="img" aria-labelledby="title description">\n'
        f' <title id="title">{escape(title)}</title>\n'
        f' <desc id="description">{escape(description)}</desc>{svg[body + 1 :]}'
    )


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: a site that is being built never reads half a picture."""
    draft = path.with_suffix(".svg.new")
    draft.write_text(text, encoding="utf-8", newline="\n")
    draft.replace(path)
