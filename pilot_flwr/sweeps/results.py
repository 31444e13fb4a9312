"""Read and write ``results.csv``, which has one row per job of a sweep.

To add a column, add it to `row_of`. ``settings`` is a hash of everything that affects results
except the seed, so that repetitions share it. A task's columns are ``score.TASK`` (after the last
exchange) and ``zero_shot.TASK`` (of the untrained base model); missing values are empty.
"""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError, PilotError
from pilot_flwr.run.atomic import read_json, write_text
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import ClientFailed, Evaluated, Event, ExchangeClosed, select
from pilot_flwr.run.history import bytes_down, bytes_up, mean_over_tasks, task_scores, tasks_of
from pilot_flwr.run.provenance import read_provenance, settings_hash
from pilot_flwr.sweeps.jobs import Job, Manifest, SweepFolder

Row = dict[str, Any]
RESULTS = "results.csv"
SCORE, ZERO_SHOT = "score.", "zero_shot."

NOT_VARIANTS = ("strategy", "seed")
"""Swept settings with a separate column."""

DONE, FAILED, OPEN = "done", "failed", "not finished"
_FIRST = ("name", "method", "variant", "seed", "status", "mean", "zero_shot_mean")


def write_results(folder: SweepFolder, manifest: Manifest) -> list[Row]:
    """Rewrite ``results.csv`` from the jobs' run folders, and return its rows."""
    rows = [row_of(folder, job) for job in manifest.jobs]
    write_text(folder.results, as_csv(rows))
    return rows


def row_of(folder: SweepFolder, job: Job) -> Row:
    """Return a job's row, without the columns that are still unknown."""
    path = folder.run(job)
    outcome = folder.outcome(job)
    status = OPEN if outcome is None else DONE if outcome.succeeded else FAILED
    row: Row = {
        "status": status,
        "variant": variant_of(job),
        "job": job.name,
        "overrides": " ".join(job.overrides),
        "error": outcome.explanation[0].splitlines()[0] if outcome and outcome.explanation else "",
    }
    try:
        config = from_yaml((path / "config.yaml").read_text(encoding="utf-8"))
        events = read_events(path)
    except (OSError, ValueError, PilotError) as error:
        if not row["error"] and not isinstance(error, FileNotFoundError):
            row["error"] = str(error).splitlines()[0]
        return row
    settings = {
        "name": config.name,
        "method": config.strategy.name,
        "seed": config.seed,
        "rounds": config.strategy.rounds,
        "evaluated_on": config.data.evaluate_on,
        "engine": config.simulation.engine,
        "settings": _settings_tag(config),
    }
    return row | settings | _scores(events) | _effort(events, path) | _code(path)


def variant_of(job: Job) -> str:
    """Return a job's swept settings other than method and seed."""
    return " ".join(f"{k}={v}" for k, v in job.swept.items() if k not in NOT_VARIANTS)


def label_of(method: str, variant: str) -> str:
    """Join a method's name and variant."""
    return f"{method} {variant}".strip()


def as_csv(rows: Sequence[Row]) -> str:
    """Format rows as CSV, with numbers in full precision."""
    keys = dict.fromkeys(key for row in rows for key in row)
    by_task = [key for prefix in (SCORE, ZERO_SHOT) for key in keys if key.startswith(prefix)]
    first, last = [*_FIRST, *by_task], ["settings", "job", "overrides", "error"]
    middle = [key for key in keys if key not in first and key not in last]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*first, *middle, *last], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a ``results.csv``, given its path or its sweep's folder."""
    file = path / RESULTS if path.is_dir() else path
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} cannot be read: {reason}.") from None
    missing = [key for key in _FIRST if key not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{file} is not a sweep's results: it lacks the column `{missing[0]}`.")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ConfigError(f"{file}, line {number}, does not have one cell per column.")
    return rows


def _settings_tag(config: PilotConfig) -> str:
    """Hash the settings that affect results, including the rounds but not the seed."""
    text = f"{settings_hash(replace(config, seed=0))} {config.strategy.rounds}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _scores(events: Sequence[Event]) -> Row:
    evaluated = select(events, Evaluated)
    last = max((event.exchange for event in evaluated), default=0)
    metrics = dict.fromkeys(f"{event.task}:{event.metric}" for event in evaluated)
    row: Row = {"metrics": " ".join(metrics)}
    after = task_scores(events, last) if last else {}
    for prefix, name, scores in (
        (SCORE, "mean", after),
        (ZERO_SHOT, "zero_shot_mean", task_scores(events, 0)),
    ):
        mean = mean_over_tasks(scores, tasks_of(events))
        row |= {f"{prefix}{task}": score for task, score in scores.items()}
        row[name] = "" if mean is None else mean
    return row


def _effort(events: Sequence[Event], path: Path) -> Row:
    seconds = read_json(path / "result.json").get("seconds")
    if not isinstance(seconds, int | float):  # the run has not ended
        seconds = events[-1].elapsed if events else ""
    return {
        "exchanges": len(select(events, ExchangeClosed)),
        "bytes_down": sum(bytes_down(events).values()),
        "bytes_up": sum(bytes_up(events).values()),
        "seconds": seconds,
        "failures": len(select(events, ClientFailed)),
    }


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
