"""Names that fit into a panel: lines, widths, and legends below it with room of their own."""

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from pilot_flwr.report.drawing import PANEL_INCHES, STYLE

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
