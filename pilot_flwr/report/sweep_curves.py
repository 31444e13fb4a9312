"""Learning curves of a sweep's methods, means over seeds, from the jobs' run folders."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from pilot_flwr.errors import PilotError
from pilot_flwr.metrics.score import mean_of_all
from pilot_flwr.report.drawing import (
    Figure,
    Panel,
    colour,
    exchange_axis,
    marker,
)
from pilot_flwr.report.fitting import legend_below, panel_size, title
from pilot_flwr.report.sweep_dots import MEAN
from pilot_flwr.report.sweep_labels import short_labels, shortened
from pilot_flwr.storage.run_folder import read_events, select, tasks_of
from pilot_flwr.sweeping.rows import label_of, task_scores
from pilot_flwr.sweeping.table import Comparison
from pilot_flwr.wording import count

Row = Mapping[str, str]
Curve = dict[int, float]  # exchange → score

MOST_LINES = 12
"""Drawn at most: more cannot be told apart."""

_COLOURS = 8
"""After which a line has a colour for the second time: with another marker, and dashed."""


def curves(comparison: Comparison, rows: Sequence[Row], runs: Path, end: str, about: str) -> Figure:
    """Return one panel for the mean over tasks and one for each task.

    Parameters
    ----------
    comparison : Comparison
        The table's.
    rows : sequence of mapping
        Those of ``results.csv`` that it was made of.
    runs : Path
        Folder of the jobs' run folders.
    end, about : str
        Of the figure's name and title.
    """
    name, heading = f"learning-curves{end}", f"Learning curves per method{about}"
    found = method_curves(rows, runs)
    if not found:
        return Figure(name, heading, "The jobs' run folders are not here, so there are no curves.")
    drawn = best(found, comparison.baseline)
    text = (
        "Mean over seeds of the scores after each exchange; 0 is the untouched base model. The "
        "line of a method with fewer exchanges ends earlier."
    )
    if left_out := len(found) - len(drawn):
        and_baseline = "" if comparison.baseline is None else " and the baseline"
        text += (
            f" The best by the last mean over tasks{and_baseline} are drawn; "
            f"{count(left_out, 'line')} of {len(found)} are not."
        )
    text += shortened(found)
    labels = short_labels(found)
    shown = {labels[label]: found[label] for label in drawn}
    panels = [
        Panel(
            partial(_curve_plot, shown, what),
            f"Learning curves of {count(len(shown), 'method')}: {what}.",
            *panel_size(list(shown)),
        )
        for what in (MEAN, *comparison.tasks)
    ]
    return Figure(name, heading, text, panels)


def method_curves(rows: Sequence[Row], runs: Path) -> dict[str, dict[str, Curve]]:
    """Return learning curves: label → task or `MEAN` → exchange → mean over seeds.

    An exchange counts if every seed of the method that has a run folder has a score of it.
    """
    by_label: dict[str, list[dict[str, Curve]]] = {}
    for row in rows:
        try:
            events = read_events(runs / row["job"])
        except PilotError:
            continue
        numbers = sorted({event["round"] for event in select(events, "evaluate")})
        after = {number: task_scores(events, number) for number in numbers}
        tasks = dict.fromkeys(task for scores in after.values() for task in scores)
        if not tasks:
            continue
        mine = {t: {n: scores[t] for n, scores in after.items() if t in scores} for t in tasks}
        means = {n: mean_of_all(scores, tasks_of(events)) for n, scores in after.items()}
        mine[MEAN] = {n: mean for n, mean in means.items() if mean is not None}
        by_label.setdefault(label_of(row["method"], row["variant"]), []).append(mine)
    return {
        label: {what: _mean([seed.get(what, {}) for seed in seeds]) for what in seeds[0]}
        for label, seeds in by_label.items()
    }


def best(found: Mapping[str, Mapping[str, Curve]], baseline: str | None) -> list[str]:
    """Return the labels of at most `MOST_LINES` lines: the best by their last mean, best first.

    The baseline is one of them, wherever it stands.
    """

    def last(label: str) -> float:
        curve = found[label].get(MEAN) or {}
        return curve[max(curve)] if curve else float("-inf")

    ranked = sorted(found, key=last, reverse=True)
    chosen = ranked[:MOST_LINES]
    if baseline in ranked[MOST_LINES:]:
        chosen[-1] = baseline
    return chosen


def _mean(seeds: Sequence[Curve]) -> Curve:
    numbers = set.intersection(*(set(curve) for curve in seeds))
    return {n: sum(curve[n] for curve in seeds) / len(seeds) for n in sorted(numbers)}


def _curve_plot(shown: Mapping[str, Mapping[str, Curve]], what: str, axes: Axes) -> None:
    numbers = {0}
    for index, (label, by_task) in enumerate(shown.items()):
        curve = by_task.get(what, {})
        numbers |= set(curve)
        again = index // _COLOURS
        axes.plot(
            list(curve),
            list(curve.values()),
            color=colour(index),
            marker=marker(index + 3 * again),
            linestyle="--" if again else "-",
            markersize=4,
            label=label,
        )
    title(axes, what)
    exchange_axis(axes, sorted(numbers))
    legend_below(axes)
