"""A sweep as a Hydra multirun: Hydra's sweeper and launcher start the jobs, `run_job` does them.

The basic launcher runs one job after the other in this process; others (joblib, submitit) start
`one_job` in processes of their own, which find all they need in the sweep's folder. A job that
fails is written down, and Hydra never sees it.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from pilot_flwr.config import config_folder, load_config
from pilot_flwr.errors import RunError
from pilot_flwr.launching.processes import Interrupted, Stopped, stoppable
from pilot_flwr.storage.locks import hold
from pilot_flwr.submission import hydra_text
from pilot_flwr.sweeping.folder import Plan, SweepFolder, keep_plan, read_plan
from pilot_flwr.sweeping.job import check_jobs, run_job
from pilot_flwr.sweeping.plan import plan_jobs, split_words
from pilot_flwr.sweeping.rows import Row, write_results
from pilot_flwr.wording import count

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
    try:
        with _hydra_put_aside():
            run_job(folder, job, out=lambda line: _say(f"{label}: {line}"), verbose=plan.verbose)
    except Interrupted as stop:
        raise Stopped(stop.signum) from None  # no launcher takes it for one job's failure
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
        with _arguments("--multirun", *settings, *launcher), stoppable():
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
