"""One job of a sweep: a run like any other, of which a failure is written down and not raised.

A sweep as a Hydra multirun: Hydra's sweeper and launcher start the jobs, `run_job` does them.

The basic launcher runs one job after the other in this process; others (joblib, submitit) start
`one_job` in processes of their own, which find all they need in the sweep's folder. A job that
fails is written down, and Hydra never sees it.
"""

import functools
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from pilot_flwr.config.loading import config_folder, load_config
from pilot_flwr.config.overrides import hydra_text, path_override
from pilot_flwr.errors import ConfigError, PilotError, RunError
from pilot_flwr.formatting import count, headline, human_seconds
from pilot_flwr.launch.prepare import Prepared, check_settings, engine_options, prepare
from pilot_flwr.launch.processes import StopSignals
from pilot_flwr.launch.simulation import run_prepared
from pilot_flwr.run.atomic import hold
from pilot_flwr.run.outcome import COMPLETED, Outcome, RunStatus, evaluate_outcome
from pilot_flwr.server.resume import OVERRIDES, check_resumable
from pilot_flwr.sweeps.jobs import (
    Job,
    Plan,
    SweepFolder,
    keep_plan,
    plan_jobs,
    read_plan,
    split_words,
)
from pilot_flwr.sweeps.results import Row, label_of, read_rows, variant_of, write_results

Out = Callable[[str], None]
MOST_COMPLAINTS = 5


def check_jobs(folder: SweepFolder, jobs: Sequence[Job], baseline: str | None = None) -> None:
    """Try every job's settings before the first one starts.

    Raises
    ------
    ConfigError
        Names the jobs whose settings are wrong, or other ones than in the folder so far; or no
        job, of these or in the folder, is of the method `baseline`.
    """
    complaints: dict[str, list[str]] = {}
    labels = []
    for job in jobs:
        try:
            config, _ = check_settings(job.words)
            engine_options(config, os.environ)
            if _begun(folder.run(job)):
                check_resumable(folder.run(job), config)
            labels.append(label_of(config.strategy.name, variant_of(job)))
        except PilotError as error:
            complaints.setdefault(str(error), []).append(job.name)
    lines = [
        f"Job {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {text}"
        for text, names in complaints.items()
    ]
    if len(lines) > MOST_COMPLAINTS:
        more = count(len(lines) - MOST_COMPLAINTS, "more complaint")
        lines[MOST_COMPLAINTS:] = [f"... and {more}."]
    if lines:
        raise ConfigError("\n".join([*lines, "Nothing was started."]))
    labels += _labels(folder)
    if baseline is not None and baseline not in labels:
        raise ConfigError(
            f"`--baseline` is {baseline!r} but the sweep has {', '.join(dict.fromkeys(labels))}."
        )


def run_job(folder: SweepFolder, job: Job, *, out: Out, verbose: bool = False) -> Outcome:
    """Carry out a job, or what is left of it, and write down how it ended.

    Parameters
    ----------
    folder : SweepFolder
        The sweep's.
    job : Job
        Which one.
    out : callable
        Takes a line about its beginning and one about its end.
    verbose : bool
        Give `out` the whole live output too.

    Raises
    ------
    Interrupted
        A signal said stop; the job goes on from its last checkpoint another time.
    """
    started = time.monotonic()
    folder.log(job).parent.mkdir(parents=True, exist_ok=True)
    with folder.log(job).open("a", encoding="utf-8") as log:

        def live(line: str) -> None:
            print(line, file=log, flush=True)
            if verbose:
                out(line)

        try:
            prepared = _prepare(folder.run(job), job)
            if prepared.done:
                outcome = evaluate_outcome(RunStatus(COMPLETED), prepared.folder)
                if outcome.succeeded:
                    out("done before")
                    folder.keep_outcome(job, outcome)
                    return outcome
                out(f"FAILED before: {_first(outcome)}; that run is now {folder.put_aside(job)}")
                prepared = _prepare(folder.run(job), job)
            folder.forget_outcome(job)
            out("going on" if prepared.resumed else "begins")
            outcome = run_prepared(prepared, out=live)
        except Exception as error:
            if not isinstance(error, PilotError | OSError):
                print(traceback.format_exc(), file=log, flush=True)
            outcome = Outcome(False, (f"{type(error).__name__}: {error}",))
        for line in outcome.explanation:
            live(line)
    folder.keep_outcome(job, outcome)
    lasted = human_seconds(time.monotonic() - started)
    ended = f"done in {lasted}" if outcome.succeeded else f"FAILED after {lasted}"
    out(ended + ("" if outcome.succeeded else f": {_first(outcome)}"))
    return outcome


def _labels(folder: SweepFolder) -> list[str]:
    """Return the methods, with their variants, that a sweep's folder has results of."""
    if not folder.results.exists():
        return []
    rows = read_rows(folder.results)
    return [label_of(row["method"], row["variant"]) for row in rows if row["method"]]


