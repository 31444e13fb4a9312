"""One job of a sweep: a run like any other, of which a failure is written down and not raised."""

import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from pilot_flwr.errors import ConfigError, PilotError
from pilot_flwr.launching.execution import carry_out
from pilot_flwr.launching.outcome import COMPLETED, Outcome, RunStatus, judge
from pilot_flwr.launching.preparation import Prepared, check_settings, engine_options, prepare
from pilot_flwr.launching.processes import Interrupted
from pilot_flwr.storage.resume import OVERRIDES, check_resumable
from pilot_flwr.submission import path_override
from pilot_flwr.sweeping.folder import SweepFolder
from pilot_flwr.sweeping.plan import Job
from pilot_flwr.sweeping.rows import label_of, read_rows, variant_of
from pilot_flwr.wording import count, headline, human_seconds

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
                outcome = judge(RunStatus(COMPLETED), prepared.folder)
                if outcome.succeeded:
                    out("done before")
                    folder.keep_outcome(job, outcome)
                    return outcome
                out(f"FAILED before: {_first(outcome)}; that run is now {folder.put_aside(job)}")
                prepared = _prepare(folder.run(job), job)
            folder.forget_outcome(job)
            out("going on" if prepared.resumed else "begins")
            outcome = carry_out(prepared, out=live)
        except Interrupted:
            raise
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
