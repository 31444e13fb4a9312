"""A dot for every seed of a sweep, with means and intervals, per task and for their mean."""

from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pilot_flwr.report.drawing import (
    GREY,
    INK,
    PANEL_INCHES,
    Figure,
    Panel,
    colour,
)
from pilot_flwr.report.fitting import text_inches, title
from pilot_flwr.report.sweep_labels import short_labels, shortened
from pilot_flwr.sweeping.rows import SCORE, ZERO_SHOT, label_of
from pilot_flwr.sweeping.table import UNTOUCHED, Comparison

Row = Mapping[str, str]

MEAN = "mean over tasks"

_PLOT_INCHES = 2.2
"""Width of the dots' place beside the names."""

_LABEL_SIZE = 8.5
_ROW_INCHES, _LINE_INCHES = 0.29, 0.14
_MOST_WITHOUT_TOP = 20
"""Rows up to which the scores are written below them alone."""


def dots(comparison: Comparison, rows: Sequence[Row], end: str, about: str) -> Figure:
    """Return one panel for the mean over tasks and one for each task.

    Parameters
    ----------
    comparison : Comparison
        The table's.
    rows : sequence of mapping
        Those of ``results.csv`` that it was made of.
    end, about : str
        Of the figure's name and title.
    """
    scores = seed_scores(comparison, rows)
    labels = short_labels(line.label for line in comparison.lines)
    text = (
        "The large dot is the mean over seeds and the bar its 95 % interval (Student's t), which a "
        "single seed does not have; the small dots below are the seeds. The dashed line is the "
        "untouched base model." + shortened(line.label for line in comparison.lines)
    )
    shown = [labels[line.label] for line in comparison.lines]
    longest = max(text_inches(name, _LABEL_SIZE) for name in shown)
    broken = max(name.count("\n") for name in shown)
    row = _ROW_INCHES + _LINE_INCHES * broken
    panels = [
        Panel(
            partial(_dot_plot, comparison, scores, labels, _base(rows, what), what),
            _alt(comparison, what),
            width=max(PANEL_INCHES[0], longest + _PLOT_INCHES + 0.3),
            height=1.3 + row * max(2, len(shown)) + 0.2 * (len(shown) > _MOST_WITHOUT_TOP),
        )
        for what in (MEAN, *comparison.tasks)
    ]
    return Figure(f"seeds{end}", f"Scores of every seed{about}", text, panels)


def seed_scores(comparison: Comparison, rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Return every seed's score: label of the table's line → task or `MEAN` → scores."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in comparison.lines:
        untouched = line.label == UNTOUCHED
        mine = {
            row["seed"]: row
            for row in rows
            if untouched or label_of(row["method"], row["variant"]) == line.label
        }
        columns = {task: f"{ZERO_SHOT if untouched else SCORE}{task}" for task in comparison.tasks}
        columns[MEAN] = "zero_shot_mean" if untouched else "mean"
        found[line.label] = {
            what: [float(row[column]) for row in mine.values() if row.get(column)]
            for what, column in columns.items()
        }
    return found


def _base(rows: Sequence[Row], what: str) -> float | None:
    """Return the mean score of the base model before any training, over seeds."""
    column = "zero_shot_mean" if what == MEAN else f"{ZERO_SHOT}{what}"
    scores = {row["seed"]: float(row[column]) for row in rows if row.get(column)}
    return sum(scores.values()) / len(scores) if scores else None


def _dot_plot(
    comparison: Comparison,
    scores: Mapping[str, Mapping[str, list[float]]],
    labels: Mapping[str, str],
    base: float | None,
    what: str,
    axes: Axes,
) -> None:
    names = [labels[line.label] for line in comparison.lines]
    if base is not None:
        axes.axvline(base, color=GREY, linestyle="--", linewidth=1.2, zorder=0.5)
    for place, line in enumerate(comparison.lines):
        shade = INK if line.label == UNTOUCHED else colour(0)
        found = line.mean if what == MEAN else line.tasks[what]
        seeds = scores[line.label][what]
        axes.plot(seeds, [place + 0.26] * len(seeds), "o", color=shade, alpha=0.4, markersize=3.5)
        if found.half_width is not None:
            ends = [found.mean - found.half_width, found.mean + found.half_width]
            axes.plot(ends, [place] * 2, color=shade, linewidth=2.2)
        axes.plot([found.mean], [place], "o", color=shade, markersize=7, markeredgecolor="white")
    axes.set_yticks(range(len(names)), names, fontsize=_LABEL_SIZE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labeltop=len(names) > _MOST_WITHOUT_TOP)
    title(axes, what, _PLOT_INCHES)
    kinds = set(comparison.metrics.values())
    metric = comparison.metrics.get(what, kinds.pop() if len(kinds) == 1 else "score")
    axes.set_xlabel(metric.replace("_", " "))


def _alt(comparison: Comparison, what: str) -> str:
    means = [(ln.label, ln.mean if what == MEAN else ln.tasks[what]) for ln in comparison.lines]
    return f"{what}: " + ", ".join(f"{label} {found.mean:.3f}" for label, found in means) + "."
