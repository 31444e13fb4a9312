"""The methods compared on the scenarios, and their sweeps with ``pilot-flwr sweep``."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from _record import RESULTS, ROOT

SCENARIOS = ("scenario1", "scenario2")
METHODS = (
    "zero_shot",
    "local",
    "fedit",
    "fedavg_per_task",
    "fedprox",
    "fedadam",
    "ffa_lora",
    "fedsa_lora",
    "fedex_lora",
    "ditto",
    "pilot",
    "centralised",
)
"""In the order of the tables."""
ABLATIONS = (
    "pilot_no_difference_loss",
    "pilot_no_client_adapter",
    "pilot_stage1_only",
    "pilot_no_cross_task_adapters",
    "pilot_no_router_losses",
    "pilot_fedavg_lora",
    "pilot_global_adapters",
    "pilot_official_init",
    "pilot_m1",
    "pilot_all_neighbors",
    "pilot_no_self_weight",
)
SEEDS = (0, 1, 2, 3, 4)
"""Seeds of the comparison; the search has its own."""
FOLDER = RESULTS / "scenarios"
PACKAGES = ("pilot-flwr", "flwr", "torch", "transformers", "peft")
RATES = ROOT / "benchmarks" / "scenarios" / "rates.json"
"""Scenario → method → the override that the search chose."""
FAILED = 1
"""Exit code of a sweep with a failed job."""

Rates = dict[str, dict[str, str]]


def sweep_parser(doc: str, folder: str = "scenarios") -> argparse.ArgumentParser:
    """Return a script's parser, with the options of its sweeps; `folder` is below ``outputs``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / folder)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="jobs in parallel")
    return parser


def sweep(folder: Path, scenario: str, *words: str, jobs: int, may_fail: bool = False) -> None:
    """Run or resume a sweep, `jobs` of its jobs in parallel.

    Raises
    ------
    CalledProcessError
        A job failed and `may_fail` is false; the sweep has printed which, and its log.
    """
    program = Path(sys.executable).parent / "pilot-flwr"
    command = ["sweep", "-m", f"experiment={scenario}", *words, "simulation.engine=in-process"]
    command += ["run.report=false", "run.tensorboard=false"]
    if jobs > 1:
        command += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
    print(f"\n$ pilot-flwr {shlex.join(command)}", flush=True)
    ended = subprocess.run(  # nosec B603  # no shell, this package's program
        [str(program), *command, "--out", str(folder)], check=False
    )
    if not (may_fail and ended.returncode == FAILED):
        ended.check_returncode()


def choice(key: str, values: Sequence[object]) -> str:
    """Return a sweep over `values`; even a single value becomes part of a job's name."""
    return f"{key}=choice({','.join(map(str, values))})"


def read_rates() -> Rates:
    """Return the rates that the search chose."""
    rates: Rates = json.loads(RATES.read_text())
    return rates


def by_rate(rates: Mapping[str, str], methods: Sequence[str]) -> dict[str, list[str]]:
    """Group methods by their override, one sweep for each."""
    groups: dict[str, list[str]] = {}
    for method in methods:
        groups.setdefault(rates.get(method, ""), []).append(method)
    return groups
