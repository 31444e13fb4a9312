"""Run methods on the emoji federations, and keep the score of every answer.

A run is a `Job`. Each process of a pool runs its jobs one after another, and scores the final
models with ``pilot-flwr evaluate``. Every result is saved; a repeated command skips finished jobs.
"""

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pilot_flwr.cli.main import main as pilot_flwr
from pilot_flwr.config.loading import config_folder
from pilot_flwr.formatting import human_seconds
from pilot_flwr.metrics import METRICS
from pilot_flwr.run.aggregations import read_matrices
from pilot_flwr.run.atomic import write_text
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import Aggregated, Event, select
from pilot_flwr.run.history import bytes_down, bytes_up
from pilot_flwr.run.provenance import provenance

FIXED = (
    "simulation.engine=in-process",
    "model.feature_cache.where=disk",  # runs share the visual features
    "run.report=false",
    "run.tensorboard=false",
)
PACKAGES = ("pilot-flwr", "flwr", "torch", "transformers", "peft")
DIVERGED = "or `train.lr_scale`."
"""End of the error message of a client whose training diverged, by which `_diverged` knows it."""

RUN_SECONDS = 105
"""Wall-clock time of one run of nine clients, two in parallel on two cores of an AMD EPYC."""

_LARGE = ("checkpoint", "clients")
"""Parts of a run folder that are deleted once its answers are scored."""


Neighbors = Mapping[str, Sequence[str]]
"""Client → the other clients in its mixture of LoRAs."""


@dataclass(frozen=True)
class Job:
    """A method on one federation; `overrides` are further settings."""

    scenario: str
    seed: int
    method: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return ",".join((self.scenario, str(self.seed), self.method, *self.overrides))


@dataclass(frozen=True)
class JobResult:
    """The score of every test example by client and id, or None if training diverged."""

    job: Job
    scores: dict[str, dict[str, float]] | None
    seconds: float
    code: dict[str, Any]
    """Commit and versions."""
    bytes_up: int = 0
    """Sent by all clients in all exchanges."""
    bytes_down: int = 0
    inputs: str = ""
    """Hash of base model, federation and the experiment's settings."""
    neighbors: Sequence[Neighbors] | None = None
    """Of every exchange that mixed LoRAs; None in results of earlier versions."""


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a script's parser, with the options of its runs."""
    arguments = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data, runs = Path("outputs/emoji"), Path("outputs/emoji/runs")
    arguments.add_argument("--data", type=Path, default=data, help="folder of base and federations")
    arguments.add_argument(
        "--out", type=Path, default=runs, help="folder of runs and their results"
    )
    arguments.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs in parallel")
    return arguments


