"""Properties that every aggregation must have, whatever the clients send."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pilot_flwr.algorithm.aggregation import (
    adaptive_weights,
    mix,
    pairwise_distances,
    task_aware_average,
    weighted_average,
)
from pilot_flwr.errors import UpdateError

DTYPES = st.sampled_from([np.float16, np.float32, np.float64])
State = dict[str, np.ndarray]


@st.composite
def clients(draw: st.DrawFn, smallest: int = 1) -> tuple[list[State], list[int]]:
    """Draw K states of two tensors, some of them copies of others, and numbers of examples."""
    count = draw(st.integers(smallest, 7))
    dtype = draw(DTYPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset = draw(st.sampled_from([0.0, 1.0, 1000.0]))
    shapes = {"a": (draw(st.integers(1, 5)), 3), "b": (draw(st.integers(1, 40)),)}
    base = {name: offset * rng.standard_normal(shape) for name, shape in shapes.items()}
    distinct = [
        {n: (b + rng.standard_normal(b.shape)).astype(dtype) for n, b in base.items()}
        for _ in range(count)
    ]
    origin = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    numbers = draw(st.lists(st.integers(1, 10_000), min_size=count, max_size=count))
    return [distinct[k] for k in origin], numbers


def stack(states: list[State]) -> np.ndarray:
    """Return a (K, P) matrix, float64."""
    rows = [np.concatenate([s["a"].ravel(), s["b"].ravel()]) for s in states]
    return np.array(rows, dtype=np.float64)


def eps(states: list[State]) -> float:
    return float(np.finfo(states[0]["a"].dtype).eps)


@given(clients(), st.integers(1, 9))
def test_rows_are_a_distribution_over_the_client_and_its_neighbours(drawn, neighbours) -> None:
    states, counts = drawn
    weights = adaptive_weights(pairwise_distances(states), counts, neighbours)
    assert np.all(weights >= 0) and np.all(weights.diagonal() > 0)
    assert_allclose(weights.sum(axis=1), 1, rtol=1e-14)
    assert np.all((weights > 0).sum(axis=1) <= 1 + min(neighbours, len(states) - 1))


@given(clients(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_permutation_of_the_clients_permutes_the_results(drawn, neighbours, random) -> None:
    states, counts = drawn
    order = random.sample(range(len(states)), len(states))
    permuted, numbers = [states[k] for k in order], [counts[k] for k in order]
    distances = pairwise_distances(states)
    assert_allclose(pairwise_distances(permuted), distances[np.ix_(order, order)], rtol=1e-9)
    # The order decides between ties, and so between copies of a client: use all neighbours there.
    tied = np.any(distances[~np.eye(len(states), dtype=bool)] == 0)
    neighbours = len(states) if tied else neighbours
    weights = adaptive_weights(distances, counts, neighbours)
    permuted_weights = adaptive_weights(pairwise_distances(permuted), numbers, neighbours)
    assert_allclose(permuted_weights, weights[np.ix_(order, order)], rtol=1e-8)
    # A last bit may differ, as the weights do (by 1e-8 at most) and the order of the sums.
    values = stack(states)
    tolerance = eps(states) * np.abs(values).max() + 1e-8 * np.ptp(values, axis=0).max()
    expected = stack(mix(states, weights))[order]
    assert_allclose(stack(mix(permuted, permuted_weights)), expected, rtol=0, atol=tolerance)
    mean, permuted_mean = weighted_average(states, counts), weighted_average(permuted, numbers)
    assert_allclose(stack([permuted_mean]), stack([mean]), rtol=0, atol=tolerance)


@given(clients(), st.integers(0, 2**32 - 1))
def test_results_lie_inside_the_hull_of_the_clients(drawn, seed) -> None:
    states, counts = drawn
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(len(states), 0.3), len(states))
    values = stack(states)
    # Rounding is monotone and the hull's ends are representable: a narrow result is inside exactly.
    slack = 1e-14 * np.abs(values).max() if eps(states) < 1e-15 else 0
    for result in (*mix(states, weights), weighted_average(states, counts)):
        point = stack([result])[0]
        assert np.all(point >= values.min(axis=0) - slack)
        assert np.all(point <= values.max(axis=0) + slack)


@given(clients(), st.integers(1, 9), st.integers(1, 7))
def test_identical_clients_keep_every_bit(drawn, neighbours, copies) -> None:
    states = [drawn[0][0]] * copies
    counts = (drawn[1] * copies)[:copies]
    states[0]["b"][0] = -0.0
    distances = pairwise_distances(states)
    assert_array_equal(distances, 0)
    mixed = mix(states, adaptive_weights(distances, counts, neighbours))
    averages = task_aware_average(states, ["t"] * copies, counts)
    for result in (*mixed, averages["t"], weighted_average(states, counts)):
        for name, value in states[0].items():
            assert result[name].tobytes() == value.tobytes()


@given(clients())
def test_only_identical_clients_are_at_distance_zero(drawn) -> None:
    values = stack(drawn[0])
    identical = np.array([[np.array_equal(a, b) for b in values] for a in values])
    assert_array_equal(pairwise_distances(drawn[0]) == 0, identical)


@given(clients())
def test_distances_are_a_metric(drawn) -> None:
    distances = pairwise_distances(drawn[0])
    assert_array_equal(distances, distances.T)
    through = distances[:, :, None] + distances[None, :, :]  # d_ij + d_jk
    assert np.all(distances <= through.min(axis=1) * (1 + 1e-12))


@given(clients(), st.floats(1e-3, 1e3), st.integers(1, 9))
def test_weights_depend_on_ratios_only(drawn, factor, neighbours) -> None:
    states, counts = drawn
    distances = pairwise_distances(states)
    weights = adaptive_weights(distances, counts, neighbours)
    scaled = adaptive_weights(2.0**40 * distances, [factor * n for n in counts], neighbours)
    assert_allclose(scaled, weights, rtol=1e-12)


@given(clients(), st.integers(0, 5))
def test_as_many_neighbours_as_clients_or_more_means_all_others(drawn, extra) -> None:
    states, counts = drawn
    distances = pairwise_distances(states)
    everyone = adaptive_weights(distances, counts, max(1, len(states) - 1))
    assert_array_equal(adaptive_weights(distances, counts, len(states) + extra), everyone)


@given(clients())
def test_equal_distances_give_the_average_with_halved_neighbours(drawn) -> None:
    _, counts = drawn
    count = len(counts)
    weights = adaptive_weights(1.0 - np.eye(count), counts, count)
    for k in range(count):
        share = 1 / max(1, count - 1)
        row = np.array([n * (1.0 if j == k else share) for j, n in enumerate(counts)])
        assert_allclose(weights[k], row / row.sum(), rtol=1e-13)


@given(clients(), st.data())
def test_each_task_sees_its_own_clients_alone(drawn, data) -> None:
    states, counts = drawn
    names = st.lists(st.sampled_from("xyz"), min_size=len(states), max_size=len(states))
    tasks = data.draw(names)
    averages = task_aware_average(states, tasks, counts)
    assert set(averages) == set(tasks)
    for task, average in averages.items():
        members = [k for k, t in enumerate(tasks) if t == task]
        alone = weighted_average([states[k] for k in members], [counts[k] for k in members])
        assert_array_equal(stack([average]), stack([alone]))


@settings(max_examples=50)
@given(clients(smallest=2), st.data())
def test_one_bad_client_is_named(drawn, data) -> None:
    states = [{name: value.copy() for name, value in state.items()} for state in drawn[0]]
    client = data.draw(st.integers(1, len(states) - 1))
    damage = data.draw(st.sampled_from(["nan", "missing", "extra", "shape", "examples"]))
    counts = list(drawn[1])
    if damage == "nan":
        states[client]["a"][0, data.draw(st.integers(0, 2))] = np.nan
    elif damage == "missing":
        del states[client]["b"]
    elif damage == "extra":
        states[client]["c"] = states[client]["b"]
    elif damage == "shape":
        states[client]["a"] = states[client]["a"][:, :2]
    else:
        counts[client] = 0
    for run in (
        lambda: weighted_average(states, counts),
        lambda: task_aware_average(states, ["t"] * len(states), counts),
        lambda: mix(states, adaptive_weights(pairwise_distances(states), counts, 2)),
    ):
        with pytest.raises(UpdateError, match=f"client {client}: "):
            run()
