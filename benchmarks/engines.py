"""Time the same run under Flower's simulation with Ray and in-process, and jobs of a sweep.

Run ``python benchmarks/engines.py`` (about 6 minutes on 2 cores) to update
``benchmarks/results/engines.json``, or ``--quick`` for a tiny in-process run only.
A run's time is that of its whole command, without the report. The time of a further job is half the
difference between sweeps of three jobs and of one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _record import RESULTS, write_record

RESULT = RESULTS / "engines.json"
DEMO = ("experiment=demo", "run.report=false", "run.tensorboard=false")
QUICK = (*DEMO, "data.train_examples=8", "data.test_examples=2", "data.clients_per_task=1",
         "strategy.rounds=1", "train.epochs=1", "evaluation.max_new_tokens=2")  # fmt: skip


def seconds_of(*words: str) -> float:
    """Return the seconds that a ``pilot-flwr`` command takes."""
    program = Path(sys.executable).parent / "pilot-flwr"
    started = time.perf_counter()
    subprocess.run(  # nosec B603  # no shell, this package's program
        [str(program), *words], check=True, stdout=subprocess.DEVNULL
    )
    return round(time.perf_counter() - started, 1)


def measure(settings: Sequence[str], engines: Sequence[str]) -> dict[str, Any]:
    """Time a run under every engine, and a further job of an in-process sweep."""
    results: dict[str, Any] = {"overrides": list(settings)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for engine in engines:
            words = (*settings, f"simulation.engine={engine}")
            whole = seconds_of("run", *words, f"run.folder={folder / engine}")
            inside = json.loads((folder / engine / "result.json").read_text())["seconds"]
            results[engine] = {"command_seconds": whole, "run_seconds": round(inside, 1)}
        here = (*settings, "simulation.engine=in-process")
        one = seconds_of("sweep", "seed=0", *here, "--out", str(folder / "one"))
        three = seconds_of("sweep", "seed=0,1,2", *here, "--out", str(folder / "three"))
        results["sweep_in_process"] = {
            "one_job_seconds": one,
            "three_jobs_seconds": three,
            "further_job_seconds": round((three - one) / 2, 1),
        }
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, write nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        results = measure(QUICK, ["in-process"])
    else:
        results = measure(DEMO, ["ray", "in-process"])
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(RESULT, results, packages=("pilot-flwr", "flwr", "ray", "torch"))
    return results


if __name__ == "__main__":
    main()