def run_all(
    jobs: Sequence[Job], options: argparse.Namespace, *, keep: bool = False
) -> list[JobResult]:
    """Run the jobs that have no result yet for this base and data; return all results in order.

    Changes to the code, to `conf/strategy` and to the pictures are not detected: delete ``--out``
    to run again. With `keep`, run folders keep the trained models. Raises `SystemExit` if ROUGE-L
    would be approximate or a run has no result.
    """
    if reason := METRICS["rouge_l"].approximate():
        raise SystemExit(f"The scores of `describe` would be approximate: {reason}")
    data, code = options.data.resolve(), provenance()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {job: Path(f"{folder_of(job, options)}.json") for job in jobs}  # names have dots
    missing = [job for job, file in files.items() if not file.exists()]
    time_left = time_of(len(missing), options.jobs)
    print(f"{len(missing)} of {len(files)} runs to do: {time_left}.", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        begun = [pool.submit(_run, job, data, files[job], code, keep) for job in missing]
        for number, ended in enumerate(as_completed(begun), start=1):
            print(f"{number} of {len(missing)}: {_outcome(ended)}", flush=True)
    if failed := [job.name for job, file in files.items() if not file.exists()]:
        raise SystemExit(f"Without a result, see above: {'; '.join(failed)}")
    return [_read(job, files[job]) for job in jobs]


def time_of(number: int, jobs: int) -> str:
    """Estimate the time of a number of runs, `jobs` in parallel."""
    return f"about {human_seconds(math.ceil(number / jobs) * RUN_SECONDS)}"


def folder_of(job: Job, options: argparse.Namespace) -> Path:
    """Return a job's run folder."""
    folder: Path = options.out.resolve() / f"{job.name}-{_inputs(job, options.data.resolve())}"
    return folder


def _outcome(ended: Future[JobResult]) -> str:
    """Describe how a run ended."""
    if error := ended.exception():
        return f"FAILED: {error!r}"
    found = ended.result()
    state = "finished" if found.scores else "diverged"
    return f"{found.job.name} {state} after {found.seconds:.0f} s"


def _inputs(job: Job, data: Path) -> str:
    """Return a hash of the base model, the federation and the experiment's settings."""
    files = [data / "base" / "model.safetensors", data / f"{job.scenario}-{job.seed}.yaml"]
    files += sorted((data / job.scenario / str(job.seed)).glob("*.json"))
    files += [config_folder() / "experiment" / "emoji.yaml"]
    return hashlib.sha256(b"".join(map(_content_hash, files))).hexdigest()[:8]


@functools.cache
def _content_hash(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _run(job: Job, data: Path, file: Path, code: dict[str, Any], keep: bool) -> JobResult:
    torch.set_num_threads(1)
    folder, answers, log = (
        file.with_suffix(""),
        file.with_suffix(".jsonl"),
        file.with_suffix(".log"),
    )
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    for left in file.parent.glob(f"{answers.name}*"):
        left.unlink()
    overrides = (f"strategy={job.method}", f"data={data}/{job.scenario}-{job.seed}.yaml")
    # `evaluate` below scores the final models; but a run must train or evaluate.
    evaluated = str(job.method == "zero_shot").lower()
    overrides += (f"seed={job.seed}", f"model.path={data}/base", f"evaluation.enabled={evaluated}")
    overrides += (*FIXED, *job.overrides)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as text, redirect_stdout(text), redirect_stderr(text):
        failed = pilot_flwr(["run", "experiment=emoji", f"run.folder={folder}", *overrides])
        if not failed:
            failed = pilot_flwr(["evaluate", str(folder), "--answers", str(answers)])
    if failed and not _diverged(folder):
        raise RuntimeError(f"{job.name} failed, but not by divergence: {log}")
    scores = None if failed else _scores(answers.read_text(encoding="utf-8").splitlines())
    seconds, events = round(time.perf_counter() - started, 1), read_events(folder)
    sent = (sum(of(events).values()) for of in (bytes_up, bytes_down))
    inputs = file.stem.rpartition("-")[2]
    found = JobResult(job, scores, seconds, code, *sent, inputs, _neighbors(folder, events))
    write_text(file, json.dumps(asdict(found)))
    for part in () if keep else _LARGE:
        shutil.rmtree(folder / part, ignore_errors=True)
    return found


def _diverged(folder: Path) -> bool:
    """Whether a client's training diverged, according to the run's ``result.json``."""
    try:
        failures = json.loads((folder / "result.json").read_text(encoding="utf-8"))["failures"]
    except OSError:
        return False
    return any(DIVERGED in json.dumps(failure) for failure in failures)


def _neighbors(folder: Path, events: Sequence[Event]) -> list[Neighbors]:
    found = (read_matrices(folder, event) for event in select(events, Aggregated))
    return [
        {
            client: [
                o for o, weight in zip(mixed.clients, row, strict=True) if weight and o != client
            ]
            for client, row in zip(mixed.clients, mixed.weights, strict=True)
        }
        for mixed in found
        if mixed is not None
    ]


def _scores(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for line in lines:
        answer = json.loads(line)
        key = answer["id"].partition(":")[2]
        scores.setdefault(answer["client"], {})[key] = round(answer["score"], 4)
    return scores


def _read(job: Job, file: Path) -> JobResult:
    return JobResult(**json.loads(file.read_text(encoding="utf-8")) | {"job": job})
