"""The folder of a sweep, from which it can go on at any time.

::

    sweep.json        the command's overrides, and every job that the sweep has, in order
    multirun.yaml     Hydra's own record of the multirun
    runs/NAME/        run folder of a job
    failed/NAME-1/    run folder of a job that ended with failures and was begun anew
    logs/NAME.log     what `pilot-flwr run` would have shown of it
    ended/NAME.json   how it ended; written last
    results.csv       one row per job, renewed whenever one ends
    table.md          means and intervals, at the end
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot_flwr.errors import ConfigError, StateError
from pilot_flwr.launching.outcome import Outcome
from pilot_flwr.storage.tensors import write_text
from pilot_flwr.sweeping.plan import Job

PLAN = "sweep.json"


@dataclass(frozen=True)
class SweepFolder:
    """Where things are in a sweep's folder.

    Attributes
    ----------
    path : Path
        Absolute.
    """

    path: Path

    @property
    def results(self) -> Path:
        """The file with one row per job."""
        return self.path / "results.csv"

    @property
    def table(self) -> Path:
        """The table of means."""
        return self.path / "table.md"

    @property
    def lock(self) -> Path:
        """Locked by the sweep that is at work here."""
        return self.path / ".sweep.lock"

    def run(self, job: Job) -> Path:
        """Run folder of a job."""
        return self.path / "runs" / job.name

    def log(self, job: Job) -> Path:
        """Live output of a job."""
        return self.path / "logs" / f"{job.name}.log"

    def outcome(self, job: Job) -> Outcome | None:
        """Return how a job ended, None if it has not."""
        try:
            content = json.loads(self._ended(job).read_text(encoding="utf-8"))
            return Outcome(content["succeeded"] is True, tuple(map(str, content["explanation"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_outcome(self, job: Job, outcome: Outcome) -> None:
        """Write down how a job ended."""
        content = {"succeeded": outcome.succeeded, "explanation": list(outcome.explanation)}
        self._ended(job).parent.mkdir(parents=True, exist_ok=True)
        write_text(self._ended(job), json.dumps(content, indent=2) + "\n")

    def forget_outcome(self, job: Job) -> None:
        """Take note that a job is at work again."""
        self._ended(job).unlink(missing_ok=True)

    def put_aside(self, job: Job) -> Path:
        """Make room for a job that begins anew; return where its run folder is now."""
        number = 1
        while (place := self.path / "failed" / f"{job.name}-{number}").exists():
            number += 1
        place.parent.mkdir(exist_ok=True)
        return self.run(job).rename(place)

    def _ended(self, job: Job) -> Path:
        return self.path / "ended" / f"{job.name}.json"


@dataclass(frozen=True)
class Plan:
    """What ``sweep.json`` holds.

    Attributes
    ----------
    commands : tuple of tuple of str
        Overrides of every command in this folder, as typed; the one at work is the last.
    current : tuple of Job
        The jobs of that command, in Hydra's order.
    jobs : tuple of Job
        Those, and before them what earlier commands had in this folder.
    verbose : bool
        Whether the jobs' live output is shown.
    baseline : str or None
        Of the tables.
    """

    commands: tuple[tuple[str, ...], ...]
    current: tuple[Job, ...]
    jobs: tuple[Job, ...]
    verbose: bool = False
    baseline: str | None = None


def read_plan(folder: SweepFolder) -> Plan | None:
    """Return the plan in a sweep's folder, None if there is none.

    Raises
    ------
    StateError
        It cannot be read.
    """
    path = folder.path / PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        jobs = {row["name"]: _job(row) for row in content["jobs"]}
        current = tuple(jobs[name] for name in content["current"])
        commands = tuple(tuple(map(str, words)) for words in content["commands"])
        baseline = content["baseline"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is no plan of a sweep: {error!r}.") from None
    return Plan(
        commands,
        current,
        tuple(jobs.values()),
        content["verbose"] is True,
        None if baseline is None else str(baseline),
    )


def keep_plan(
    folder: SweepFolder,
    words: Sequence[str],
    jobs: Sequence[Job],
    *,
    verbose: bool,
    baseline: str | None = None,
) -> Plan:
    """Write a plan down, with the jobs that earlier commands had here; return it.

    Without a baseline it stays what it was.

    Raises
    ------
    ConfigError
        The folder holds something else than a sweep.
    """
    earlier = read_plan(folder)
    if earlier is None and folder.path.is_dir():
        others = [p.name for p in folder.path.iterdir() if p.name != folder.lock.name]
        if others:
            raise ConfigError(
                f"`--out` is {str(folder.path)!r}, which holds no sweep but {others[0]!r}; it must "
                "be a new or empty folder, or one of a sweep."
            )
    known = {job.name: job for job in earlier.jobs} if earlier else {}
    merged = known | {job.name: job for job in jobs}
    before = earlier.commands if earlier else ()
    commands = (*(command for command in before if command != tuple(words)), tuple(words))
    if baseline is None and earlier is not None:
        baseline = earlier.baseline
    plan = Plan(commands, tuple(jobs), tuple(merged.values()), verbose, baseline)
    content = {
        "commands": plan.commands,
        "verbose": verbose,
        "baseline": baseline,
        "current": [job.name for job in jobs],
        "jobs": [asdict(job) for job in plan.jobs],
    }
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.path / PLAN, json.dumps(content, indent=2) + "\n")
    return plan


def _job(row: Any) -> Job:
    swept = {str(key): str(value) for key, value in row["swept"].items()}
    return Job(str(row["name"]), tuple(map(str, row["words"])), swept)
