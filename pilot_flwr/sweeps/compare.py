"""Compare methods over seeds: means with intervals, paired tests, tables.

Rows of ``results.csv`` with the same `name`, tasks and split form one comparison of methods. A
method includes its variant (the other swept settings) and is repeated over seeds.

To add a format, write a function like `as_markdown` that renders `table_rows` and `legend`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scipy import stats

from pilot_flwr.errors import ConfigError
from pilot_flwr.formatting import count, human_bytes, human_seconds
from pilot_flwr.run.history import MEAN
from pilot_flwr.run.tables import markdown
from pilot_flwr.sweeps.results import DONE, SCORE, ZERO_SHOT, label_of

LEVEL = 0.95

ROUNDING = 1e-12
"""Scores, at most 1, that differ by less are equal."""

UNTOUCHED = "untouched base"
"""Label of the untrained base model, which every run evaluates first."""

CsvRow = Mapping[str, str]


class Interval(NamedTuple):
    """A mean and the half-width of its confidence interval, None for a single value."""

    mean: float
    half_width: float | None


class Paired(NamedTuple):
    """Number of pairs, mean difference with its interval, and p-value.

    `p` is from the two-sided paired t-test; None if that is undefined, for a single pair or equal
    differences.
    """

    pairs: int
    difference: Interval
    p: float | None


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its 95 % Student t interval.

    The half-width is t · s / √n, with the sample standard deviation s (n − 1 in the denominator)
    and the 97.5 % quantile t of Student's distribution with n − 1 degrees of freedom.
    """
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, None)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(n))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two methods' scores, paired by seed."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    equal = max(differences) - min(differences) <= ROUNDING
    p = None if equal else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Paired(len(differences), interval(differences), p)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method; None stays None and is not counted.

    The k-th smallest of m is multiplied by m − k + 1, raised to at least the previous one and
    capped at 1 (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    order = sorted((p, index) for index, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class MethodScores:
    """The scores of a method over seeds."""

    label: str
    scores: dict[str, dict[int, float]]
    """Task, or `MEAN`, → seed → score."""

    jobs: tuple[str, ...] = ()
    costs: dict[str, float | None] = field(default_factory=dict)
    """``bytes_up``, ``bytes_down``, ``seconds`` of a run: means over seeds."""

    test: Paired | None = None
    """Of `MEAN` against the baseline's, over the seeds that both have."""

    p: float | None = None
    """p-value of `test` after Holm's correction over the comparison."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds with a score."""
        return tuple(sorted(self.scores[MEAN]))

    def interval(self, what: str = MEAN) -> Interval:
        """Return the mean and interval over seeds of a task's score, or of `MEAN`."""
        return interval(list(self.scores[what].values()))


@dataclass(frozen=True)
class Comparison:
    """The methods of jobs with the same `name`, tasks and split."""

    title: str
    tasks: tuple[str, ...]
    metrics: dict[str, str]
    methods: list[MethodScores]
    baseline: str | None
    untouched: MethodScores | None
    """The untrained base model; None if its rows differ."""

    notes: list[str] = field(default_factory=list)


def compare(rows: Sequence[CsvRow], baseline: str | None = None) -> list[Comparison]:
    """Compare the rows of one or several ``results.csv`` of each `name`, tasks and split.

    All methods are tested against the method with the label `baseline`.
    """
    usable = [row for row in rows if row["status"] == DONE and row["mean"]]
    groups: dict[tuple[str, ...], list[CsvRow]] = {}
    for row in usable:
        key = (row["name"], row.get("evaluated_on", ""), *sorted(_tasks(row)))
        groups.setdefault(key, []).append(row)
    if not groups:
        raise ConfigError("No finished job has scores to tabulate.")
    skipped = [row for row in rows if row not in usable]
    notes = [_omitted(skipped)] if skipped else []
    return [_comparison(mine, baseline, notes) for mine in groups.values()]


def _comparison(rows: list[CsvRow], baseline: str | None, notes: list[str]) -> Comparison:
    name, split = rows[0]["name"], rows[0].get("evaluated_on", "")
    tasks = tuple(dict.fromkeys(task for row in rows for task in _tasks(row)))
    groups: dict[str, dict[int, CsvRow]] = {}
    for row in rows:
        group = groups.setdefault(label_of(row["method"], row["variant"]), {})
        _check_same_settings(row, group)
        group[int(row["seed"])] = row
    if baseline is not None and baseline not in groups:
        raise ConfigError(
            f"`--baseline` is {baseline!r} but {name!r} has {', '.join(map(repr, groups))}."
        )
    methods = [_method(label, group, tasks) for label, group in groups.items()]
    if baseline is not None:
        methods = _tested(methods, baseline)
    untouched = _untouched(groups, tasks)
    if untouched and "zero_shot" not in groups:
        methods.insert(0, untouched)
    remarks = list(notes)
    if twice := len(rows) - sum(map(len, groups.values())):
        remarks.append(f"{count(twice, 'row')} given twice: the last one is used.")
    if len(lengths := sorted({int(row["rounds"]) for row in rows if row.get("rounds")})) > 1:
        remarks.append(f"Runs have different `strategy.rounds`: {', '.join(map(str, lengths))}.")
    return Comparison(
        title=name + (f", {split} split" if split else ""),
        tasks=tasks,
        metrics=dict(part.split(":", 1) for part in rows[0]["metrics"].split()),
        methods=methods,
        baseline=baseline,
        untouched=untouched,
        notes=remarks,
    )


def _check_same_settings(row: CsvRow, group: Mapping[int, CsvRow]) -> None:
    for other in group.values():
        if other["settings"] != row["settings"]:
            raise ConfigError(
                f"{label_of(row['method'], row['variant'])!r} of {row['name']!r} has rows with "
                f"different settings: {other['overrides']!r} and {row['overrides']!r}. Give them "
                "a different `name` or `strategy.name`, or sweep over the setting that differs."
            )


def _method(label: str, group: Mapping[int, CsvRow], tasks: Sequence[str]) -> MethodScores:
    costs = {}
    for key in ("bytes_up", "bytes_down", "seconds"):
        values = [float(row[key]) for row in group.values() if row.get(key)]
        costs[key] = statistics.fmean(values) if values else None
    jobs = tuple(row["job"] for row in group.values())
    return MethodScores(label, _scores(group, tasks, SCORE, "mean"), jobs, costs)


def _tested(methods: Sequence[MethodScores], baseline: str) -> list[MethodScores]:
    """Add each method's test against the baseline."""
    theirs = next(method.scores[MEAN] for method in methods if method.label == baseline)
    tests = []
    for method in methods:
        mine = method.scores[MEAN]
        common = sorted(mine.keys() & theirs.keys()) if method.label != baseline else []
        values = [mine[seed] for seed in common]
        tests.append(paired(values, [theirs[seed] for seed in common]) if common else None)
    adjusted = holm([test.p if test else None for test in tests])
    return [
        replace(method, test=test, p=p)
        for method, test, p in zip(methods, tests, adjusted, strict=True)
    ]


def _untouched(
    groups: Mapping[str, Mapping[int, CsvRow]], tasks: Sequence[str]
) -> MethodScores | None:
    """Return the scores of the untrained base model, None if the rows differ."""
    by_seed: dict[int, CsvRow] = {}
    for seed, row in (item for group in groups.values() for item in group.items()):
        if row["zero_shot_mean"]:
            first = by_seed.setdefault(seed, row)
            if any(first[f"{ZERO_SHOT}{task}"] != row[f"{ZERO_SHOT}{task}"] for task in tasks):
                return None  # variants differ in data or base model
    if not by_seed:
        return None
    return MethodScores(UNTOUCHED, _scores(by_seed, tasks, ZERO_SHOT, "zero_shot_mean"))


def _scores(
    group: Mapping[int, CsvRow], tasks: Sequence[str], prefix: str, mean: str
) -> dict[str, dict[int, float]]:
    columns = {task: f"{prefix}{task}" for task in tasks} | {MEAN: mean}
    return {
        task: {seed: float(row[column]) for seed, row in group.items()}
        for task, column in columns.items()
    }


def _tasks(row: CsvRow) -> list[str]:
    return [
        key.removeprefix(SCORE) for key, value in row.items() if key.startswith(SCORE) and value
    ]


def _omitted(rows: Sequence[CsvRow]) -> str:
    shown = ", ".join(f"{row['job']} ({row['status']})" for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"Omitted for lack of scores: {shown}{more}."


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%#_{}$"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
)


def as_markdown(comparison: Comparison, *, costs: bool = False) -> str:
    """Return a comparison as Markdown: title, table and legend."""
    below = "".join(f"{line}\n" for line in legend(comparison))
    return f"**{comparison.title}**\n\n{markdown(table_rows(comparison, costs=costs))}\n{below}"


def as_latex(comparison: Comparison, *, costs: bool = False) -> str:
    r"""Return a comparison as LaTeX for the package booktabs, with title and legend as comments."""
    rows = table_rows(comparison, costs=costs)
    lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows]
    return "\n".join(
        [
            *(f"% {line}" for line in [comparison.title, *legend(comparison)]),
            rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def table_rows(comparison: Comparison, *, costs: bool = False) -> list[list[str]]:
    """Return the table's cells, header first; `costs` adds bytes sent and time."""
    tested = comparison.baseline is not None
    header = ["method", "n", *comparison.tasks, "mean"]
    header += [f"difference to {comparison.baseline}", "p"] if tested else []
    header += ["sent up", "sent down", "time"] if costs else []
    rows = [header]
    for method in comparison.methods:
        row = [method.label, str(len(method.seeds))]
        row += [interval_text(method.interval(what)) for what in (*comparison.tasks, MEAN)]
        if tested:
            row += [_difference_text(method), p_text(method.p)]
        if costs:
            kinds = {"bytes_up": human_bytes, "bytes_down": human_bytes, "seconds": human_seconds}
            known = {key: method.costs.get(key) for key in kinds}
            row += ["" if value is None else kinds[key](value) for key, value in known.items()]
        rows.append(row)
    return rows


def interval_text(found: Interval, *, sign: str = "") -> str:
    """Format a mean with its interval's half-width; ``sign="+"`` shows the sign of positives."""
    half = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    return f"{found.mean:{sign}.3f}{half}"


def p_text(value: float | None) -> str:
    """Format a p-value with three decimals, empty for None."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _difference_text(method: MethodScores) -> str:
    if method.test is None:
        return ""
    pairs = method.test.pairs
    missing = "" if pairs == len(method.seeds) else f" ({pairs} pairs)"
    return interval_text(method.test.difference, sign="+") + missing


def legend(comparison: Comparison) -> list[str]:
    """Explain the table, and append the comparison's notes."""
    kinds = set(comparison.metrics.values())
    metric = ", ".join(f"{task}: {name}" for task, name in comparison.metrics.items())
    lines = [
        f"Scores: {kinds.pop() if len(kinds) == 1 else metric}. Mean over n seeds ± half the width "
        "of its 95 % interval (Student's t); `mean` is over the tasks."
    ]
    if comparison.baseline is not None:
        tests = sum(method.p is not None for method in comparison.methods)
        lines.append(
            f"p: two-sided paired t-test over seeds of `mean` against {comparison.baseline}, "
            f"Holm-corrected for {count(tests, 'comparison')}."
        )
    if len({len(m.seeds) for m in comparison.methods if m.label != UNTOUCHED}) > 1:
        lines.append("The methods have different numbers of seeds.")
    return lines + comparison.notes
