"""What a sweep's jobs are: one for every combination of the values that overrides list.

An override with several values (``seed=0,1,2``, ``strategy=glob(pilot*)``, ``strategy.rounds=
range(1,4)``) is swept over, as Hydra's basic sweeper does it: the last one changes fastest.
A list is one value: ``data.tasks=[vqa,counting]``; several are ``data.tasks=[a],[a,b]``.

The folder of a sweep, from which it can go on at any time.

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
_PLAIN = re.compile(r"[A-Za-z0-9_.=,+\[\]-]+")
_LAUNCHER = ("hydra/launcher=", "hydra.launcher.")
_OWN = ("resume", "run.folder")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Of its folder: the overrides that tell it from the other jobs.
    words : tuple of str
        All of its overrides.
    swept : dict
        Those that are swept over: setting → value, as text.
    """

    name: str
    words: tuple[str, ...]
    swept: dict[str, str]


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the settings' overrides from those that choose Hydra's launcher.

    Raises
    ------
    ConfigError
        A word is for another part of Hydra, which a sweep sets itself, or names a folder.
    """
    launcher = [word for word in words if word.lstrip("+~").startswith("hydra")]
    for word in launcher:
        if not word.lstrip("+").startswith(_LAUNCHER):
            raise ConfigError(
                f"The override {word!r} is for Hydra, of which a sweep takes `hydra/launcher` and "
                "`hydra.launcher.…` alone."
            )
    settings = [word for word in words if word not in launcher]
    for word in settings:
        key = word.lstrip("+~").partition("=")[0]
        if key in _OWN:
            raise ConfigError(
                f"The override {word!r} is for one run; a sweep gives every job a folder of its "
                "own inside `--out FOLDER`, and goes on in a folder that is there already."
            )
    return settings, launcher


def plan_jobs(words: Sequence[str]) -> list[Job]:
    """Return a sweep's jobs, in the order in which Hydra's basic sweeper starts them.

    Parameters
    ----------
    words : sequence of str
        Overrides of settings, with one value or several.

    Raises
    ------
    ConfigError
        A word is no override, has no values, or two jobs would be the same.
    """
    choices: dict[str, list[str]] = {}
    swept: set[str] = set()
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for word in words:
            try:
                (override,) = parser.parse_overrides([word])
                key, values = override.get_key_element(), _values(override)
            except (HydraException, ValueError) as error:
                raise ConfigError(
                    f"The override {word!r} cannot be read: {str(error).splitlines()[0]}."
                ) from None
            choices[key] = values
            swept.discard(key)  # a later word for a setting takes the place of an earlier
            if override.is_sweep_override():
                swept.add(key)
    jobs = []
    for combination in itertools.product(*choices.values()):
        chosen = dict(zip(choices, combination, strict=True))
        differing = {key.lstrip("+"): chosen[key] for key in choices if key in swept}
        job_words = tuple(f"{key}={value}" for key, value in chosen.items())
        jobs.append(Job(job_name(differing), job_words, differing))
    _check_names(jobs)
    return jobs


def job_name(swept: dict[str, str]) -> str:
    """Return the name of a job's folder: its swept overrides, in plain characters.

    What a folder's name cannot hold, or a long name's end, is replaced by a hash of all.
    """
    text = ",".join(f"{key}={value}" for key, value in swept.items()) or "job"
    if _PLAIN.fullmatch(text) and len(text) <= LONGEST_NAME:
        return text
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    plain = re.sub(r"[^A-Za-z0-9_.=,+\[\]-]+", "-", text)
    return f"{plain[: LONGEST_NAME - 9]}-{tag}"


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


def _check_names(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two jobs of the sweep are the same: {name}.")


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
