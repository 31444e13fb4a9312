"""Means with intervals, and paired tests, of scores over seeds.

Tables of sweeps: a row per method, means over seeds with intervals, tests against a baseline.

Rows of ``results.csv`` with the same `name`, tasks and split make one table. In it a method with
its variant (what else was swept over) is one row, and its seeds are the repetitions. `compare`
does the statistics; `pilot_flwr.sweeps.compare` writes them down.

A comparison of methods, written down as Markdown or LaTeX.

To add a format, write a function beside `as_markdown` that words `_cells` and `_legend` in it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scipy import stats

from pilot_flwr.errors import ConfigError
from pilot_flwr.formatting import count, human_bytes, human_seconds
from pilot_flwr.sweeps.results import DONE, SCORE, ZERO_SHOT, label_of

LEVEL = 0.95

ROUNDING = 1e-12
"""Scores, which are at most 1, that differ by less are the same."""


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval, None for fewer than two values."""

    mean: float
    half_width: float | None


class Paired(NamedTuple):
    """Differences of pairs: how many, their mean with its interval, and the test's p.

    `p` is that of the two-sided paired t-test against a difference of zero. It is None where there
    is no such test: for fewer than two pairs, or differences that are all the same.
    """

    pairs: int
    difference: Interval
    p: float | None


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % interval by Student's t.

    The half-width is t · s / √n, where s has n − 1 in its denominator and t is the 97.5 %
    quantile of Student's distribution with n − 1 degrees of freedom.

    Parameters
    ----------
    values : sequence of float
        At least one, independent of each other.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return Interval(mean, quantile * deviation / math.sqrt(n))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two methods over the same seeds.

    Parameters
    ----------
    values, baseline : sequence of float
        Scores of both, seed by seed.

    Notes
    -----
    Differences that are all the same, up to rounding, have no spread to test by.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    found = interval(differences)
    if max(differences) - min(differences) <= ROUNDING:
        return Paired(len(differences), found, None)
    return Paired(len(differences), found, float(stats.ttest_1samp(differences, 0.0).pvalue))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p of several tests by Holm's method; None stays None and does not count.

    The k-th smallest of m is multiplied by m − k + 1, made at least as large as those before it
    and at most 1 (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    order = sorted((p, index) for index, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted


UNTOUCHED = "untouched base"
"""Row of what every run evaluates before its first training."""

CsvRow = Mapping[str, str]

Scores = dict[str, dict[int, float]]
"""Task, or `MEAN`, → seed → score."""

MEAN = ""


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes
    ----------
    label : str
        Method and variant.
    seeds : tuple of int
        Its repetitions.
    tasks : dict
        Task → interval of its score.
    mean : Interval
        Of the mean over tasks.
    test : Paired or None
        Against the baseline, over the seeds that both have.
    p : float or None
        Of that test, after Holm's correction over the table.
    bytes_up, bytes_down, seconds : float or None
        Means over seeds, of a run.
    """

    label: str
    seeds: tuple[int, ...]
    tasks: dict[str, Interval]
    mean: Interval
    test: Paired | None = None
    p: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A table: its title, tasks, rows and remarks."""

    title: str
    tasks: tuple[str, ...]
    metrics: dict[str, str]
    lines: list[Line]
    baseline: str | None
    notes: list[str] = field(default_factory=list)


def compare(rows: Sequence[CsvRow], baseline: str | None = None) -> list[Comparison]:
    """Return one comparison per scenario.

    Parameters
    ----------
    rows : sequence of mapping
        Of one or several ``results.csv``.
    baseline : str, optional
        Method (with its variant, if it has several) that all others are compared with.

    Raises
    ------
    ConfigError
        A scenario has no such method, or rows of one method have different settings.
    """
    usable = [row for row in rows if row["status"] == DONE and row["mean"]]
    scenarios: dict[tuple[str, ...], list[CsvRow]] = {}
    for row in usable:
        tasks = tuple(sorted(_tasks(row)))
        scenarios.setdefault((row["name"], row.get("evaluated_on", ""), *tasks), []).append(row)
    if not scenarios:
        raise ConfigError("There is no finished job with scores to make a table of.")
    left_out = [row for row in rows if row not in usable]
    notes = [_left_out(left_out)] if left_out else []
    return [_comparison(mine, baseline, notes) for mine in scenarios.values()]


def _comparison(rows: list[CsvRow], baseline: str | None, notes: list[str]) -> Comparison:
    tasks = tuple(dict.fromkeys(task for row in rows for task in _tasks(row)))
    groups: dict[str, dict[int, CsvRow]] = {}
    twice = 0
    for row in rows:
        group = groups.setdefault(label_of(row["method"], row["variant"]), {})
        _check_same_settings(row, group)
        twice += int(row["seed"]) in group
        group[int(row["seed"])] = row
    scores = {label: _scores(group, tasks, SCORE, "mean") for label, group in groups.items()}
    chosen = None if baseline is None else _find(baseline, scores, rows[0]["name"])
    lines = [_line(label, groups[label], scores[label], tasks) for label in groups]
    lines = _tested(lines, scores, chosen)
    if untouched := _untouched(groups, tasks):
        lines.insert(0, untouched)
    split = rows[0].get("evaluated_on", "")
    title = rows[0]["name"] + (f", {split} split" if split else "")
    metrics = dict(part.split(":", 1) for part in rows[0]["metrics"].split())
    remarks = list(notes)
    if twice:
        remarks.append(f"{count(twice, 'row')} given twice: the last one counts.")
    if len(lengths := sorted({int(row["rounds"]) for row in rows if row.get("rounds")})) > 1:
        remarks.append(f"Runs have different `strategy.rounds`: {', '.join(map(str, lengths))}.")
    return Comparison(title, tasks, metrics, lines, chosen, remarks)


def _check_same_settings(row: CsvRow, group: Mapping[int, CsvRow]) -> None:
    for other in group.values():
        if other["settings"] != row["settings"]:
            raise ConfigError(
                f"{label_of(row['method'], row['variant'])!r} of {row['name']!r} has rows with "
                f"different settings: {other['overrides']!r} and {row['overrides']!r}. Give them "
                "another `name` or `strategy.name`, or sweep over what differs."
            )


def _find(baseline: str, labels: Mapping[str, object], name: str) -> str:
    if baseline in labels:
        return baseline
    raise ConfigError(
        f"`--baseline` is {baseline!r} but {name!r} has {', '.join(map(repr, labels))}."
    )


def _line(label: str, group: Mapping[int, CsvRow], scores: Scores, tasks: Sequence[str]) -> Line:
    costs = {
        key: _mean([float(row[key]) for row in group.values() if row.get(key)])
        for key in ("bytes_up", "bytes_down", "seconds")
    }
    return Line(
        label,
        tuple(sorted(group)),
        {task: interval(list(scores[task].values())) for task in tasks},
        interval(list(scores[MEAN].values())),
        **costs,  # type: ignore[arg-type]
    )


def _tested(
    lines: Sequence[Line], scores: Mapping[str, Scores], baseline: str | None
) -> list[Line]:
    """Return the lines with their tests against the baseline."""
    if baseline is None:
        return list(lines)
    theirs = scores[baseline][MEAN]
    tests: list[Paired | None] = []
    for line in lines:
        mine = scores[line.label][MEAN]
        common = sorted(mine.keys() & theirs.keys())
        known = line.label != baseline and common
        tests.append(
            paired([mine[s] for s in common], [theirs[s] for s in common]) if known else None
        )
    adjusted = holm([test.p if test else None for test in tests])
    return [
        replace(line, test=test, p=p) for line, test, p in zip(lines, tests, adjusted, strict=True)
    ]


def _untouched(groups: Mapping[str, Mapping[int, CsvRow]], tasks: Sequence[str]) -> Line | None:
    """Return the row of the base model before any training, if it is the same for all rows."""
    by_seed: dict[int, CsvRow] = {}
    columns = [f"{ZERO_SHOT}{task}" for task in tasks]
    for group in groups.values():
        for seed, row in group.items():
            if row["zero_shot_mean"]:
                first = by_seed.setdefault(seed, row)
                if any(first[column] != row[column] for column in columns):
                    return None  # variants have other data, or another base
    if not by_seed or "zero_shot" in groups:
        return None
    scores = _scores(by_seed, tasks, ZERO_SHOT, "zero_shot_mean")
    found = {task: interval(list(scores[task].values())) for task in tasks}
    return Line(UNTOUCHED, tuple(sorted(by_seed)), found, interval(list(scores[MEAN].values())))


def _scores(group: Mapping[int, CsvRow], tasks: Sequence[str], prefix: str, mean: str) -> Scores:
    columns = {task: f"{prefix}{task}" for task in tasks} | {MEAN: mean}
    return {
        task: {seed: float(row[column]) for seed, row in group.items()}
        for task, column in columns.items()
    }


def _tasks(row: CsvRow) -> list[str]:
    return [
        key.removeprefix(SCORE) for key, value in row.items() if key.startswith(SCORE) and value
    ]


def _left_out(rows: Sequence[CsvRow]) -> str:
    shown = ", ".join(f"{row['job']} ({row['status']})" for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"Left out, as without scores: {shown}{more}."


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%#_{}$"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
)


def as_markdown(comparison: Comparison, *, costs: bool = False) -> str:
    """Return a table as Markdown, with its title and what its figures mean."""
    cells = _cells(comparison, costs)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text = [f"**{comparison.title}**", "", *lines, "", *_legend(comparison)]
    return "\n".join(text) + "\n"


def as_latex(comparison: Comparison, *, costs: bool = False) -> str:
    r"""Return a table as LaTeX for the package booktabs, title and legend as comments."""
    header, *rows = _cells(comparison, costs)
    body = [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    comments = [comparison.title, *_legend(comparison)]
    return "\n".join(
        [
            *(f"% {line}" for line in comments if line),
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(map(_escape, header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _cells(comparison: Comparison, costs: bool) -> list[list[str]]:
    tested = comparison.baseline is not None
    header = ["method", "n", *comparison.tasks, "mean"]
    header += [f"difference to {comparison.baseline}", "p"] if tested else []
    header += ["sent up", "sent down", "time"] if costs else []
    cells = [header]
    for line in comparison.lines:
        row = [line.label, str(len(line.seeds))]
        row += [_plain(line.tasks[task]) for task in comparison.tasks]
        row.append(_plain(line.mean))
        if tested:
            row += [_difference(line), _p(line.p)]
        if costs:
            sizes = [line.bytes_up, line.bytes_down]
            row += ["" if size is None else human_bytes(size) for size in sizes]
            row.append("" if line.seconds is None else human_seconds(line.seconds))
        cells.append(row)
    return cells


def _difference(line: Line) -> str:
    if line.test is None:
        return ""
    sign = "+" if line.test.difference.mean >= 0 else ""
    pairs = "" if line.test.pairs == len(line.seeds) else f" ({line.test.pairs} pairs)"
    return sign + _plain(line.test.difference) + pairs


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plain(found: Interval) -> str:
    text = f"{found.mean:.3f}"
    return text if found.half_width is None else f"{text} ± {found.half_width:.3f}"


def _legend(comparison: Comparison) -> list[str]:
    kinds = set(comparison.metrics.values())
    metric = ", ".join(f"{task}: {name}" for task, name in comparison.metrics.items())
    lines = [
        f"Scores: {kinds.pop() if len(kinds) == 1 else metric}. Mean over n seeds ± half the width "
        "of its 95 % interval (Student's t); `mean` is over the tasks."
    ]
    if comparison.baseline is not None:
        tests = sum(line.p is not None for line in comparison.lines)
        lines.append(
            f"p: two-sided paired t-test over seeds of `mean` against {comparison.baseline}, "
            f"Holm-corrected for {count(tests, 'comparison')}."
        )
    if len({len(line.seeds) for line in comparison.lines if line.label != UNTOUCHED}) > 1:
        lines.append("The methods have different numbers of seeds.")
    return lines + comparison.notes


def _escape(text: str) -> str:
    return text.translate(_LATEX)
