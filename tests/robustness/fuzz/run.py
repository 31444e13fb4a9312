"""Fuzz every reader of outside data: only its own errors, no hang, no unbounded memory.

Every reader of `fuzz.targets` gets random inputs and valid ones with a defect. An exception that is
not one of the reader's own ends the run with the smallest input that causes it, and so does an
input that takes too long. Memory is limited, so that a header claiming a huge array fails.

Run ``python tests/robustness/fuzz/run.py`` (about 10 minutes) to update
``benchmarks/results/fuzz.json``, which is written after every target, or ``--quick`` to see
that it works. ``tests/robustness/test_fuzz.py`` tries a few of the same inputs.
"""

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz.targets import Target, targets

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
RESULT = BENCHMARKS / "results" / "fuzz.json"
INPUTS = 12_000
BATCH = 2_000
SLOWEST_SECONDS = 20.0
MORE_MEMORY = 2 * 2**30
PACKAGES = ("hypothesis", "numpy", "safetensors", "pillow")


def outcome(target: Target, given_input: Any) -> str:
    """Read one input; return ``accepted`` or the name of the error.

    Raises
    ------
    Exception
        Any error that is not one of the target's.
    """
    try:
        target.read(given_input)
    except target.errors as error:
        return type(error).__name__
    return "accepted"


def fuzz(target: Target, *, inputs: int, first_seed: int = 0) -> dict[str, Any]:
    """Try at least `inputs` inputs; return how many, their outcomes and the slowest one."""
    outcomes: Counter[str] = Counter()
    slowest, number = 0.0, first_seed
    while outcomes.total() < inputs:

        @seed(number)
        @settings(
            max_examples=min(BATCH, inputs),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs)
        def attempt(given_input: Any) -> None:
            nonlocal slowest
            started = time.perf_counter()
            outcomes[outcome(target, given_input)] += 1
            seconds = time.perf_counter() - started
            slowest = max(slowest, seconds)
            assert seconds < SLOWEST_SECONDS, f"{seconds:.1f} s for one input"

        attempt()
        number += 1
    return {
        "inputs": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_input_milliseconds": round(1000 * slowest, 1),
    }


def limit_memory() -> None:
    """Allow this process some address space beyond what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fuzz all targets, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few inputs, nothing written")
    parser.add_argument("--only", help="one target; nothing written")
    parser.add_argument("--inputs", type=int, default=INPUTS, help="for a target of weight 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    inputs = 20 if options.quick else options.inputs
    if not options.quick:
        limit_memory()
    logging.disable(logging.WARNING)
    results: dict[str, Any] = {"inputs_in_all": 0, "targets": {}}
    sys.path.insert(0, str(BENCHMARKS))
    from _record import write_record

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for title, target in targets(Path(name)).items():
            if options.only not in (None, title):
                continue
            count = max(10, int(inputs * target.weight))
            found = fuzz(target, inputs=count, first_seed=options.seed)
            results["targets"][title] = found
            results["inputs_in_all"] += found["inputs"]
            print(title, json.dumps(found), flush=True)
            if not options.quick and options.only is None:
                write_record(options.output, results, packages=PACKAGES)
    logging.disable(logging.NOTSET)
    return results


if __name__ == "__main__":
    main()
