"""Run a sweep as a Hydra multirun in which each job is a federated run.

Hydra's basic launcher runs the jobs sequentially in this process, others (joblib, submitit) in
worker processes, where `hydra_job` reads its input from the sweep's folder. A failed job is
recorded there and does not raise, so that Hydra continues with the next one.
"""

import functools
import os
import shlex
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

from pilot_flwr.config.loading import (
    config_folder,
    hydra_text,
    idle_overrides,
    load_config,
    quoted,
)
from pilot_flwr.config.overrides import path_override
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
    SweepFolder,
    expand_jobs,
    read_manifest,
    split_overrides,
    update_manifest,
)
from pilot_flwr.sweeps.results import Row, label_of, read_rows, variant_of, write_results

MOST_ERRORS = 5
"""Maximum number of distinct configuration errors shown."""

PATIENCE_SECONDS = 60.0
TICK_SECONDS = 1.0

ORPHANED = 143
"""Exit code of a worker whose sweep was killed."""

_in_sweep_process = False
"""Whether this process runs `sweep`; a launcher's worker does not."""


def sweep(
    overrides: Sequence[str],
    path: Path,
    *,
    out: Callable[[str], None],
    verbose: bool = False,
    baseline: str | None = None,
) -> list[Row]:
    """Run the unfinished jobs of a sweep, and return the rows of ``results.csv``.

    `path` is the sweep's absolute folder, new or existing; `out` receives lines of output.
    """
    settings, launcher = split_overrides(overrides)
    settings = [quoted(setting, sweep=True) for setting in settings]
    jobs = expand_jobs(settings)
    folder = SweepFolder(path)
    check_jobs(folder, jobs, baseline)
    global _in_sweep_process
    _in_sweep_process = True
    with hold(folder.lock, f"The sweep in {path}"):
        manifest = update_manifest(folder, overrides, jobs, verbose=verbose, baseline=baseline)
        out(f"Sweep of {count(len(jobs), 'job')} in {path}")
        write_results(folder, manifest)
        try:
            _multirun(folder, [*settings, *launcher])
        finally:
            rows = write_results(folder, manifest)
    return rows


def check_jobs(folder: SweepFolder, jobs: Sequence[Job], baseline: str | None = None) -> None:
    """Check every job's settings before the first one starts."""
    errors: dict[str, list[str]] = {}
    labels = []
    if unused := _idle_in_all(jobs):
        raise ConfigError("\n".join([*unused, "Nothing was started."]))
    for job in jobs:
        try:
            config, _ = check_settings(_effective(job))
            engine_options(config, os.environ)
            if _begun(folder.run(job)):
                check_resumable(folder.run(job), config)
            labels.append(label_of(config.strategy.name, variant_of(job)))
        except PilotError as error:
            errors.setdefault(str(error), []).append(job.name)
    lines = [
        f"Job {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {text}"
        for text, names in errors.items()
    ]
    if len(lines) > MOST_ERRORS:
        lines[MOST_ERRORS:] = [f"... and {count(len(lines) - MOST_ERRORS, 'more error')}."]
    if lines:
        raise ConfigError("\n".join([*lines, "Nothing was started."]))
    if baseline is None:
        return
    if folder.results.exists():
        rows = read_rows(folder.results)
        labels += [label_of(row["method"], row["variant"]) for row in rows if row["method"]]
    if baseline not in labels:
        raise ConfigError(
            f"`--baseline` is {baseline!r} but the sweep has {', '.join(dict.fromkeys(labels))}."
        )


def _effective(job: Job) -> list[str]:
    """Return a job's overrides without common ones that only matter in other jobs.

    An example is M in a sweep over Pilot and FedAvg. A swept one stays, and is refused: the job
    would repeat another.
    """
    unused = idle_overrides(job.overrides, load_config(shlex.join(job.overrides)))
    swept = tuple(f"{key}=" for key in job.swept)
    common = {text for text in unused if not text.lstrip("+").startswith(swept)}
    return [text for text in job.overrides if text not in common or "={" in text]


def _idle_in_all(jobs: Sequence[Job]) -> list[str]:
    """Return why overrides have no effect in any job of a sweep, ignoring invalid jobs."""
    unused: dict[str, str] | None = None
    for job in jobs:
        try:
            found = idle_overrides(job.overrides, load_config(shlex.join(job.overrides)))
        except ConfigError:
            continue
        both = found.keys() & (found if unused is None else unused).keys()
        unused = {text: found[text] for text in job.overrides if text in both}
        if not unused:
            break
    return list((unused or {}).values())


