"""Time the imports of the apps, which every message of a deployment repeats, and of the plan.

Run ``python benchmarks/import_time.py`` (about 3 minutes) to update
``benchmarks/results/import_time.json``, or ``--quick`` for one round that writes nothing. Every
program is a fresh process; the programs alternate, and figures are medians of their CPU and wall
seconds, minus those of an empty program.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from _record import RESULTS, write_record

RESULT = RESULTS / "import_time.json"
PROGRAMS = {
    "empty": ("-c", "pass"),
    "flwr.clientapp": ("-c", "import flwr.clientapp"),
    "torch": ("-c", "import torch"),
    "client_app": ("-c", "import pilot_flwr.client_app"),
    "server_app": ("-c", "import pilot_flwr.server_app"),
    "help": ("-m", "pilot_flwr.cli.main", "--help"),
    "plan": ("-m", "pilot_flwr.cli.main", "plan", "experiment=paper"),
}
GOALS = {"client_app": "flwr.clientapp", "server_app": "flwr.clientapp", "plan": "torch"}
"""Each program may take at most twice as long as the second."""


def seconds_of(arguments: Sequence[str]) -> tuple[float, float]:
    """Return CPU and wall seconds of a Python process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(  # nosec B603  # no shell, this interpreter
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(rounds: int) -> dict[str, Any]:
    """Time all programs alternately, and compute the ratio of each goal."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, arguments in PROGRAMS.items():
            times[name].append(seconds_of(arguments))
    medians = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)]
        for name, taken in times.items()
    }
    own = {
        name: [one - base for one, base in zip(median, medians["empty"], strict=True)]
        for name, median in medians.items()
    }
    return {
        "rounds": rounds,
        "seconds": {n: {"cpu": round(c, 3), "wall": round(w, 3)} for n, (c, w) in own.items()},
        "ratio": {
            name: {
                "to": other,
                "cpu": round(own[name][0] / own[other][0], 2),
                "wall": round(own[name][1] / own[other][1], 2),
            }
            for name, other in GOALS.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, write nothing")
    options = parser.parse_args(arguments)
    results = measure(1 if options.quick else 7)
    print(json.dumps(results, indent=2))
    if not options.quick:
        packages = ("pilot-flwr", "flwr", "torch", "transformers")
        write_record(RESULT, results, packages=packages)
    return results


if __name__ == "__main__":
    main()
