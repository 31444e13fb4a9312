"""Compare Pilot's number of neighbours with the chosen ones of ``pilot_auto`` on the two scenarios.

`strategy.num_neighbors` is 1, 2 (the default), 4 or 8, which is all of nine clients; scores are on
validation scans, with four seeds that the comparison does not use. Run
``python benchmarks/scenarios/neighbors.py`` (40 runs, about 20 minutes on 1 core; repeat it to
resume) to update ``benchmarks/results/scenarios/neighbors.json``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _record import write_record

from pilot_flwr.run.aggregations import read_matrices
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import Aggregated, select
from pilot_flwr.sweeps.results import DONE, read_rows
from scenarios.sweeps import FOLDER, PACKAGES, SCENARIOS, choice, sweep, sweep_parser

AUTO = "pilot_auto"
NUMBERS = (1, 2, 4, 8)
SEEDS = (100, 101, 102, 103)


def chosen(folder: Path) -> list[float]:
    """Return the clients' mean number of neighbours in every exchange of a run."""
    found = (read_matrices(folder, event) for event in select(read_events(folder), Aggregated))
    return [
        round(float((np.count_nonzero(matrices.weights, axis=1) - 1).mean()), 2)
        for matrices in found
        if matrices is not None
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all numbers and the chosen ones, and write scores and chosen numbers by seed."""
    options = sweep_parser(__doc__).parse_args(arguments)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    numbers: dict[str, dict[str, list[float]]] = {}
    for scenario in SCENARIOS:
        found = scores[scenario] = {}
        for words in (
            (choice("strategy", [AUTO]),),
            (choice("strategy", ["pilot"]), choice("strategy.num_neighbors", NUMBERS)),
        ):
            folder = options.out / f"neighbors-{scenario}"
            words = ("data.evaluate_on=validation", *words, choice("seed", SEEDS))
            sweep(folder, scenario, *words, jobs=options.jobs)
            rows = [row for row in read_rows(folder) if row["status"] == DONE]
        for row in rows:
            label = row["variant"].rpartition("=")[2] or AUTO
            found.setdefault(label, {})[row["seed"]] = round(float(row["mean"]), 4)
        numbers[scenario] = {
            row["seed"]: chosen(folder / "runs" / row["job"]) for row in rows if not row["variant"]
        }
    results = {"side_by_side": options.jobs, "score": scores, "chosen": numbers}
    write_record(FOLDER / "neighbors.json", results, packages=PACKAGES)


if __name__ == "__main__":
    main()
