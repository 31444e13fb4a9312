"""Expand a sweep's overrides into jobs, and define its folder.

Every combination of override values is one job, in the order of Hydra's basic sweeper: the last
override varies fastest. Several values are ``seed=0,1,2``, ``strategy=glob(pilot*)`` or
``strategy.rounds=range(1,4)``. A list is one value, ``data.tasks=[vqa,counting]``; two lists are
``data.tasks=[a],[a,b]``.

A sweep can be resumed from its folder at any time::

    sweep.json        the commands' overrides, and all jobs in order
    multirun.yaml     Hydra's record of the multirun
    runs/NAME/        run folder of a job
    failed/NAME-1/    archived run folder of a job that ended with failures and was restarted
    logs/NAME.log     output of a job
    ended/NAME.json   outcome of a job; written last
    results.csv       one row per job, rewritten whenever a job ends
    table.md          means and intervals; written at the end
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from pilot_flwr.config.loading import config_folder
from pilot_flwr.errors import ConfigError, StateError
from pilot_flwr.run.atomic import write_text
from pilot_flwr.run.outcome import Outcome

LONGEST_NAME = 120
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.=,+\[\]-]+")
_LAUNCHER = ("hydra/launcher=", "hydra.launcher.")
_SET_BY_SWEEP = ("resume", "run.folder")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    """Name of its folder: the swept overrides."""

    overrides: tuple[str, ...]
    swept: dict[str, str]
    """Swept setting → value, as text."""


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the overrides of settings from those of Hydra's launcher."""
    launcher = [override for override in overrides if override.lstrip("+~").startswith("hydra")]
    for override in launcher:
        if not override.lstrip("+").startswith(_LAUNCHER):
            raise ConfigError(
                f"The override {override!r} is a Hydra setting, of which a sweep accepts only "
                "`hydra/launcher` and `hydra.launcher.…`."
            )
        if "${" in override:
            raise ConfigError(
                f"The override {override!r} must have a plain value, not `${{...}}`: a sweep's "
                "folder may come from elsewhere."
            )
    settings = [override for override in overrides if override not in launcher]
    for override in settings:
        if override.lstrip("+~").partition("=")[0] in _SET_BY_SWEEP:
            raise ConfigError(
                f"The override {override!r} is for a single run: a sweep creates a folder per job "
                "inside `--out FOLDER`, and resumes the jobs of an existing one."
            )
    return settings, launcher


def expand_jobs(overrides: Sequence[str]) -> list[Job]:
    """Return one job per combination of values, in the order of Hydra's basic sweeper."""
    choices: dict[str, list[str]] = {}
    swept: set[str] = set()
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for text in overrides:
            try:
                (override,) = parser.parse_overrides([text])
                key, values = override.get_key_element(), _values(override)
            except (HydraException, ValueError) as error:
                raise ConfigError(
                    f"The override {text!r} cannot be read: {str(error).splitlines()[0]}."
                ) from None
            choices[key] = values
            swept.discard(key)  # a later override of a setting replaces an earlier one
            if override.is_sweep_override():
                swept.add(key)
    jobs: dict[str, Job] = {}
    for combination in itertools.product(*choices.values()):
        chosen = dict(zip(choices, combination, strict=True))
        differing = {key.lstrip("+"): chosen[key] for key in choices if key in swept}
        name = job_name(differing)
        if name in jobs:
            raise ConfigError(f"Two jobs of the sweep are the same: {name}.")
        jobs[name] = Job(name, tuple(f"{key}={value}" for key, value in chosen.items()), differing)
    return list(jobs.values())


def job_name(swept: dict[str, str]) -> str:
    """Return the name of a job's folder: its swept overrides, in safe characters.

    A changed or truncated name ends with a hash of the full one.
    """
    text = ",".join(f"{key}={value}" for key, value in swept.items()) or "job"
    plain = _NOT_PLAIN.sub("-", text)
    if plain == text and len(text) <= LONGEST_NAME:
        return text
    return f"{plain[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"The override {override.input_line!r} is a range without steps: list the values."
        )
    values = [str(value) for value in override.sweep_string_iterator()]
    if not values:
        raise ConfigError(f"The override {override.input_line!r} has no values.")
    return values


