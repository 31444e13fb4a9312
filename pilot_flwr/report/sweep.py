"""The report of a sweep: tables, a dot for every seed, and learning curves per method.

It needs ``results.csv`` alone; without the jobs' run folders it has no learning curves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pilot_flwr.errors import PilotError
from pilot_flwr.formatting import count, human_seconds
from pilot_flwr.report.html import Page, write_page
from pilot_flwr.report.style import (
    GREY,
    INK,
    Figure,
    Panel,
    Table,
    colour,
    exchange_axis,
    in_lines,
    title,
)
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import Evaluated, mean_over_tasks, select, task_scores, tasks_of
from pilot_flwr.sweeps.compare import (
    MEAN,
    UNTOUCHED,
    Comparison,
    MethodScores,
    compare,
    legend,
    table_rows,
)
from pilot_flwr.sweeps.results import DONE, read_rows

Row = Mapping[str, str]
Curve = dict[int, float]  # exchange → score

RESULTS = "results.csv"
MOST_LINES = 12
"""Learning curves drawn at most: more cannot be told apart."""

_SHOWN_FAILURES = 10
_DOT_PLOT_INCHES = 2.2
_LABEL_SIZE = 8.5
_ROW_INCHES, _LINE_INCHES = 0.29, 0.14
_MOST_WITHOUT_TOP = 20
"""Rows up to which the scores are written below them alone."""


def is_sweep(path: Path) -> bool:
    """Return whether a path is a sweep's folder, or the ``results.csv`` of one."""
    return (path / RESULTS).is_file() or (path.is_file() and path.suffix == ".csv")


