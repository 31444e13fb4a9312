"""Figures of the report: panels in one style, inlined in the page and as PNG files.

A figure is a row of panels. In the page every panel is a picture of its own, as wide as a phone,
so that a narrow window puts one below the other; its PNG file has all of them in a grid. To add a
kind of figure, write a module with a function that returns a `Figure`, and name it in
`pilot_flwr.report.run.FIGURES`.

Colours are Okabe's and Ito's, matrices are in viridis: both can be told apart by people who are
colour-blind, and viridis in grey as well.

Names that fit into a panel: lines, widths, and legends below it with room of their own.
"""

import base64
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from PIL import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#333333")
"""Okabe and Ito; its yellow is darkened, as lines in it cannot be seen on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY, INK = "#8A8A8A", "#222222"

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "image.cmap": "viridis",
}

PANEL_INCHES = (3.6, 2.7)
"""Width and height of a panel: about 345 points of a screen, a phone's width."""

_DPI = 192
_GAP = 24
_LONGEST_NAME = 16
_COLUMNS = 3

_MOST_EDGED = 60
"""Bars of a panel that are at least as wide as six of the lines around them."""


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes
    ----------
    draw : callable
        Draws into the axes that it gets.
    alt : str
        What it shows, in words, for people who cannot see it.
    width, height : float
        In inches.
    continuous : bool
        Whether its colours mean numbers, so that none may be replaced by a similar one.
    """

    draw: Callable[[Axes], None]
    alt: str
    width: float = PANEL_INCHES[0]
    height: float = PANEL_INCHES[1]
    continuous: bool = False

    @cached_property
    def png(self) -> bytes:
        """The picture, drawn once, with two pixels for each of the page's."""
        stream = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            canvas = Canvas(figsize=(self.width, self.height), layout="constrained")
            FigureCanvasAgg(canvas)
            self.draw(canvas.add_subplot())
            canvas.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
        if self.continuous:
            return stream.getvalue()
        smaller = io.BytesIO()
        _few_colours(Image.open(stream)).save(smaller, format="png", optimize=True)
        return smaller.getvalue()

    def data_uri(self) -> str:
        """Return the picture as a ``data:`` URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class Table:
    """Numbers of a figure, as text.

    Attributes
    ----------
    title : str
        Above it.
    rows : sequence of sequence of str
        The first is the header.
    """

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A section of the report.

    Attributes
    ----------
    name : str
        Of its PNG file, and of its place in the page.
    title : str
        Its heading.
    text : str
        How to read it.
    panels : list of Panel
        None if there is nothing to draw: `text` then says why.
    tables : list of Table
        Its numbers, folded away in the page.
    """

    name: str
    title: str
    text: str
    panels: list[Panel] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def save_png(figure: Figure, folder: Path) -> Path:
    """Write all panels of a figure as one PNG file, in rows of at most three.

    Parameters
    ----------
    figure : Figure
        With at least one panel.
    folder : Path
        Gets ``<name>.png``.

    Returns
    -------
    Path
        The file.
    """
    pictures = [Image.open(io.BytesIO(panel.png)).convert("RGB") for panel in figure.panels]
    columns = 2 if len(pictures) == 4 else min(_COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = (max(picture.size[i] for picture in pictures) + _GAP for i in (0, 1))
    sheet = Image.new("RGB", (width * columns + _GAP, height * rows + _GAP), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (_GAP + column * width, _GAP + row * height))
    path = folder / f"{figure.name}.png"
    exact = any(panel.continuous for panel in figure.panels)
    (sheet if exact else _few_colours(sheet)).save(path, dpi=(_DPI, _DPI), optimize=True)
    return path


def _few_colours(picture: Image.Image) -> Image.Image:
    """Return lines and letters in 256 colours: the same to look at, in a third of the bytes."""
    return picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)


def colour(index: int) -> str:
    """Return the colour of the `index`-th of several things."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Return the marker of the `index`-th of several things."""
    return MARKERS[index % len(MARKERS)]


