"""Run methods on the emoji federations, and keep the score of every answer.

A run is a `Job`. A worker process runs one federation after the other, and scores the final
models with ``pilot-flwr evaluate``. What a job found is kept in a file, so that a repeated command
resumes.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pilot_flwr.cli.main import main as pilot_flwr
from pilot_flwr.run.provenance import provenance

FIXED = (
    "simulation.engine=in-process",
    "evaluation.enabled=false",  # the final models are scored below
    "model.feature_cache.where=disk",  # runs share the visual features
    "run.report=false",
    "run.tensorboard=false",
)
PACKAGES = ("pilot-flwr", "flwr", "torch", "transformers", "peft")
DIVERGED = "or `train.lr_scale`."
"""End of the reason of a client whose training diverged: what to lower."""

_LARGE = ("checkpoint", "clients", "aggregations")
"""Parts of a run folder that are deleted once its answers are scored."""


@dataclass(frozen=True)
class Job:
    """A method on one federation; `overrides` are further settings."""

    scenario: str
    seed: int
    method: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder and of its file."""
        words = (self.scenario, str(self.seed), self.method, *self.overrides)
        return ",".join(word.replace("/", "-") for word in words)


@dataclass(frozen=True)
class Found:
    """What a job found: the score of every test row by client and id, or none if it diverged."""

    job: Job
    scores: dict[str, dict[str, float]] | None
    seconds: float
    code: dict[str, Any]
    """Commit and versions."""


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a script's parser, with the options of its runs."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--data", type=Path, default=Path("outputs/emoji"))
    made.add_argument("--out", type=Path, default=Path("outputs/emoji/runs"))
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs in parallel")
    return made


def run_all(jobs: Sequence[Job], options: argparse.Namespace, *, keep: bool = False) -> list[Found]:
    """Run the jobs that have not run yet; return what every job found, in order.

    With `keep`, run folders keep the trained models.
    """
    data, out = options.data.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    missing = [job for job in dict.fromkeys(jobs) if not _file(job, out).exists()]
    print(f"{len(missing)} of {len(jobs)} runs are missing.", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        begun = [pool.submit(_run, job, data, out, keep) for job in missing]
        try:
            for number, ended in enumerate(as_completed(begun), start=1):
                found = ended.result()
                state = "done" if found.scores else "FAILED"
                took = f"{found.seconds:.0f} s"
                print(f"{number} of {len(missing)}: {found.job.name} {state} in {took}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return [_read(job, out) for job in jobs]


def _run(job: Job, data: Path, out: Path, keep: bool) -> Found:
    torch.set_num_threads(1)
    folder, answers = out / job.name, out / f"{job.name}.jsonl"
    shutil.rmtree(folder, ignore_errors=True)
    words = (f"strategy={job.method}", f"data={data}/{job.scenario}-{job.seed}.yaml")
    words += (f"seed={job.seed}", f"model.path={data}/base", *FIXED, *job.overrides)
    started = time.perf_counter()
    with (out / f"{job.name}.log").open("w", encoding="utf-8") as log:
        sys.stdout = sys.stderr = log
        ended = pilot_flwr(["run", "experiment=emoji", f"run.folder={folder}", *words])
        if not ended:
            ended = pilot_flwr(["evaluate", str(folder), "--answers", str(answers)])
    if ended and not _diverged(folder):
        raise RuntimeError(f"{job.name} failed, but not by divergence; see {log.name}")
    scores = None if ended else _scores(answers.read_text(encoding="utf-8").splitlines())
    found = Found(job, scores, round(time.perf_counter() - started, 1), provenance())
    _file(job, out).write_text(json.dumps(asdict(found)), encoding="utf-8")
    for part in () if keep else _LARGE:
        shutil.rmtree(folder / part, ignore_errors=True)
    return found


def _diverged(folder: Path) -> bool:
    """Whether a client's training diverged, by the run's own account."""
    try:
        failures = json.loads((folder / "result.json").read_text(encoding="utf-8"))["failures"]
    except OSError:
        return False
    return any(DIVERGED in json.dumps(failure) for failure in failures)


def _scores(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for line in lines:
        answer = json.loads(line)
        key = answer["id"].partition(":")[2]
        scores.setdefault(answer["client"], {})[key] = round(answer["score"], 4)
    return scores


def _file(job: Job, out: Path) -> Path:
    return out / f"{job.name}.json"


def _read(job: Job, out: Path) -> Found:
    return Found(**json.loads(_file(job, out).read_text(encoding="utf-8")) | {"job": job})
