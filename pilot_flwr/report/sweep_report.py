"""The report of a sweep: tables, a dot for every seed, and learning curves per method.

It needs ``results.csv`` alone; without the jobs' run folders it has no learning curves.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from pilot_flwr.errors import PilotError
from pilot_flwr.report.drawing import (
    GREY,
    INK,
    PANEL_INCHES,
    Figure,
    Panel,
    Table,
    colour,
    exchange_axis,
    marker,
)
from pilot_flwr.report.page import Page, cells_of, write_page
from pilot_flwr.storage.run_folder import read_events, select
from pilot_flwr.sweeping.rows import DONE, SCORE, ZERO_SHOT, label_of, read_rows, task_scores
from pilot_flwr.sweeping.table import UNTOUCHED, Comparison, compare
from pilot_flwr.sweeping.writing import as_markdown
from pilot_flwr.wording import count, human_seconds

Row = Mapping[str, str]
Curve = dict[int, float]  # exchange → score

RESULTS = "results.csv"
MEAN = "mean over tasks"
_DASHES = ("-", "--", ":", "-.")
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
        figures.append(_dots(comparison, mine, end, about))
        figures.append(_curves(comparison, mine, runs, end, about))
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
        curves = {t: {n: scores[t] for n, scores in after.items() if t in scores} for t in tasks}
        curves[MEAN] = {
            n: sum(scores.values()) / len(scores)
            for n, scores in after.items()
            if len(scores) == len(tasks)
        }
        by_label.setdefault(label_of(row["method"], row["variant"]), []).append(curves)
    return {
        label: {what: _mean([seed.get(what, {}) for seed in seeds]) for what in seeds[0]}
        for label, seeds in by_label.items()
    }


def _mean(curves: Sequence[Curve]) -> Curve:
    numbers = set.intersection(*(set(curve) for curve in curves))
    return {n: sum(curve[n] for curve in curves) / len(curves) for n in sorted(numbers)}


def _belongs(row: Row, comparison: Comparison) -> bool:
    """Return whether a row is one of those that a comparison was made of."""
    split = row.get("evaluated_on", "")
    title = row["name"] + (f", {split} split" if split else "")
    tasks = {key.removeprefix(SCORE) for key, v in row.items() if key.startswith(SCORE) and v}
    return row["status"] == DONE and title == comparison.title and tasks == set(comparison.tasks)


def _title(comparison: Comparison) -> str:
    return f"{comparison.title} ({', '.join(comparison.tasks)})"


def _dots(comparison: Comparison, rows: Sequence[Row], end: str, about: str) -> Figure:
    scores = seed_scores(comparison, rows)
    text = (
        "The large dot is the mean over seeds and the bar its 95 % interval (Student's t), which a "
        "single seed does not have; the small dots below are the seeds. The dashed line is the "
        "untouched base model."
    )
    height = 1.0 + 0.29 * len(comparison.lines)
    panels = [
        Panel(
            partial(_dot_plot, comparison, scores, _base(rows, what), what),
            _alt(comparison, what),
            height=height,
        )
        for what in (MEAN, *comparison.tasks)
    ]
    return Figure(f"seeds{end}", f"Scores of every seed{about}", text, panels)


def _base(rows: Sequence[Row], what: str) -> float | None:
    """Return the mean score of the base model before any training, over seeds."""
    column = "zero_shot_mean" if what == MEAN else f"{ZERO_SHOT}{what}"
    scores = {row["seed"]: float(row[column]) for row in rows if row.get(column)}
    return sum(scores.values()) / len(scores) if scores else None


def _dot_plot(
    comparison: Comparison,
    scores: Mapping[str, Mapping[str, list[float]]],
    base: float | None,
    what: str,
    axes: Axes,
) -> None:
    labels = [line.label for line in comparison.lines]
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
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_title(what)
    kinds = set(comparison.metrics.values())
    metric = comparison.metrics.get(what, kinds.pop() if len(kinds) == 1 else "score")
    axes.set_xlabel(metric.replace("_", " "))


def _alt(comparison: Comparison, what: str) -> str:
    means = [(ln.label, ln.mean if what == MEAN else ln.tasks[what]) for ln in comparison.lines]
    return f"{what}: " + ", ".join(f"{label} {found.mean:.3f}" for label, found in means) + "."


def _curves(
    comparison: Comparison, rows: Sequence[Row], runs: Path, end: str, about: str
) -> Figure:
    name, title = f"learning-curves{end}", f"Learning curves per method{about}"
    curves = method_curves(rows, runs)
    if not curves:
        return Figure(name, title, "The jobs' run folders are not here, so there are no curves.")
    text = (
        "Mean over seeds of the scores after each exchange; 0 is the untouched base model. The "
        "line of a method with fewer exchanges ends earlier."
    )
    rows_of_legend = (len(curves) + 1) // 2
    height = PANEL_INCHES[1] + 0.17 * rows_of_legend
    panels = [
        Panel(
            partial(_curve_plot, comparison, curves, what),
            f"Learning curves of {len(curves)} methods: {what}.",
            height=height,
        )
        for what in (MEAN, *comparison.tasks)
    ]
    return Figure(name, title, text, panels)


def _curve_plot(
    comparison: Comparison, curves: Mapping[str, Mapping[str, Curve]], what: str, axes: Axes
) -> None:
    numbers = {0}
    for index, (label, by_task) in enumerate(curves.items()):
        curve = by_task.get(what, {})
        numbers |= set(curve)
        axes.plot(
            list(curve),
            list(curve.values()),
            color=colour(index),
            marker=marker(index),
            linestyle=_DASHES[index // 8 % len(_DASHES)],
            markersize=4,
            label=label,
        )
    axes.set_title(what)
    exchange_axis(axes, sorted(numbers))
    columns = 2 if max(map(len, curves)) <= 22 else 1
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)


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
