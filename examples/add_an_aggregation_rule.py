"""A new way of aggregating LoRAs, from one pure function to a federated run.

Pilot mixes each client's LoRA with those of its M nearest neighbours. The rule below uses all
clients, with weights that fall with distance at a rate set by a temperature::

    w_kj = n_j exp(-d_kj / (temperature * mean distance)),   each row scaled to sum to 1

Run ``python examples/add_an_aggregation_rule.py``: a small federation in this process takes about
a minute. To keep a rule, see docs/how-to/add-aggregation-rule.md.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.algorithm.aggregation import LORA_RULES, LoraRule
from pilot_flwr.launch.in_process import run_in_process
from pilot_flwr.run.aggregations import Matrices, read_matrices
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import Aggregated, select

SMALL = (
    "data.clients_per_task=2 data.train_examples=16 data.test_examples=4 "
    "strategy.rounds=1 train.epochs=1 run.report=false run.tensorboard=false"
)


def softmax_weights(
    distances: NDArray[np.float64], num_examples: Sequence[float], *, temperature: float = 0.5
) -> NDArray[np.float64]:
    """Return the (K, K) mixing weights: row k gives the shares of client k's next LoRA."""
    others = distances[~np.eye(len(distances), dtype=bool)]
    scale = temperature * (others.mean() if others.any() else 1.0)
    weights = np.asarray(num_examples) * np.exp(-distances / scale)
    return weights / weights.sum(axis=1, keepdims=True)


RULE = LoraRule(
    weights=lambda distances, tasks, examples, config: softmax_weights(distances, examples),
    owner=lambda client, task: client,  # every client has its own LoRA
)
"""The rule, as a row of `LORA_RULES`."""


def main(folder: Path) -> Matrices:
    """Run a federation with the rule in place of Pilot's; return its last matrices."""
    with patch.dict(LORA_RULES, adaptive=RULE):
        outcome = run_in_process(f"{SMALL} run.folder={folder}", folder, out=print)
    if not outcome.succeeded:
        raise SystemExit("\n".join(outcome.explanation))
    found = read_matrices(folder, select(read_events(folder), Aggregated)[-1])
    assert found is not None
    print("\nShare of each client's LoRA in the next one:")
    for client, shares in zip(found.clients, found.weights, strict=True):
        named = zip(found.clients, shares, strict=True)
        print(f"  {client:<14}" + "  ".join(f"{other} {share:.2f}" for other, share in named))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.mkdtemp()) / "run")
