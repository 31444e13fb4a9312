"""Tables of sweeps: a row per method, means over seeds with intervals, tests against a baseline.

Rows of ``results.csv`` with the same `name`, tasks and split make one table. In it a method with
its variant (what else was swept over) is one row, and its seeds are the repetitions. `compare`
does the statistics; `pilot_flwr.sweeping.writing` writes them down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pilot_flwr.errors import ConfigError
from pilot_flwr.sweeping.rows import DONE, SCORE, ZERO_SHOT, label_of
from pilot_flwr.sweeping.statistics import Interval, Paired, holm, interval, paired
from pilot_flwr.wording import count

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
