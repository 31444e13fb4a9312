"""Simulate 9 to 1,002 clients: seconds, peak memory of every process, and scores by exchange.

Two parts. ``experiment=thousand`` as shipped, with 5 % of the clients in each exchange; and the
same federation with 9, 90, 300 and 1,002 clients of which 9 train in each of four exchanges, where
the server's memory must not depend on the number of clients (goal: within 10 %). Each client has
20 training and 10 test examples, on average.

Run ``python benchmarks/clients.py`` (about 25 minutes on 2 cores) to update
``benchmarks/results/clients.json``, or ``--quick`` for one tiny federation.
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

import psutil
from _record import RESULTS, write_record

from pilot_flwr.run.events import ExchangeClosed, RosterCalled, select
from pilot_flwr.run.history import MEAN, read_run

RESULT = RESULTS / "clients.json"
TASKS = 3
SIZES = (9, 90, 300, 1002)
DRAWN = 9
EXCHANGES = 4
POLL_SECONDS = 1.0
SERVER = "ServerApp and simulation engine"
ROLES = {
    "ray::ClientAppActor": "a client worker of Ray",
    "flwr-simulation": SERVER,
    "flower-superlink": "SuperLink",
    "flower-superexec": "SuperExec",
    "gcs_server": "Ray's control store",
    "raylet/raylet": "raylet",
    "pilot-flwr run": "pilot-flwr run",
}
"""Part of a command line → the process."""
KINDS = {"resident": "VmHWM", "anonymous": "RssAnon"}
"""Kind of memory → its field in ``/proc/PID/status``: the first is the peak that Linux keeps."""

Peaks = dict[str, dict[str, int]]
"""Process → kind of memory → peak in bytes."""


def role(process: psutil.Process) -> str:
    """Return what a process is, empty if it is none of `ROLES`."""
    line = " ".join(process.cmdline())
    return next((name for part, name in ROLES.items() if part in line), "")


def note_peaks(process: psutil.Process, peaks: Peaks) -> None:
    """Raise the peaks of a process's role to what it holds."""
    if not (name := role(process)):
        return
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = peaks.setdefault(name, dict.fromkeys(KINDS, 0))
    for kind, entry in KINDS.items():
        size = int(status.partition(f"{entry}:")[2].split()[0]) * 1024
        found[kind] = max(found[kind], size)


def run(folder: Path, *words: str) -> Peaks:
    """Run a federation; return the largest memory of each kind of process."""
    program = Path(sys.executable).parent / "pilot-flwr"
    command = [str(program), "run", *words, f"run.folder={folder}"]
    command += ["run.report=false", "run.tensorboard=false"]
    peaks: Peaks = {}
    with subprocess.Popen(  # nosec B603  # no shell, this package's program
        command, stdout=subprocess.DEVNULL
    ) as started:
        root = psutil.Process(started.pid)
        while started.poll() is None:
            for process in [root, *root.children(recursive=True)]:
                try:
                    note_peaks(process, peaks)
                except (psutil.Error, OSError, IndexError):
                    continue  # it has ended
            time.sleep(POLL_SECONDS)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, command)
    return peaks


def observe(folder: Path, peaks: Peaks) -> dict[str, Any]:
    """Return the figures of a finished run."""
    data = read_run(folder)
    closed = select(data.events, ExchangeClosed)
    rosters = select(data.events, RosterCalled)
    files = {(s.st_dev, s.st_ino): s for p in folder.rglob("*") if (s := p.lstat())}
    return {
        "clients": data.config.num_clients,
        "trained_per_exchange": [len(exchange.trained) for exchange in data.exchanges],
        "failures": len(data.result["failures"]),
        "run_seconds": round(data.result["seconds"], 1),
        "exchange_seconds": [round(event.seconds, 1) for event in closed],
        "roster_seconds": [
            round(roster.elapsed - (event.elapsed - event.seconds), 1)
            for roster, event in zip(rosters, closed, strict=True)
        ],
        "score_by_exchange": {n: round(score, 3) for n, score in data.curves[MEAN].items()},
        "metrics_bytes": (folder / "metrics.jsonl").stat().st_size,
        "folder_bytes": sum(512 * s.st_blocks for s in files.values()),
        "peak_bytes": dict(sorted(peaks.items())),
    }


def federation(clients: int, drawn: int, exchanges: int) -> list[str]:
    """Return the settings of `clients` clients of which `drawn` train in each exchange."""
    words = [
        "experiment=thousand",
        f"data.clients_per_task={clients // TASKS}",
        f"strategy.rounds={exchanges - 1}",
    ]
    if drawn == clients:
        whole = {"fraction_train": 1, "fraction_evaluate": 1, "sampling": "uniform"}
        return words + [f"strategy.{key}={value}" for key, value in whole.items()]
    fraction = (drawn + 0.5) / clients  # rounded down to `drawn`
    words += [f"strategy.fraction_{phase}={fraction:.6f}" for phase in ("train", "evaluate")]
    return words


def measure(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run a federation in a new folder; return its figures."""
    return observe(folder, run(folder, *words))


def spread(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return by how much the server's largest peak exceeds its smallest, by kind of memory."""
    peaks = [one["peak_bytes"][SERVER] for one in results]
    return {
        kind: round(max(p[kind] for p in peaks) / min(p[kind] for p in peaks) - 1, 3)
        for kind in KINDS
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, write nothing")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.quick:
            words = [*federation(9, 3, 2), "data.train_examples=4", "data.test_examples=2"]
            results["quick"] = measure(folder / "quick", words)
        else:
            sizes = [measure(folder / str(n), federation(n, DRAWN, EXCHANGES)) for n in SIZES]
            results["same_number_drawn"] = sizes
            results["server_spread"] = spread(sizes)
            results["thousand"] = measure(folder / "thousand", ["experiment=thousand"])
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(RESULT, results, packages=("pilot-flwr", "flwr", "ray", "torch"))
    return results


if __name__ == "__main__":
    main()
