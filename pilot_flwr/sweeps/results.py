"""``results.csv``: one row per job of a sweep, made from the jobs' run folders.

To add a column, add it to `row_of`. ``settings`` is a hash of all that results depend on but
the seed, so that repetitions have the same. Columns of the tasks are ``score.TASK`` (after the last
exchange) and ``zero_shot.TASK`` (of the untouched base model); an empty cell is what a job does
not have. `read_rows` reads such files again.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError, PilotError
from pilot_flwr.metrics.score import mean_of_all
from pilot_flwr.run.atomic import write_text
from pilot_flwr.run.directory import Event, read_events, select, tasks_of
from pilot_flwr.run.provenance import read_provenance, settings_hash
from pilot_flwr.sweeps.jobs import Job, Plan, SweepFolder

Row = dict[str, Any]
SCORE, ZERO_SHOT = "score.", "zero_shot."

NOT_VARIANTS = ("strategy", "seed")
"""Swept settings that have a column of their own."""

DONE, FAILED, OPEN = "done", "failed", "not finished"
_FIRST = ("name", "method", "variant", "seed", "status", "mean", "zero_shot_mean")


def write_results(folder: SweepFolder, plan: Plan) -> list[Row]:
    """Renew ``results.csv`` from the jobs' folders, and return its rows."""
    rows = [row_of(folder, job) for job in plan.jobs]
    write_text(folder.results, as_csv(rows))
    return rows


def row_of(folder: SweepFolder, job: Job) -> Row:
    """Return a job's row.

    Parameters
    ----------
    folder : SweepFolder
        The sweep's.
    job : Job
        One of its jobs, in whatever state.
    """
    path = folder.run(job)
    outcome = folder.outcome(job)
    status = OPEN if outcome is None else DONE if outcome.succeeded else FAILED
    row: Row = {
        "status": status,
        "variant": variant_of(job),
        "job": job.name,
        "overrides": " ".join(job.words),
        "error": outcome.explanation[0].splitlines()[0] if outcome and outcome.explanation else "",
    }
    try:
        config = from_yaml((path / "config.yaml").read_text(encoding="utf-8"))
        events = read_events(path)
    except (OSError, ValueError, PilotError) as error:
        if not row["error"] and not isinstance(error, FileNotFoundError):
            row["error"] = str(error).splitlines()[0]
        return row
    return row | _settings(config) | _scores(events) | _effort(events, path) | _code(path)


def variant_of(job: Job) -> str:
    """Return what a job's sweep was over besides methods and seeds."""
    return " ".join(f"{k}={v}" for k, v in job.swept.items() if k not in NOT_VARIANTS)


def label_of(method: str, variant: str) -> str:
    """Return what a table calls a method's row."""
    return f"{method} {variant}".strip()


def task_scores(events: Sequence[Event], server_round: int) -> dict[str, float]:
    """Return every task's score of the models after an exchange, over its clients' examples."""
    sums: dict[str, list[float]] = {}
    for event in select(events, "evaluate", server_round):
        total = sums.setdefault(event["task"], [0.0, 0.0])
        total[0] += event["score"] * event["examples"]
        total[1] += event["examples"]
    return {task: score / examples for task, (score, examples) in sums.items() if examples}


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV; numbers are written so that they read back as the same."""
    first = [*_FIRST, *_task_columns(rows, SCORE), *_task_columns(rows, ZERO_SHOT)]
    others = dict.fromkeys(key for row in rows for key in row)
    last = ("settings", "job", "overrides", "error")
    middle = [key for key in others if key not in first and key not in last]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*first, *middle, *last], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a ``results.csv``, or that of a sweep's folder.

    Raises
    ------
    ConfigError
        There is no such file, or it has not the columns of one.
    """
    file = path / "results.csv" if path.is_dir() else path
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} cannot be read: {reason}.") from None
    missing = [key for key in _FIRST if key not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{file} is no results of a sweep: it has no column `{missing[0]}`.")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ConfigError(f"{file}, line {number}, has not as many cells as there are columns.")
    return rows


def _settings(config: PilotConfig) -> Row:
    return {
        "name": config.name,
        "method": config.strategy.name,
        "seed": config.seed,
        "rounds": config.strategy.rounds,
        "evaluated_on": config.data.evaluate_on,
        "engine": config.simulation.engine,
        "settings": _settings_tag(config),
    }


def _settings_tag(config: PilotConfig) -> str:
    """Hash what results depend on but the seed; a resumed run may have more rounds, a row not."""
    text = f"{settings_hash(replace(config, seed=0))} {config.strategy.rounds}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _scores(events: Sequence[Event]) -> Row:
    evaluated = select(events, "evaluate")
    rounds = sorted({event["round"] for event in evaluated})
    metrics = dict.fromkeys(f"{event['task']}:{event['metric']}" for event in evaluated)
    row: Row = {"metrics": " ".join(metrics)}
    after = task_scores(events, rounds[-1]) if rounds and rounds[-1] > 0 else {}
    before = task_scores(events, 0)
    for prefix, scores in ((SCORE, after), (ZERO_SHOT, before)):
        row |= {f"{prefix}{task}": score for task, score in scores.items()}
    for name, scores in (("mean", after), ("zero_shot_mean", before)):
        mean = mean_of_all(scores, tasks_of(events))
        row[name] = "" if mean is None else mean
    return row


def _effort(events: Sequence[Event], path: Path) -> Row:
    down = [event["down"] for event in select(events, "order")]
    up = [
        event["up"]
        for kind in ("train", "failure")
        for event in select(events, kind)
        if "up" in event
    ]
    closed = select(events, "round")
    return {
        "exchanges": len(closed),
        "bytes_down": sum(sum(sizes.values()) for sizes in down),
        "bytes_up": sum(sum(sizes.values()) for sizes in up),
        "seconds": _seconds(path, events),
        "failures": len(select(events, "failure")),
    }


def _seconds(path: Path, events: Sequence[Event]) -> float | str:
    try:
        return float(json.loads((path / "result.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return float(events[-1]["elapsed"]) if events else ""


def _code(path: Path) -> Row:
    code = read_provenance(path)
    versions = code.get("versions")
    packages: Mapping[str, Any] = versions if isinstance(versions, dict) else {}
    later = [entry for entry in code.get("resumed_with") or [] if isinstance(entry, dict)]
    commits = dict.fromkeys(entry.get("commit") for entry in [code, *later])
    changed = [entry.get("changed") for entry in [code, *later]]
    known = any(changed) or None not in changed
    return {
        "commit": " ".join(filter(None, commits)),
        "changed": str(any(changed)).lower() if known else "",
        "versions": " ".join(f"{name}={number}" for name, number in packages.items() if number),
    }


def _task_columns(rows: Sequence[Row], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(prefix)))
