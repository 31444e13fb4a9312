"""Who is averaged with whom, and what clients that did not reply have afterwards."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.algorithm.aggregation import (
    adaptive_weights,
    group_weights,
    mix,
    pairwise_distances,
)
from pilot_flwr.algorithm.server_state import InitialState, ServerState
from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import Member, Update

CLIENTS = {"x-0": 3, "x-1": 5, "y-0": 2, "y-1": 7}
"""Client → examples; its task is its first letter."""


def lora(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "q.lora_A": torch.randn(2, 5, generator=generator),
        "q.lora_B": torch.randn(4, 2, generator=generator),
    }


def update(client, server_round=1, **parts):
    seed = 10 * server_round + list(CLIENTS).index(client)
    own = {"adapter": {"w": torch.full((3,), float(seed))}, "lora": lora(seed), **parts}
    return Update(client, client[0], server_round, CLIENTS[client], **own)


def server(**parts):
    initial = {"adapter": {"w": torch.zeros(3)}, "lora": lora(0), **parts}
    return ServerState(("x", "y"), InitialState(**initial))


def method(name, overrides=""):
    return load_config(f"strategy={name} {overrides}").strategy


def by_flower(updates, part):
    """The same mean by Flower's own FedAvg."""
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({n: Array(t.numpy()) for n, t in getattr(u, part).items()}),
                "metrics": MetricRecord({"n": u.num_examples}),
            }
        )
        for u in updates
    ]
    return {n: array.numpy() for n, array in aggregate_arrayrecords(records, "n").items()}


def assert_close(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_fedit_is_flowers_fedavg_over_all_clients():
    state, updates = server(), [update(client) for client in CLIENTS]
    done = state.aggregate(updates, method("fedit"))
    for task in "xy":
        assert_close(state.adapters[task], by_flower(updates, "adapter"))
    for client in CLIENTS:
        assert_close(state.loras[client], by_flower(updates, "lora"))
    assert done.tasks == {"all-tasks": list(CLIENTS)}
    assert done.clients == sorted(CLIENTS)
    np.testing.assert_allclose(done.neighbors[0], [CLIENTS[c] / 17 for c in done.clients])


def test_fedavg_per_task_is_flowers_fedavg_within_a_task():
    state, updates = server(), [update(client) for client in CLIENTS]
    done = state.aggregate(updates, method("fedavg_per_task"))
    for task in "xy":
        own = [u for u in updates if u.task == task]
        assert_close(state.adapters[task], by_flower(own, "adapter"))
        for client in (u.client for u in own):
            assert_close(state.loras[client], by_flower(own, "lora"))
    np.testing.assert_allclose(done.neighbors[0], [3 / 8, 5 / 8, 0, 0])


@pytest.mark.parametrize(
    ("name", "gets_the_new_one"),
    [("fedit", True), ("fedavg_per_task", True), ("fedex_lora", True), ("pilot", False)],
)
def test_a_client_that_did_not_reply(name, gets_the_new_one):
    """Where a LoRA is shared it has the new one, as every other; a personal one is kept."""
    state = server()
    state.aggregate([update(client) for client in CLIENTS], method(name))
    before = state.lora_for("x-1", "x")
    state.aggregate([update("x-0", 2), update("y-0", 2), update("y-1", 2)], method(name))
    after, others = state.lora_for("x-1", "x"), state.lora_for("x-0", "x")
    assert all(torch.equal(after[n], (others if gets_the_new_one else before)[n]) for n in after)
    assert not torch.equal(after["q.lora_B"], (before if gets_the_new_one else others)["q.lora_B"])


def test_one_mean_of_all_adapters_is_also_that_of_a_task_without_a_reply():
    state = server()
    state.aggregate([update("x-0"), update("x-1")], method("pilot_global_adapters"))
    assert torch.equal(state.adapters["y"]["w"], state.adapters["x"]["w"])
    per_task = server()
    per_task.aggregate([update("x-0"), update("x-1")], method("pilot"))
    assert torch.equal(per_task.adapters["y"]["w"], torch.zeros(3))


def test_a_round_in_which_nothing_is_shared_changes_nothing_but_the_count():
    state = server(adapter={}, lora={})
    done = state.aggregate([update("x-0", adapter={}, lora={})], method("local"))
    assert (done.clients, done.tasks, done.neighbors, done.distances) == (["x-0"], {}, None, None)
    assert (state.rounds, state.task_of, state.lora_for("x-0", "x")) == (1, {"x-0": "x"}, {})
    assert state.lora_for("x-1", "x") == {}


def test_with_one_stage_there_is_no_second():
    state, member = server(), Member("x-0", "x", 3, stage_trained=1)
    assert [state.stage_for(member, stages) for stages in (1, 2)] == [1, 1]
    state.aggregate([update("x-0")], method("pilot"))
    assert [state.stage_for(member, stages) for stages in (1, 2)] == [1, 2]


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 1000)), min_size=1, max_size=7))
def test_group_weights_are_shares_of_examples_within_the_group(clients):
    groups, examples = zip(*clients, strict=True)
    weights = group_weights(groups, examples)
    for k, group in enumerate(groups):
        total = sum(n for g, n in clients if g == group)
        naive = [n / total if g == group else 0 for g, n in clients]
        np.testing.assert_allclose(weights[k], naive, rtol=1e-14)


def test_group_weights_need_examples():
    with pytest.raises(UpdateError, match="client 1: .* must be positive"):
        group_weights(["x", "x"], [1, 0])


@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_without_self_weight_the_neighbours_share_is_as_with_it(count, neighbours, seed):
    """W'_kj = W_kj / (1 − W_kk): the client's own part is left out and nothing else."""
    rng = np.random.default_rng(seed)
    states = [{"w": rng.standard_normal(5)} for _ in range(count)]
    examples = rng.integers(1, 100, count).tolist()
    distances = pairwise_distances(states)
    whole = adaptive_weights(distances, examples, neighbours)
    without = adaptive_weights(distances, examples, neighbours, self_weight=False)
    own = np.diag(np.diag(whole))
    np.testing.assert_allclose(without, (whole - own) / (1 - own.sum(axis=1))[:, None], rtol=1e-9)
    assert not without.diagonal().any()


def test_without_self_weight_and_without_neighbours_a_client_keeps_its_own():
    assert adaptive_weights(np.zeros((1, 1)), [3], 2, self_weight=False) == [[1]]


def test_clients_with_equal_weights_share_one_mixture():
    states = [{"w": np.arange(4.0) + k} for k in range(4)]
    mixed = mix(states, group_weights(["b", "a", "b", "a"], [1, 2, 3, 4]))
    assert mixed[0] is mixed[2] and mixed[1] is mixed[3]
    np.testing.assert_allclose(mixed[0]["w"], np.arange(4) + 6 / 4)
    np.testing.assert_allclose(mixed[1]["w"], np.arange(4) + (2 * 1 + 4 * 3) / 6)
