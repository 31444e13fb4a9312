"""Simulate 9 to 1,002 clients: seconds, peak memory of every process, and scores by exchange.

Two parts. ``experiment=thousand`` as shipped, with 5 % of the clients in each exchange; and the
same federation with 9, 90, 300 and 1,002 clients of which 9 train in each exchange, where the
server's memory must not depend on the number of clients (goal: within 10 %).

Run ``python benchmarks/clients.py`` (about 40 minutes on 2 cores) to update
``benchmarks/results/clients.json``, or ``--quick`` for one tiny federation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from _record import RESULTS, write_record

from pilot_flwr.run.events import ExchangeClosed, select
from pilot_flwr.run.history import MEAN, read_run

RESULT = RESULTS / "clients.json"
TASKS = 3
SIZES = (9, 90, 300, 1002)
DRAWN = 9
EXCHANGES = 4
POLL_SECONDS = 0.5
ROLES = {
    "ray::": "a Ray worker (clients)",
    "flwr-simulation": "ServerApp and Flower's simulation engine",
    "flower-superlink": "SuperLink",
    "flower-superexec": "SuperExec",
    "gcs_server": "Ray's control store",
    "raylet": "raylet",
    "pilot-flwr": "pilot-flwr run",
}
"""Part of a command line → the process."""


def processes(root: psutil.Process) -> Iterator[psutil.Process]:
    """Yield a process and all that it started, those of Flower and Ray included."""
    yield root
    yield from root.children(recursive=True)


def peak_bytes(process: psutil.Process) -> int:
    """Return the peak resident memory of a process, as Linux counts it."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def role(process: psutil.Process) -> str:
    """Return what a process is, empty if it is none of `ROLES`."""
    line = " ".join(process.cmdline())
    return next((name for part, name in ROLES.items() if part in line), "")


def run(folder: Path, *words: str) -> dict[str, int]:
    """Run a federation; return the largest peak memory of each kind of process, in bytes."""
    program = Path(sys.executable).parent / "pilot-flwr"
    command = [str(program), "run", *words, f"run.folder={folder}"]
    command += ["run.report=false", "run.tensorboard=false"]
    peaks: dict[str, int] = {}
    with subprocess.Popen(  # nosec B603  # no shell, this package's program
        command, stdout=subprocess.DEVNULL
    ) as started:
        root = psutil.Process(started.pid)
        while started.poll() is None:
            for process in processes(root):
                try:
                    if name := role(process):
                        peaks[name] = max(peaks.get(name, 0), peak_bytes(process))
                except (psutil.Error, OSError, IndexError):
                    continue  # it has ended
            time.sleep(POLL_SECONDS)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, command)
    return peaks


def observe(folder: Path, peaks: dict[str, int]) -> dict[str, Any]:
    """Return the figures of a finished run."""
    data = read_run(folder)
    closed = select(data.events, ExchangeClosed)
    scores = data.curves.get(MEAN, {})
    return {
        "clients": data.config.num_clients,
        "trained_per_exchange": [len(exchange.trained) for exchange in data.exchanges],
        "failures": len(data.result["failures"]),
        "run_seconds": round(data.result["seconds"], 1),
        "exchange_seconds": [round(event.seconds, 1) for event in closed],
        "score_by_exchange": {n: round(score, 3) for n, score in scores.items()},
        "metrics_bytes": (folder / "metrics.jsonl").stat().st_size,
        "peak_mib": {name: round(size / 2**20) for name, size in sorted(peaks.items())},
    }


def federation(clients: int, drawn: int, exchanges: int) -> list[str]:
    """Return the settings of `clients` clients of which `drawn` train in each exchange."""
    fraction = (drawn + 0.5) / clients  # rounded down to `drawn`
    return [
        "experiment=thousand",
        f"data.clients_per_task={clients // TASKS}",
        f"strategy.rounds={exchanges - 1}",
        f"strategy.fraction_train={min(1.0, fraction):.6f}",
        f"strategy.fraction_evaluate={min(1.0, fraction):.6f}",
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, write nothing")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.quick:
            words = [*federation(9, 3, 2), "data.train_examples=4", "data.test_examples=2"]
            results = {"quick": observe(folder / "q", run(folder / "q", *words))}
        else:
            results = {
                f"{n}_clients": observe(folder / str(n), run(folder / str(n), *words))
                for n in SIZES
                for words in [federation(n, DRAWN, EXCHANGES)]
            }
            shipped = folder / "thousand"
            results["thousand"] = observe(shipped, run(shipped, "experiment=thousand"))
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(RESULT, results, packages=("pilot-flwr", "flwr", "ray", "torch"))
    return results


if __name__ == "__main__":
    main()