def _prepare(path: Path, job: Job) -> Prepared:
    words = list(job.words)
    if _begun(path):
        words.append(path_override("resume", path))
    else:
        _clear(path)
        words.append(path_override("run.folder", path))
    return prepare(words, os.environ, datetime.now())


def _begun(path: Path) -> bool:
    return (path / OVERRIDES).is_file()


def _clear(path: Path) -> None:
    """Remove what a launcher leaves that was killed before it wrote down what it starts."""
    if path.is_dir() and not any(
        (path / name).exists() for name in ("metrics.jsonl", "config.yaml")
    ):
        shutil.rmtree(path)


def _first(outcome: Outcome) -> str:
    return headline(outcome.explanation[0]) if outcome.explanation else "no reason given"


PATIENCE_SECONDS = 60.0
TICK_SECONDS = 1.0

FOLLOWED = 143
"""Exit code of a worker whose sweep is gone."""

_here = False
"""Whether `sweep` is at work in this process, and not in one that started it."""


def sweep(
    words: Sequence[str],
    path: Path,
    *,
    out: Callable[[str], None],
    verbose: bool = False,
    baseline: str | None = None,
) -> list[Row]:
    """Carry out all jobs of a sweep that are not done yet.

    Parameters
    ----------
    words : sequence of str
        Overrides, with several values where they are swept over.
    path : Path
        Absolute folder of the sweep: a new one, or one that goes on.
    out : callable
        Takes lines for the user.
    verbose : bool
        Show the jobs' live output.
    baseline : str, optional
        Method that some job must be of.

    Returns
    -------
    list of dict
        The rows of ``results.csv``.

    Raises
    ------
    ConfigError
        Some job's settings are wrong: nothing was started.
    RunError
        Another sweep is at work in the folder, or the launcher broke down.
    Interrupted
        A signal said stop.
    """
    settings, launcher = split_words(words)
    jobs = plan_jobs(settings)
    folder = SweepFolder(path)
    check_jobs(folder, jobs, baseline)
    global _here
    _here = True
    with hold(folder.lock, f"The sweep in {path}"):
        plan = keep_plan(folder, words, jobs, verbose=verbose, baseline=baseline)
        out(f"Sweep of {count(len(jobs), 'job')} in {path}")
        write_results(folder, plan)
        try:
            _multirun(settings, [*launcher, *_quiet(folder)])
        finally:
            rows = write_results(folder, plan)
    return rows


def one_job(_: Any) -> None:
    """Do the job whose number Hydra says; called by its launchers, perhaps in another process."""
    if not _here:
        _follow_parent()
    settings = HydraConfig.get()
    folder = SweepFolder(Path(settings.sweep.dir))
    plan = read_plan(folder)
    assert plan is not None
    number = int(settings.job.num)
    job = plan.current[number]
    if list(settings.overrides.task) != list(job.words):
        raise RunError(f"Hydra's job {number} is {list(settings.overrides.task)}, not {job.name}.")
    label = f"[{number + 1}/{len(plan.current)}] {job.name}"
    with _hydra_put_aside():
        run_job(folder, job, out=lambda line: _say(f"{label}: {line}"), verbose=plan.verbose)
    _renew_results(folder, plan)


def _renew_results(folder: SweepFolder, plan: Plan) -> None:
    lock = folder.path / ".results.lock"
    with hold(lock, f"{folder.results}", patience=PATIENCE_SECONDS):
        write_results(folder, plan)


def _multirun(settings: Sequence[str], launcher: Sequence[str]) -> None:
    """Call Hydra's main function; what it raises, unless a signal came, is the launcher's fault."""
    load_config()  # registers the schema that conf/config.yaml begins with
    main = hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(
        one_job
    )
    try:
        with _arguments("--multirun", *settings, *launcher), StopSignals(at_once=True):
            main()
    except SystemExit as end:  # Hydra has printed why
        if end.code:
            raise RunError("Hydra's launcher broke down; its own message is above.") from None


def _quiet(folder: SweepFolder) -> list[str]:
    """Return what keeps Hydra to the sweep's folder and from logs of its own."""
    return [
        f"hydra.sweep.dir={hydra_text(str(folder.path))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
    ]


@contextmanager
def _hydra_put_aside() -> Iterator[None]:
    """Make room for `load_config`: Hydra can be at work once in a process."""
    instance = GlobalHydra.instance()
    sweeping, instance.hydra = instance.hydra, None
    try:
        yield
    finally:
        instance.hydra = sweeping


@contextmanager
def _arguments(*words: str) -> Iterator[None]:
    """Put words in place of the command line's, the only place from which Hydra takes them."""
    before = sys.argv
    sys.argv = ["pilot-flwr", *words]
    try:
        yield
    finally:
        sys.argv = before


@functools.cache
def _follow_parent() -> None:
    """End this worker process when the sweep is killed: its job is free to be gone on with."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(TICK_SECONDS)
        os._exit(FOLLOWED)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def _say(line: str) -> None:
    print(line, flush=True)
