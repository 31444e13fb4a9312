"""The report of a sweep: tables, a dot for every seed, and learning curves per method.

It needs only ``results.csv``, and the jobs' run folders for the learning curves.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pilot_flwr.errors import PilotError
from pilot_flwr.formatting import count, human_seconds
from pilot_flwr.report.page import (
    GREY,
    INK,
    Figure,
    Page,
    Panel,
    Table,
    colour,
    exchange_axis,
    in_lines,
    title,
    write_page,
)
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.history import MEAN, score_curves
from pilot_flwr.sweeps.compare import (
    UNTOUCHED,
    Comparison,
    CsvRow,
    MethodScores,
    compare,
    legend,
    table_rows,
)
from pilot_flwr.sweeps.results import DONE, RESULTS, read_rows

Curve = dict[int, float]  # exchange → score

MOST_LINES = 12
"""Maximum number of learning curves drawn: more could not be distinguished."""

_SHOWN_FAILURES = 10
_DOT_PLOT_INCHES = 2.2
_LABEL_SIZE = 8.5
_ROW_INCHES, _LINE_INCHES = 0.29, 0.14
_MOST_WITHOUT_TOP = 20
"""Number of rows above which the scores are also written at the top."""


def is_sweep(path: Path) -> bool:
    """Return whether a path is a sweep's folder or ``results.csv``."""
    return (path / RESULTS).is_file() or (path.is_file() and path.suffix == ".csv")


def write_sweep_report(
    path: Path,
    out: Path,
    *,
    baseline: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the report of a sweep's folder or ``results.csv`` into `out`; return the page's path.

    The table compares all methods with `baseline`; `say` receives lines of progress.
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


def _facts(csv: Path, rows: Sequence[CsvRow]) -> list[tuple[str, str]]:
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


def _warnings(rows: Sequence[CsvRow]) -> list[str]:
    failed = [row for row in rows if row["status"] != DONE]
    lines = [f"{row['job']}: {row['error'] or row['status']}" for row in failed[:_SHOWN_FAILURES]]
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"And {count(len(failed) - _SHOWN_FAILURES, 'more job')} without scores.")
    if len({row["commit"] for row in rows if row["status"] == DONE}) > 1:
        lines.append("The jobs were run by different commits of the code; see results.csv.")
    return lines


def dots(comparison: Comparison, end: str = "", about: str = "") -> Figure:
    """Return panels for the mean over tasks and each task, with a dot for every seed.

    `end` and `about` are appended to the figure's name and title.
    """
    methods = [method.label for method in comparison.methods]
    labels = short_labels(methods)
    text = (
        "A large dot is the mean over seeds, with a bar for its 95 % interval (Student's t) if "
        "there are several; the small dots below are the seeds."
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
    """Return learning curves, in panels for the mean over tasks and each task.

    `runs` has the jobs' run folders; `end` and `about` are appended to the figure's name and title.
    """
    name, heading = f"learning-curves{end}", f"Learning curves per method{about}"
    found = method_curves(comparison.methods, runs)
    if not found:
        return Figure(name, heading, "The jobs' run folders are missing, so there are no curves.")
    drawn = best(found, comparison.baseline)
    text = (
        "Scores after each exchange, averaged over seeds; 0 is the untouched base model. Methods "
        "with fewer exchanges end earlier."
    )
    if left_out := len(found) - len(drawn):
        and_baseline = "" if comparison.baseline is None else " and the baseline"
        text += (
            f" Only the best by their last mean over tasks{and_baseline} are drawn; "
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

    An exchange counts if every seed with a run folder has a score of it.
    """
    found: dict[str, dict[str, Curve]] = {}
    for method in methods:
        seeds = []
        for job in method.jobs:
            with suppress(PilotError):  # a job's run folder may be missing or unreadable
                seeds.append(score_curves(read_events(runs / job)))
        seeds = [curves for curves in seeds if curves]
        if seeds:
            found[method.label] = {
                what: _mean([seed.get(what, {}) for seed in seeds]) for what in seeds[0]
            }
    return found


def _mean(seeds: Sequence[Curve]) -> Curve:
    numbers = set.intersection(*(set(curve) for curve in seeds))
    return {n: fmean(curve[n] for curve in seeds) for n in sorted(numbers)}


def best(found: Mapping[str, Mapping[str, Curve]], baseline: str | None) -> list[str]:
    """Return the labels of the `MOST_LINES` best lines by their last mean, and the baseline's."""

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
    """Return label → short label, wrapped and unique, for the methods of one figure.

    Settings that all methods share are omitted, and the names of the others are shortened to their
    last components, as many as make them unique.
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
    """Describe what `short_labels` omitted, empty if nothing."""
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
    """Return the settings that all methods share, as ``name=value``; none of a single method."""
    variants = [label.split()[1:] for label in labels if label != UNTOUCHED]
    if len(variants) < 2:
        return []
    return [word for word in variants[0] if "=" in word and all(word in v for v in variants)]


def _ends(names: set[str]) -> dict[str, str]:
    """Return the shortest unique end of every dotted name."""
    ends = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in names - {name}]
        unique = (t for t in tails if not any(other.endswith(f".{t}") for other in others))
        ends[name] = next(unique, name)
    return ends
