"""Style and layout of the report's figures: colours, panels that fit their names, PNG files.

A figure is a row of panels. In the page every panel is a picture of its own, as wide as a phone,
so that a narrow window stacks them; its PNG file has all of them in a grid. To add a kind of
figure, write a function from `RunData` to `Figure` and name it in `pilot_flwr.report.run.FIGURES`.

Colours are Okabe's and Ito's, matrices are in viridis: both can be told apart by people who are
colour-blind, and viridis in grey as well.
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
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from PIL import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#333333")
"""Okabe and Ito; its yellow is darkened, as lines in it cannot be seen on white."""

_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
GREY, INK = "#8A8A8A", "#222222"

STYLE: Any = {
    # Sixteen lines that differ: the second eight are dashed and have other markers.
    "axes.prop_cycle": cycler(color=COLOURS * 2)
    + cycler(marker=[*_MARKERS, *_MARKERS[3:], *_MARKERS[:3]])
    + cycler(linestyle=["-"] * 8 + ["--"] * 8),
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
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.2,
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

PLOT_INCHES = (2.1, 1.65)
"""Least width and height of the plot in a panel: long names make the panel larger."""

_DPI = 192
_GAP = 24
_LONGEST_NAME = 16
_LONGEST_LINE = 36
_CHARACTER_INCHES = 0.1
"""Width of a character of a title, at most."""

_MARGIN_INCHES = 0.8
"""Height of a panel's title and x axis, about."""

_LEGEND_LINE_INCHES = 0.25

_MOST_COLUMNS = {"panels": 3, "legend": 4}

_MOST_EDGED = 60
"""Bars of a panel that are at least as wide as six of the lines around them."""


@dataclass(frozen=True)
class Panel:
    """One picture."""

    draw: Callable[[Axes], None]
    """Draws into the axes; artists with labels get a legend below the plot."""

    alt: str
    """Describes the picture for people who cannot see it."""

    width: float = PANEL_INCHES[0]
    height: float = PANEL_INCHES[1]
    """In inches; more if names would leave less than `plot` for the plot."""

    plot: tuple[float, float] = PLOT_INCHES
    continuous: bool = False
    """Whether colours mean numbers, so that none may be replaced by a similar one."""

    def canvas(self) -> Canvas:
        """Draw the panel, as large as its names need."""
        with matplotlib.rc_context(STYLE):
            canvas = Canvas(figsize=(self.width, self.height), layout="constrained")
            agg = FigureCanvasAgg(canvas)
            axes = canvas.add_subplot()
            self.draw(axes)
            legend_height = _legend_below(agg, axes)
            names = axes.yaxis.get_tightbbox(agg.get_renderer())  # type: ignore[no-untyped-call]
            room = self.plot[0] + (names.width / canvas.dpi if names else 0.0)
            height = max(self.height, self.plot[1] + _MARGIN_INCHES) + legend_height
            canvas.set_size_inches(max(canvas.get_figwidth(), room), height)
            canvas.draw_without_rendering()
            plot = axes.get_window_extent()
            missing = [max(0.0, self.plot[0] - plot.width / canvas.dpi)]
            missing += [max(0.0, self.plot[1] - plot.height / canvas.dpi)]
            width, height = canvas.get_size_inches()
            canvas.set_size_inches(width + missing[0], height + missing[1])
            return canvas

    @cached_property
    def png(self) -> bytes:
        """The picture, drawn once, with two pixels for each of the page's."""
        stream = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.canvas().savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
        if self.continuous:
            return stream.getvalue()
        smaller = io.BytesIO()
        _few_colours(Image.open(stream)).save(smaller, format="png", optimize=True)
        return smaller.getvalue()

    @property
    def page_width(self) -> int:
        """The picture's width in the page's pixels."""
        return Image.open(io.BytesIO(self.png)).width // 2

    def data_uri(self) -> str:
        """Return the picture as a ``data:`` URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class Table:
    """Numbers of a figure as text; the first row is the header."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A section of the report."""

    name: str
    """Of its PNG file, and of its anchor in the page."""

    title: str
    text: str
    """How to read it, or, without panels, why there is nothing to draw."""

    panels: list[Panel] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    """The numbers, folded away in the page."""


def save_png(figure: Figure, folder: Path) -> Path:
    """Write all panels of a figure into `folder` as one PNG file, in rows of at most three."""
    pictures = [Image.open(io.BytesIO(panel.png)).convert("RGB") for panel in figure.panels]
    columns = 2 if len(pictures) == 4 else min(_MOST_COLUMNS["panels"], len(pictures))
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
    """Return lines and letters in 256 colours: they look the same, in a third of the bytes."""
    return picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)


def _legend_below(agg: FigureCanvasAgg, axes: Axes) -> float:
    """Put the legend below the plot, in as few rows as fit the panel's width.

    Returns the height in inches of all its rows but the first.
    """
    handles, labels = axes.get_legend_handles_labels()
    canvas = agg.figure
    fewest = math.ceil(len(labels) / _MOST_COLUMNS["legend"])
    for rows in range(max(1, fewest), len(labels) + 1):
        columns = math.ceil(len(labels) / rows)
        legend = canvas.legend(handles, labels, loc="outside lower center", ncols=columns)
        box = legend.get_window_extent(agg.get_renderer())  # type: ignore[no-untyped-call]
        width, height = box.width / canvas.dpi + 0.1, box.height / canvas.dpi
        if width <= canvas.get_figwidth() or columns == 1:
            canvas.set_figwidth(max(width, canvas.get_figwidth()))
            return max(0.0, height - _LEGEND_LINE_INCHES)
        legend.remove()
    return 0.0


def colour(index: int) -> str:
    """Return the colour of the `index`-th of several things."""
    return COLOURS[index % len(COLOURS)]


def short(name: str) -> str:
    """Return a name that leaves room for the plot: its beginning and its end."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:9]}…{name[-5:]}"


def in_lines(name: str, longest: int = _LONGEST_LINE) -> str:
    """Return a name in lines of at most `longest` characters."""
    return "\n".join(textwrap.wrap(name, longest)) or name


def title(axes: Axes, text: str, room: float = PANEL_INCHES[0] - 0.6) -> None:
    """Set a panel's title, in lines of at most `room` inches."""
    axes.set_title(in_lines(text, int(room / _CHARACTER_INCHES)))


def math_text(symbol: str) -> str:
    """Return a symbol such as ``ψ_t`` so that its index is drawn as one."""
    base, _, index = symbol.partition("_")
    index, _, power = index.partition("^")
    drawn = f"{base}_{{{index}}}" + (f"^{{{power}}}" if power else "")
    return f"${drawn}$" if index else symbol


def text_on(background: str) -> str:
    """Return the text colour with the larger contrast, by WCAG, on a background colour."""
    rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)]
    luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
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
    """Return at most `most` numbers: the first, the last, and evenly spread ones between."""
    places = np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)
    return [numbers[place] for place in places]
