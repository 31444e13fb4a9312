"""Compare distances from sketches with exact ones, on the LoRAs of a real federation.

The demo's federation with more clients (three tasks, two exchanges) runs in this process with a
run's own code. The LoRAs that its clients send are compared: how many of the M nearest neighbours
of a client are the same, what the others cost, and how far weights and distances are apart, over
several seeds of the sketch.

Run ``python benchmarks/sketch.py`` (about 3 minutes) to update ``benchmarks/results/sketch.json``,
or ``--quick`` for a smoke test.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _record import RESULTS, write_record
from privacy import QUICK, DemoFederation

from pilot_flwr.algorithm.aggregation import (
    SKETCH_SIZE,
    adaptive_weights,
    pairwise_distances,
    sketched_distances,
)
from pilot_flwr.config.loading import load_config
from pilot_flwr.protocol import State

RESULT = RESULTS / "sketch.json"
SETTINGS = (
    "experiment=demo data.clients_per_task=12 data.train_examples=24 data.test_examples=1 "
    "train.epochs=1 evaluation.enabled=false strategy.rounds=1"
)
NEIGHBORS = (1, 2, 5, 10)
SEEDS = 10


class Uploads(DemoFederation):
    """The demo's federation, which keeps the LoRAs that its clients send."""

    def run(self) -> dict[int, list[State]]:
        """Run all exchanges; return the LoRAs by exchange."""
        sent = {}
        for number in range(1, self.config.strategy.rounds + 2):
            turns = {c: self._turn(c, number, train=True) for c in self.clients}
            updates = [self._update(c, number, result) for c, result in turns.items()]
            sent[number] = [update.lora for update in updates]
            self.state.aggregate(updates, self.config.strategy)
        return sent


def compare(loras: Sequence[State], seeds: int) -> dict[str, Any]:
    """Compare the distances of an exchange, and the neighbours and weights that follow."""
    exact = pairwise_distances(loras)
    pairs = np.triu_indices(len(loras), 1)
    estimates = [sketched_distances(loras, seed=[seed]) for seed in range(seeds)]
    errors = np.concatenate([found[pairs] / exact[pairs] - 1 for found in estimates])
    spread = exact[pairs].std() / exact[pairs].mean()
    return {
        "distance_error_rms": _short(np.sqrt(np.mean(errors**2))),
        "distance_error_max": _short(np.abs(errors).max()),
        "distance_spread": _short(spread),
        "neighbors": {
            str(m): neighbors(exact, estimates, m) for m in NEIGHBORS if m < len(loras) - 1
        },
    }


def neighbors(exact: Any, estimates: Sequence[Any], num_neighbors: int) -> dict[str, float]:
    """Compare M nearest neighbours: their agreement, and how much further the others are."""
    counts = [1] * len(exact)
    wanted = adaptive_weights(exact, counts, num_neighbors, self_weight=False)
    near = np.where(wanted > 0, exact, 0).sum(axis=1)
    shared, further, moved = [], [], []
    for found in estimates:
        chosen = adaptive_weights(found, counts, num_neighbors, self_weight=False)
        shared.append(((chosen > 0) & (wanted > 0)).sum(axis=1).mean() / num_neighbors)
        further.append((np.where(chosen > 0, exact, 0).sum(axis=1) / near - 1).mean())
        moved.append(np.abs(chosen - wanted).sum(axis=1).mean() / 2)
    return {
        "agreement": _short(np.mean(shared)),
        "agreement_worst_seed": _short(np.min(shared)),
        "by_chance": _short(num_neighbors / (len(exact) - 1)),
        "mean_distance_excess": _short(np.mean(further)),
        "weight_moved": _short(np.mean(moved)),
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the federation, compare, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few clients, write nothing")
    quick = parser.parse_args(arguments).quick
    config = load_config(QUICK.replace("per_task=1", "per_task=2") if quick else SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        sent = Uploads(config, Path(folder)).run()
    results = {
        "clients": config.num_clients,
        "tasks": len(config.data.tasks),
        "parameters": sum(tensor.numel() for tensor in sent[1][0].values()),
        "sketch_size": SKETCH_SIZE,
        "seeds": 2 if quick else SEEDS,
        "exchanges": {
            str(number): compare(loras, 2 if quick else SEEDS) for number, loras in sent.items()
        },
    }
    print(json.dumps(results, indent=2))
    if not quick:
        write_record(RESULT, results, packages=("pilot-flwr", "numpy", "torch"))
    return results


if __name__ == "__main__":
    main()
