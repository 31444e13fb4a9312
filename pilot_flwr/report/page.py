"""A report: one self-contained HTML page, and its figures as PNG files.

A figure is a row of panels. On the page every panel is a separate picture, as wide as a phone, so
that a narrow window stacks them; the PNG file has all of them in a grid. To add a kind of figure,
write a function from `RunData` to `Figure` and name it in `pilot_flwr.report.run.FIGURES`.

Lines have Okabe's and Ito's colours, matrices viridis: readers with colour blindness can tell both
apart, and viridis is readable in grey as well.
"""

import base64
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from pilot_flwr import __version__
from pilot_flwr.errors import ConfigError
from pilot_flwr.run.atomic import write_text

Item = TypeVar("Item")

PAGE = "index.html"
_GENERATOR = '<meta name="generator" content="pilot-flwr '
_SECTION = re.compile(r'^<section id="([^"]+)">$', re.MULTILINE)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#333333")
"""Okabe and Ito, with a darker yellow, which is visible on white."""

_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
GREY, INK = "#8A8A8A", "#222222"

STYLE: Any = {
    # Sixteen different lines: the second eight are dashed, with other markers.
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
"""Width and height of a panel; the width is about 345 pixels, a phone's."""

PLOT_INCHES = (2.1, 1.65)
"""Minimum size of the plot in a panel; long names enlarge the panel."""

_DPI = 192
_GAP = 24
_LONGEST_NAME = 16
_LONGEST_LINE = 36
_CHARACTER_INCHES = 0.1
"""Maximum width of a character in a title."""

_MARGIN_INCHES = 0.8
"""Approximate height of a panel's title and x axis."""

_LEGEND_LINE_INCHES = 0.25
_MOST_PANEL_COLUMNS, _MOST_LEGEND_COLUMNS = 3, 4

_MOST_EDGED = 60
"""Maximum number of bars with edges; edges would cover narrower bars."""


@dataclass(frozen=True)
class Panel:
    """One picture."""

    draw: Callable[[Axes], None]
    """Draw into the axes; labelled artists get a legend below the plot."""

    alt: str
    """Text alternative of the picture."""

    width: float = PANEL_INCHES[0]
    height: float = PANEL_INCHES[1]
    """In inches, enlarged if names would leave less than `plot` for the plot."""

    plot: tuple[float, float] = PLOT_INCHES
    continuous: bool = False
    """Whether colours encode numbers, so that the palette must not be reduced."""

    def canvas(self) -> Canvas:
        """Draw the panel, enlarged for long names."""
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
            missing = np.subtract(self.plot, np.array([plot.width, plot.height]) / canvas.dpi)
            canvas.set_size_inches(*(canvas.get_size_inches() + np.maximum(missing, 0.0)))
            return canvas

    @cached_property
    def png(self) -> bytes:
        """The picture, drawn once, at twice the page's resolution."""
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
        """The picture's width on the page, in pixels."""
        return Image.open(io.BytesIO(self.png)).width // 2

    def data_uri(self) -> str:
        """Return the picture as a ``data:`` URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class Table:
    """A table of text; the first row is the header."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A section of the report."""

    name: str
    """Name of its PNG file and anchor on the page."""

    title: str
    text: str
    """How to read it or, without panels, why there is nothing to draw."""

    panels: list[Panel] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    """The numbers, collapsed on the page."""


@dataclass(frozen=True)
class Page:
    """A report; text from a run is escaped when it is rendered."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values, at the top."""

    warnings: Sequence[str]
    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    """Tables of scores, above the figures, with `notes` below them."""

    notes: Sequence[str] = ()
    bold_last: bool = False
    """Whether a table's last row summarises the others."""

    files: Sequence[tuple[str, str]] = ()
    """Names and texts shown verbatim at the end."""

    files_title: str = "Settings and code"


def write_page(page: Page, folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write ``index.html`` and one PNG file per figure into a folder, and return the page's path.

    Only the files of an earlier report are replaced. `say` receives a line of progress per figure.
    """
    earlier = earlier_pictures(folder)
    pictures = [figure for figure in page.figures if figure.panels]
    for figure in pictures:
        if (file := folder / f"{figure.name}.png").exists() and file not in earlier:
            raise ConfigError(
                f"{file} exists and does not belong to a report: move it, or give another folder "
                "with `--out`."
            )
        say(f"drawing {figure.name}")
        _ = [panel.png for panel in figure.panels]
    folder.mkdir(parents=True, exist_ok=True)
    for old in earlier:
        old.unlink(missing_ok=True)
    path = folder / PAGE
    write_text(path, render(page))  # first, because it lists the report's files
    for figure in pictures:
        save_png(figure, folder)
    return path


def earlier_pictures(folder: Path) -> list[Path]:
    """Return the PNG files of an earlier report in a folder; `ConfigError` if it has other files.

    The report's page names its figures as sections.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ConfigError(f"`--out` is {folder}, which is not a folder.")
    try:
        text = (folder / PAGE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    if _GENERATOR in text:
        names = set(_SECTION.findall(text)) - {"scores", "settings"}  # sections without a figure
        return [file for name in names if (file := folder / f"{name}.png").is_file()]
    if any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty and holds no report of pilot-flwr, so nothing was written: "
            "give a new or empty folder with `--out`."
        )
    return []


def render(page: Page) -> str:
    """Return the page as HTML; text from a run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(page=page, version=__version__)


def save_png(figure: Figure, folder: Path) -> Path:
    """Write all panels of a figure as one PNG file, in rows of at most three."""
    pictures = [Image.open(io.BytesIO(panel.png)).convert("RGB") for panel in figure.panels]
    columns = 2 if len(pictures) == 4 else min(_MOST_PANEL_COLUMNS, len(pictures))
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
    """Reduce lines and text to 256 colours: they look the same in a third of the bytes."""
    return picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)


def _legend_below(agg: FigureCanvasAgg, axes: Axes) -> float:
    """Put the legend below the plot, in as few rows as fit the panel's width.

    Return its height in inches beyond the first row.
    """
    handles, labels = axes.get_legend_handles_labels()
    canvas = agg.figure
    fewest = math.ceil(len(labels) / _MOST_LEGEND_COLUMNS)
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
    """Return the colour of the `index`-th line."""
    return COLOURS[index % len(COLOURS)]


def short(name: str) -> str:
    """Return a name, shortened to its beginning and end if it is long."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:9]}…{name[-5:]}"


def in_lines(name: str, longest: int = _LONGEST_LINE) -> str:
    """Return a name in lines of at most `longest` characters."""
    return "\n".join(textwrap.wrap(name, longest)) or name


def title(axes: Axes, text: str, room: float = PANEL_INCHES[0] - 0.6) -> None:
    """Set a panel's title, in lines of at most `room` inches."""
    axes.set_title(in_lines(text, int(room / _CHARACTER_INCHES)))


def math_text(symbol: str) -> str:
    """Return a symbol such as ``ψ_t`` as math text, with its index as a subscript."""
    base, _, index = symbol.partition("_")
    index, _, power = index.partition("^")
    drawn = f"{base}_{{{index}}}" + (f"^{{{power}}}" if power else "")
    return f"${drawn}$" if index else symbol


def text_on(background: str) -> str:
    """Return the text colour with the higher contrast, by WCAG, on a background colour."""
    rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)]
    luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
    return "#FFFFFF" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#111111"


def exchange_axis(axes: Axes, numbers: Sequence[int], label: str = "after exchange") -> None:
    """Show all exchanges on the x axis, with integer ticks."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = min(numbers), max(numbers)
    room = max(0.25, 0.03 * (high - low))
    axes.set_xlim(low - room, high + room)


def bar_edges(bars: int) -> dict[str, Any]:
    """Return the style of the bars' edges: white, or none if there are many narrow bars."""
    return {"edgecolor": "white", "linewidth": 0.4} if bars <= _MOST_EDGED else {"linewidth": 0}


def stacked_bars(
    axes: Axes,
    places: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    width: float,
    bars: int,
    alpha: float = 1.0,
) -> NDArray[np.float64]:
    """Draw a stack of bars at each place, one colour per label; return the stacks' heights.

    `bars` is the number of stacks in the whole plot.
    """
    total = np.zeros(len(places))
    for index, (label, heights) in enumerate(series.items()):
        if any(heights):
            style: Any = {"color": colour(index), "alpha": alpha, **bar_edges(bars)}
            axes.bar(places, heights, width=width, bottom=total, label=label, **style)
            total += heights
    return total


def some(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` items, evenly spaced and including the first and the last."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]