def run_job(
    folder: SweepFolder, job: Job, *, out: Callable[[str], None], verbose: bool = False
) -> Outcome:
    """Run or resume a job, and record its outcome.

    `out` receives a line at the start and the end, and all live output if `verbose`.
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
                    out("already done")
                    folder.write_outcome(job, outcome)
                    return outcome
                archived = folder.archive_failed_run(job)
                out(f"FAILED earlier: {_first(outcome)}; its run folder is now {archived}")
                prepared = _prepare(folder.run(job), job)
            folder.delete_outcome(job)
            out("resuming" if prepared.resumed else "starting")
            outcome = run_prepared(prepared, out=live)
        except Exception as error:
            if not isinstance(error, PilotError | OSError):
                print(traceback.format_exc(), file=log, flush=True)
            outcome = Outcome(False, (f"{type(error).__name__}: {error}",))
        for line in outcome.explanation:
            live(line)
    folder.write_outcome(job, outcome)
    lasted = human_seconds(time.monotonic() - started)
    out(f"done in {lasted}" if outcome.succeeded else f"FAILED after {lasted}: {_first(outcome)}")
    return outcome


def hydra_job(_: Any) -> None:
    """Run the job with the number in Hydra's configuration; Hydra's launchers call this."""
    if not _in_sweep_process:
        _exit_with_parent()
    settings = HydraConfig.get()
    folder = SweepFolder(Path(settings.sweep.dir))
    manifest = read_manifest(folder)
    assert manifest is not None
    number = int(settings.job.num)
    job = manifest.current[number]
    if list(settings.overrides.task) != list(job.overrides):
        raise RunError(f"Hydra's job {number} is {list(settings.overrides.task)}, not {job.name}.")
    label = f"[{number + 1}/{len(manifest.current)}] {job.name}"

    def out(line: str) -> None:
        print(f"{label}: {line}", flush=True)

    with _other_hydra():
        run_job(folder, job, out=out, verbose=manifest.verbose)
    lock = folder.path / ".results.lock"
    with hold(lock, f"{folder.results}", patience=PATIENCE_SECONDS):
        write_results(folder, manifest)


def _prepare(path: Path, job: Job) -> Prepared:
    begun = _begun(path)
    kept = any((path / name).exists() for name in ("metrics.jsonl", "config.yaml"))
    if path.is_dir() and not begun and not kept:
        shutil.rmtree(path)  # the launcher was killed before it recorded the overrides
    folder = path_override("resume" if begun else "run.folder", path)
    return prepare([*_effective(job), folder], os.environ, datetime.now())


def _begun(path: Path) -> bool:
    return (path / OVERRIDES).is_file()


def _first(outcome: Outcome) -> str:
    return headline(outcome.explanation[0]) if outcome.explanation else "no reason given"


def _multirun(folder: SweepFolder, overrides: Sequence[str]) -> None:
    """Call Hydra's main function, which reads its arguments only from ``sys.argv``.

    Its files are confined to the sweep's folder, and its logs disabled.
    """
    load_config()  # registers the schema that conf/config.yaml extends
    configured = hydra.main(
        config_path=str(config_folder()), config_name="config", version_base="1.3"
    )
    command_line = sys.argv
    sys.argv = [
        "pilot-flwr",
        "--multirun",
        *overrides,
        f"hydra.sweep.dir={hydra_text(str(folder.path))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
    ]
    try:
        with StopSignals(at_once=True):
            configured(hydra_job)()
    except SystemExit as end:  # Hydra has printed the reason
        if end.code:
            raise RunError("Hydra's launcher failed; see its message above.") from None
    finally:
        sys.argv = command_line


@contextmanager
def _other_hydra() -> Iterator[None]:
    """Free Hydra's global instance inside a multirun, so that `load_config` can use it."""
    instance = GlobalHydra.instance()
    sweeping, instance.hydra = instance.hydra, None
    try:
        yield
    finally:
        instance.hydra = sweeping


@functools.cache
def _exit_with_parent() -> None:
    """Exit this worker process if the sweep is killed, so that the job can be resumed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