def write_sweep_report(
    path: Path,
    out: Path,
    *,
    baseline: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the report of a sweep's folder or ``results.csv`` into `out`, and return the page.

    `baseline` is the method that the others are compared with in the table; `say` gets lines of
    progress.
    """
    rows = read_rows(path)
    comparisons = compare(rows, baseline)
    csv = path / RESULTS if path.is_dir() else path
    figures = []
    for number, comparison in enumerate(comparisons):
        several = len(comparisons) > 1
        end = f"-{number + 1}" if several else ""
        about = f": {_title(comparison)}" if several else ""
        figures.append(dots(comparison, end, about))
        figures.append(curves(comparison, csv.parent / "runs", end, about))
    page = Page(
        title=f"Sweep: {', '.join(dict.fromkeys(row['name'] for row in rows))}",
        facts=_facts(csv, rows),
        warnings=_warnings(rows),
        figures=figures,
        tables=[Table(_title(c), table_rows(c, costs=True)) for c in comparisons],
        notes=list(dict.fromkeys(line for c in comparisons for line in legend(c))),
        files=[(f"{RESULTS}: a row per job", csv.read_text(encoding="utf-8"))],
        files_title="Results",
    )
    return write_page(page, out, say)


def _title(comparison: Comparison) -> str:
    return f"{comparison.title} ({', '.join(comparison.tasks)})"


def _facts(csv: Path, rows: Sequence[Row]) -> list[tuple[str, str]]:
    done = [row for row in rows if row["status"] == DONE]
    commits = dict.fromkeys(row["commit"] or "unknown" for row in done)
    changed = any(row["changed"] == "true" for row in done)
    seconds = sum(float(row["seconds"]) for row in done if row["seconds"])
    return [
        ("jobs", f"{len(done)} of {len(rows)} done, {human_seconds(seconds)} in total"),
        ("seeds", ", ".join(dict.fromkeys(row["seed"] for row in done))),
        ("engine", ", ".join(dict.fromkeys(row["engine"] for row in done))),
        ("commit", ", ".join(commits) + (", with uncommitted changes" if changed else "")),
        ("versions", "; ".join(dict.fromkeys(row["versions"] for row in done))),
        ("results", f"{csv.absolute().parent.name}/{RESULTS}"),
    ]


def _warnings(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row["status"] != DONE]
    lines = [f"{row['job']}: {row['error'] or row['status']}" for row in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"And {count(len(failed) - _SHOWN_FAILURES, 'more job')} without scores.")
    if len({row["commit"] for row in rows if row["status"] == DONE}) > 1:
        lines.append("The jobs were run by different commits of the code; see results.csv.")
    return lines


def dots(comparison: Comparison, end: str = "", about: str = "") -> Figure:
    """Return one panel for the mean over tasks and one for each task, with a dot for every seed.

    `end` and `about` are appended to the figure's name and title.
    """
    methods = [method.label for method in comparison.methods]
    labels = short_labels(methods)
    text = (
        "The large dot is the mean over seeds and the bar its 95 % interval (Student's t), which a "
        "single seed does not have; the small dots below are the seeds."
    )
    if comparison.untouched:
        text += " The dashed line is the untouched base model."
    lines = max(label.count("\n") for label in labels.values())
    height = 0.2 + (_ROW_INCHES + _LINE_INCHES * lines) * max(2, len(labels))
    panels = [
        Panel(
            partial(_dot_plot, comparison, labels, what),
            f"{what}: "
            + ", ".join(f"{m.label} {m.interval(what).mean:.3f}" for m in comparison.methods)
            + ".",
            height=1.0,
            plot=(_DOT_PLOT_INCHES, height),
        )
        for what in (MEAN, *comparison.tasks)
    ]
    return Figure(f"seeds{end}", f"Scores of every seed{about}", text + shortened(methods), panels)


def _dot_plot(comparison: Comparison, labels: Mapping[str, str], what: str, axes: Axes) -> None:
    if comparison.untouched:
        base = comparison.untouched.interval(what).mean
        axes.axvline(base, color=GREY, linestyle="--", linewidth=1.2, zorder=0.5, marker="")
    for place, method in enumerate(comparison.methods):
        shade = INK if method.label == UNTOUCHED else colour(0)
        seeds = list(method.scores[what].values())
        mean, half_width = method.interval(what)
        axes.plot(seeds, [place + 0.26] * len(seeds), "o", color=shade, alpha=0.4, markersize=3.5)
        axes.errorbar(
            mean, place, xerr=half_width, fmt="o", color=shade, elinewidth=2.2, markersize=7,
            markeredgecolor="white",
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), list(labels.values()), fontsize=_LABEL_SIZE)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labeltop=len(labels) > _MOST_WITHOUT_TOP)
    title(axes, what, _DOT_PLOT_INCHES)
    kinds = set(comparison.metrics.values())
    metric = comparison.metrics.get(what, kinds.pop() if len(kinds) == 1 else "score")
    axes.set_xlabel(metric.replace("_", " "))


def curves(comparison: Comparison, runs: Path, end: str = "", about: str = "") -> Figure:
    """Return learning curves, one panel for the mean over tasks and one for each task.

    `runs` has the jobs' run folders; `end` and `about` are appended to the figure's name and title.
    """
    name, heading = f"learning-curves{end}", f"Learning curves per method{about}"
    found = method_curves(comparison.methods, runs)
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
            f" Only the best by the last mean over tasks{and_baseline} are drawn; "
            f"{count(left_out, 'line')} of {len(found)} are not."
        )
    labels = short_labels(found)
    shown = {labels[label]: found[label] for label in drawn}
    panels = [
        Panel(
            partial(_curve_plot, shown, what),
            f"Learning curves of {count(len(shown), 'method')}: {what}.",
        )
        for what in (MEAN, *comparison.tasks)
    ]
    return Figure(name, heading, text + shortened(found), panels)


def method_curves(methods: Iterable[MethodScores], runs: Path) -> dict[str, dict[str, Curve]]:
    """Return learning curves: label → task or `MEAN` → exchange → mean over seeds.

    An exchange counts if every seed of the method that has a run folder has a score of it.
    """
    found: dict[str, dict[str, Curve]] = {}
    for method in methods:
        seeds = [curves for job in method.jobs if (curves := _job_curves(runs / job))]
        if seeds:
            found[method.label] = {
                what: _mean([seed.get(what, {}) for seed in seeds]) for what in seeds[0]
            }
    return found


def _job_curves(run: Path) -> dict[str, Curve]:
    """Return the curves of one run, empty if it is not here or has no scores."""
    try:
        events = read_events(run)
    except PilotError:
        return {}
    curves: dict[str, Curve] = {}
    for number in sorted({event.exchange for event in select(events, Evaluated)}):
        scores = task_scores(events, number)
        mean = mean_over_tasks(scores, tasks_of(events))
        for what, score in (scores if mean is None else scores | {MEAN: mean}).items():
            curves.setdefault(what, {})[number] = score
    return curves


def _mean(seeds: Sequence[Curve]) -> Curve:
    numbers = set.intersection(*(set(curve) for curve in seeds))
    return {n: sum(curve[n] for curve in seeds) / len(seeds) for n in sorted(numbers)}


def best(found: Mapping[str, Mapping[str, Curve]], baseline: str | None) -> list[str]:
    """Return the labels of at most `MOST_LINES` lines by their last mean, best first.

    The baseline is always one of them.
    """

    def last(label: str) -> float:
        curve = found[label].get(MEAN) or {}
        return curve[max(curve)] if curve else float("-inf")

    ranked = sorted(found, key=last, reverse=True)
    chosen = ranked[:MOST_LINES]
    if baseline in ranked[MOST_LINES:]:
        chosen[-1] = baseline
    return chosen


def _curve_plot(shown: Mapping[str, Mapping[str, Curve]], what: str, axes: Axes) -> None:
    numbers = {0}
    for label, by_task in shown.items():
        curve = by_task.get(what, {})
        numbers |= set(curve)
        axes.plot(list(curve), list(curve.values()), markersize=4, label=label)
    title(axes, what)
    exchange_axis(axes, sorted(numbers))


def short_labels(labels: Iterable[str]) -> dict[str, str]:
    """Return label → short label, in lines and all different, for the methods of one figure.

    A setting that all methods share is left out, and a setting's name is cut to the shortest end
    that no other one has.
    """
    labels = list(labels)
    given = [label for label in labels if label != UNTOUCHED]
    shared = _shared_settings(given)
    ends = _ends(_settings(given))

    def shorten(word: str) -> str:
        name, equals, value = word.partition("=")
        return ends.get(name, name) + equals + value

    short = {
        label: " ".join(shorten(word) for word in label.split() if word not in shared)
        for label in given
    }
    if len(set(short.values())) < len(short):
        short = {}
    return {label: in_lines(short.get(label, label)) for label in labels}


def shortened(labels: Iterable[str]) -> str:
    """Describe what `short_labels` left out, empty if nothing."""
    labels = list(labels)
    shared = _shared_settings(labels)
    text = f" All methods have {' '.join(shared)}." if shared else ""
    ends = _ends(_settings(labels) - {word.split("=")[0] for word in shared})
    if cut := [f"{end} is {name}" for name, end in sorted(ends.items()) if end != name]:
        text += f" In the names, {', '.join(cut)}."
    return text


def _settings(labels: Iterable[str]) -> set[str]:
    return {word.split("=")[0] for label in labels for word in label.split() if "=" in word}


def _shared_settings(labels: Iterable[str]) -> list[str]:
    """Return the settings that all of several methods have, as ``name=value``."""
    variants = [label.split()[1:] for label in labels if label != UNTOUCHED]
    if len(variants) < 2:
        return []
    return [word for word in variants[0] if "=" in word and all(word in v for v in variants)]


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