def short(name: str) -> str:
    """Return a name that leaves room for a panel's content: its beginning and its end."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:9]}…{name[-5:]}"


def math_text(symbol: str) -> str:
    """Return a symbol such as ``ψ_t`` so that its index is drawn as one."""
    base, _, index = symbol.partition("_")
    index, _, power = index.partition("^")
    drawn = f"{base}_{{{index}}}" + (f"^{{{power}}}" if power else "")
    return f"${drawn}$" if index else symbol


def text_on(background: str) -> str:
    """Return the colour of text that can be read on a colour: WCAG's contrast decides."""
    red, green, blue = to_rgb(background)
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#FFFFFF" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#111111"


def exchange_axis(axes: Axes, numbers: Sequence[int], label: str = "after exchange") -> None:
    """Make the x axis one of exchanges: whole numbers, all in view."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = min(numbers), max(numbers)
    room = max(0.25, 0.03 * (high - low))
    axes.set_xlim(low - room, high + room)


def bar_edges(bars: int) -> dict[str, Any]:
    """Return the edges of bars: white between them, none where they would cover thin ones."""
    return {"edgecolor": "white", "linewidth": 0.4} if bars <= _MOST_EDGED else {"linewidth": 0}


def some(numbers: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of them: the first, the last, and evenly spread ones between."""
    if len(numbers) <= most:
        return list(numbers)
    steps = [round(i * (len(numbers) - 1) / (most - 1)) for i in range(most)]
    return [numbers[step] for step in steps]


LONGEST_LINE = 36
"""Characters after which a name goes on in another line."""

_TITLE_INCHES = 0.1
"""A character of a title is at most about as wide."""

_LINE_INCHES = 0.17
_HANDLE_INCHES = 0.5
_MOST_COLUMNS = 4


def in_lines(name: str, longest: int = LONGEST_LINE) -> str:
    """Return a name in lines of at most so many characters."""
    return "\n".join(textwrap.wrap(name, longest)) or name


def title(axes: Axes, words: str, room: float = PANEL_INCHES[0] - 0.6) -> None:
    """Write a panel's title in lines that end where the plot does, `room` inches wide."""
    axes.set_title(in_lines(words, int(room / _TITLE_INCHES)))


def text_inches(text: str, size: float) -> float:
    """Return how wide the widest line of a text is at a font size in points."""
    font = FontProperties(family=STYLE["font.family"], size=size)
    paths = [TextPath((0, 0), line, prop=font) for line in text.splitlines() if line.strip()]
    return max((float(path.get_extents().width) / 72 for path in paths), default=0.0)


def panel_size(labels: Sequence[str]) -> tuple[float, float]:
    """Return width and height of a panel that has a legend of such names below it.

    Parameters
    ----------
    labels : sequence of str
        As `legend_below` finds them at the axes, in lines.
    """
    if not labels:
        return PANEL_INCHES
    width = max(PANEL_INCHES[0], _entry(labels) + 0.3)
    rows = math.ceil(len(labels) / _columns(labels, width))
    lines = rows * (1 + max(label.count("\n") for label in labels))
    return width, PANEL_INCHES[1] + _LINE_INCHES * (lines - 1)


def legend_below(axes: Axes) -> None:
    """Put the legend below the panel's axes, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    canvas = axes.get_figure(root=True)
    if canvas is None or not labels:
        return
    columns = _columns(labels, canvas.get_figwidth())
    canvas.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _entry(labels: Sequence[str]) -> float:
    return max(text_inches(label, STYLE["legend.fontsize"]) for label in labels) + _HANDLE_INCHES


def _columns(labels: Sequence[str], width: float) -> int:
    """Return as few columns as the rows allow that a panel's width makes necessary."""
    room = min(_MOST_COLUMNS, max(1, int((width - 0.1) / _entry(labels))))
    return math.ceil(len(labels) / math.ceil(len(labels) / room))
