"""Runs whose distances are estimated from sketches: neighbours of real LoRAs, and resume."""

import numpy as np
from inprocess import SMALL, Federation, assert_same_state, resumed
from quick_training import quick_training

from pilot_flwr.algorithm.aggregation import (
    SKETCH_SIZE,
    adaptive_weights,
    pairwise_distances,
)
from pilot_flwr.flower.messages import decode_update
from pilot_flwr.run.aggregations import read_matrices
from pilot_flwr.run.events import Aggregated

SKETCHED = (
    f"{SMALL} data.tasks=[vqa,counting] evaluation.enabled=false strategy.distances=sketch seed=5"
)


def matrices(federation):
    """Return the recorded matrices of all exchanges."""
    events = [e for e in federation.folder.events if isinstance(e, Aggregated)]
    return [read_matrices(federation.folder.path, event) for event in events]


def test_most_neighbours_of_real_loras_are_the_exact_ones(tmp_path):
    """Eight clients that train. At random, 2 of 7 neighbours would be right: 29 %."""
    federation = Federation(
        tmp_path, f"{SKETCHED} data.clients_per_task=4 data.train_examples=4 strategy.rounds=1"
    ).run()
    updates = [decode_update(reply.content) for reply in federation.replies("train")]
    shares = []
    for number, found in enumerate(matrices(federation), start=1):
        mine = sorted((u for u in updates if u.server_round == number), key=lambda u: u.client)
        assert [u.client for u in mine] == list(found.clients)
        exact = pairwise_distances([u.lora for u in mine])
        pairs = np.triu_indices(len(mine), 1)
        ratios = found.distances[pairs] / exact[pairs]
        assert np.all(ratios != 1)
        assert np.abs(ratios**2 - 1).max() < 6 * (2 / SKETCH_SIZE) ** 0.5
        wanted = adaptive_weights(exact, [1] * len(mine), 2, self_weight=False) > 0
        others = found.weights * (1 - np.eye(len(mine))) > 0
        shares.append((wanted & others).sum() / wanted.sum())
    assert len(shares) == 2
    assert np.mean(shares) > 0.75


def test_a_resumed_run_has_the_same_sketches(tmp_path):
    overrides = f"{SKETCHED} data.clients_per_task=2 strategy.rounds=2"
    with quick_training():
        whole = Federation(tmp_path / "whole", overrides).run()
        second = resumed(tmp_path / "run", overrides, exchange=2)
    assert_same_state(second.strategy.state, whole.strategy.state)
    later = matrices(whole)[1:]
    for mine, theirs in zip(matrices(second)[-2:], later, strict=True):
        np.testing.assert_array_equal(mine.distances, theirs.distances)
    assert not np.array_equal(later[0].distances, later[1].distances)
