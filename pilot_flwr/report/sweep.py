"""The names of a sweep's methods and variants, as short as they can be told apart.

A dot for every seed of a sweep, with means and intervals, per task and for their mean.

Learning curves of a sweep's methods, means over seeds, from the jobs' run folders.

The report of a sweep: tables, a dot for every seed, and learning curves per method.

It needs ``results.csv`` alone; without the jobs' run folders it has no learning curves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pilot_flwr.errors import PilotError
from pilot_flwr.formatting import count, human_seconds
from pilot_flwr.metrics.score import mean_of_all
from pilot_flwr.report.html import Page, cells_of, write_page
from pilot_flwr.report.style import (
    GREY,
    INK,
    PANEL_INCHES,
    Figure,
    Panel,
    Table,
    colour,
    exchange_axis,
    in_lines,
    legend_below,
    marker,
    panel_size,
    text_inches,
    title,
)
from pilot_flwr.run.directory import read_events, select, tasks_of
from pilot_flwr.sweeps.compare import UNTOUCHED, Comparison, as_markdown, compare
from pilot_flwr.sweeps.results import DONE, SCORE, ZERO_SHOT, label_of, read_rows, task_scores


def short_labels(labels: Iterable[str]) -> dict[str, str]:
    """Shorten what `pilot_flwr.sweeps.results.label_of` made, a method and the settings swept over.

    A setting that all lines have alike is left out, and of a setting's name only the end stays
    that no other one has.

    Parameters
    ----------
    labels : iterable of str
        All lines of a table.

    Returns
    -------
    dict
        Label → short label, in lines; all are different.
    """
    labels = list(labels)
    given = [label for label in labels if label != UNTOUCHED]
    alike = common_settings(given)
    ends = _ends({word.split("=")[0] for label in given for word in label.split() if "=" in word})
    short = {label: " ".join(_words(label, alike, ends)) for label in given}
    if len(set(short.values())) < len(short):
        short = {label: label for label in given}
    return {label: in_lines(short.get(label, label)) for label in labels}


def common_settings(labels: Iterable[str]) -> list[str]:
    """Return the settings that all of several lines have alike, as ``name=value``."""
    variants = [label.split()[1:] for label in labels if label != UNTOUCHED]
    if len(variants) < 2:
        return []
    return [word for word in variants[0] if "=" in word and all(word in v for v in variants)]


def shortened(labels: Iterable[str]) -> str:
    """Say what `short_labels` left out, empty if it was nothing."""
    labels = list(labels)
    words = ""
    if alike := common_settings(labels):
        words += f" All lines have {' '.join(alike)}."
    names = {word.split("=")[0] for label in labels for word in label.split() if "=" in word}
    ends = _ends(names - {word.split("=")[0] for word in alike})
    if cut := [f"{end} is {name}" for name, end in sorted(ends.items()) if end != name]:
        words += f" In the names, {', '.join(cut)}."
    return words


def _words(label: str, alike: list[str], ends: dict[str, str]) -> list[str]:
    words = []
    for word in label.split():
        name, equals, value = word.partition("=")
        words += [] if word in alike else [ends.get(name, name) + equals + value]
    return words


def _ends(names: set[str]) -> dict[str, str]:
    """Return the shortest end of every dotted name that no other name has."""
    ends = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in names - {name}]
        unlike = (t for t in tails if not any(other.endswith(f".{t}") for other in others))
        ends[name] = next(unlike, name)
    return ends


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


RESULTS = "results.csv"
_SHOWN_FAILURES = 10


def is_sweep(path: Path) -> bool:
    """Return whether a path is a sweep's folder, or a ``results.csv`` of one."""
    return (path / RESULTS).is_file() or (path.is_file() and path.suffix == ".csv")


def write_sweep_report(
    path: Path,
    out: Path,
    *,
    baseline: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the report of a sweep.

    Parameters
    ----------
    path : Path
        The sweep's folder, or a ``results.csv``.
    out : Path
        Gets ``index.html`` and the PNG files.
    baseline : str, optional
        Method that all others are compared with in the table.
    say : callable
        Gets lines of progress.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    PilotError
        There are no results, or none with scores.
    """
    rows = read_rows(path)
    comparisons = compare(rows, baseline)
    runs = path / "runs" if path.is_dir() else path.parent / "runs"
    figures = []
    for number, comparison in enumerate(comparisons):
        mine = [row for row in rows if _belongs(row, comparison)]
        end = f"-{number + 1}" if len(comparisons) > 1 else ""
        about = f": {_title(comparison)}" if len(comparisons) > 1 else ""
        figures.append(dots(comparison, mine, end, about))
        figures.append(curves(comparison, mine, runs, end, about))
    page = Page(
        title=f"Sweep: {', '.join(dict.fromkeys(row['name'] for row in rows))}",
        facts=_facts(path, rows),
        warnings=_warnings(rows),
        figures=figures,
        tables=[Table(_title(c), cells_of(as_markdown(c, costs=True))) for c in comparisons],
        notes=_legend(comparisons),
        files=[(f"{RESULTS}: a row per job", (_csv(path)).read_text(encoding="utf-8"))],
        files_title="Results",
    )
    return write_page(page, out, say)


def _belongs(row: Row, comparison: Comparison) -> bool:
    """Return whether a row is one of those that a comparison was made of."""
    split = row.get("evaluated_on", "")
    title = row["name"] + (f", {split} split" if split else "")
    tasks = {key.removeprefix(SCORE) for key, v in row.items() if key.startswith(SCORE) and v}
    return row["status"] == DONE and title == comparison.title and tasks == set(comparison.tasks)


def _title(comparison: Comparison) -> str:
    return f"{comparison.title} ({', '.join(comparison.tasks)})"


def _facts(path: Path, rows: Sequence[Row]) -> list[tuple[str, str]]:
    done = [row for row in rows if row["status"] == DONE]
    commits = dict.fromkeys(row["commit"] or "unknown" for row in done)
    changed = any(row["changed"] == "true" for row in done)
    seconds = sum(float(row["seconds"]) for row in done if row["seconds"])
    return [
        ("jobs", f"{len(done)} of {len(rows)} done, {human_seconds(seconds)} of running in all"),
        ("seeds", ", ".join(dict.fromkeys(row["seed"] for row in done))),
        ("engine", ", ".join(dict.fromkeys(row["engine"] for row in done))),
        ("commit", ", ".join(commits) + (", with changes not committed" if changed else "")),
        ("versions", "; ".join(dict.fromkeys(row["versions"] for row in done))),
        ("results", f"{_csv(path).absolute().parent.name}/{RESULTS}"),
    ]


def _warnings(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row["status"] != DONE]
    lines = [f"{row['job']}: {row['error'] or row['status']}" for row in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"And {count(len(failed) - _SHOWN_FAILURES, 'more job')} without scores.")
    commits = {row["commit"] for row in rows if row["status"] == DONE}
    if len(commits) > 1:
        lines.append("The jobs were run by different commits of the code; see results.csv.")
    return lines


def _legend(comparisons: Sequence[Comparison]) -> list[str]:
    lines = [line for c in comparisons for line in as_markdown(c).splitlines()[2:]]
    return list(dict.fromkeys(line for line in lines if line and line[0] != "|"))


def _csv(path: Path) -> Path:
    return path / RESULTS if path.is_dir() else path