class SweepFolder:
    """Paths and outcomes in a sweep's folder, an absolute path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "sweep.json"
        self.results = path / "results.csv"
        self.table = path / "table.md"
        self.lock = path / ".sweep.lock"

    def run(self, job: Job) -> Path:
        """Return a job's run folder."""
        return self.path / "runs" / job.name

    def log(self, job: Job) -> Path:
        """Return the file with a job's output."""
        return self.path / "logs" / f"{job.name}.log"

    def outcome(self, job: Job) -> Outcome | None:
        """Return a job's outcome, None if it has not finished."""
        try:
            content = json.loads(self._ended(job).read_text(encoding="utf-8"))
            return Outcome(content["succeeded"] is True, tuple(map(str, content["explanation"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_outcome(self, job: Job, outcome: Outcome) -> None:
        """Record a job's outcome."""
        content = {"succeeded": outcome.succeeded, "explanation": list(outcome.explanation)}
        write_text(self._ended(job), json.dumps(content, indent=2) + "\n")

    def delete_outcome(self, job: Job) -> None:
        """Delete a job's outcome before it is restarted."""
        self._ended(job).unlink(missing_ok=True)

    def archive_failed_run(self, job: Job) -> Path:
        """Move a job's run folder into ``failed/``, and return the new path."""
        number = 1
        while (archived := self.path / "failed" / f"{job.name}-{number}").exists():
            number += 1
        archived.parent.mkdir(exist_ok=True)
        return self.run(job).rename(archived)

    def _ended(self, job: Job) -> Path:
        return self.path / "ended" / f"{job.name}.json"


@dataclass(frozen=True)
class Manifest:
    """The content of ``sweep.json``.

    `commands` are the overrides of every command in this folder, as typed, the current one last.
    `current` are its jobs, in Hydra's order, and `jobs` those of all commands.
    """

    commands: tuple[tuple[str, ...], ...]
    current: tuple[Job, ...]
    jobs: tuple[Job, ...]
    verbose: bool = False
    baseline: str | None = None


def read_manifest(folder: SweepFolder) -> Manifest | None:
    """Read the manifest of a sweep's folder, None if missing."""
    path = folder.manifest
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        jobs = {row["name"]: _job(row) for row in content["jobs"]}
        return Manifest(
            tuple(tuple(map(str, overrides)) for overrides in content["commands"]),
            tuple(jobs[name] for name in content["current"]),
            tuple(jobs.values()),
            content["verbose"] is True,
            None if content["baseline"] is None else str(content["baseline"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is not the manifest of a sweep: {error!r}.") from None


def update_manifest(
    folder: SweepFolder,
    overrides: Sequence[str],
    jobs: Sequence[Job],
    *,
    verbose: bool,
    baseline: str | None = None,
) -> Manifest:
    """Add a command and its jobs to the manifest, and return the new one.

    If `baseline` is None, an earlier command's is kept.
    """
    earlier = read_manifest(folder)
    if earlier is None and folder.path.is_dir():
        others = [p.name for p in folder.path.iterdir() if p.name != folder.lock.name]
        if others:
            raise ConfigError(
                f"`--out` is {str(folder.path)!r}, which holds {others[0]!r} but no sweep; it must "
                "be a new or empty folder, or a sweep's."
            )
    earlier = earlier or Manifest((), (), ())
    merged = {job.name: job for job in (*earlier.jobs, *jobs)}
    command = tuple(overrides)
    manifest = Manifest(
        (*(other for other in earlier.commands if other != command), command),
        tuple(jobs),
        tuple(merged.values()),
        verbose,
        earlier.baseline if baseline is None else baseline,
    )
    content = asdict(manifest) | {"current": [job.name for job in jobs]}
    write_text(folder.manifest, json.dumps(content, indent=2) + "\n")
    return manifest


def _job(row: Any) -> Job:
    overrides = row["overrides"] if "overrides" in row else row["words"]  # earlier name
    swept = {str(key): str(value) for key, value in row["swept"].items()}
    return Job(str(row["name"]), tuple(map(str, overrides)), swept)
