"""Distances estimated from sketches: their error, and what must hold exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pilot_flwr.algorithm.aggregation import (
    SKETCH_SIZE,
    adaptive_weights,
    pairwise_distances,
    sketched_distances,
)
from pilot_flwr.algorithm.arrays import sketch
from pilot_flwr.errors import UpdateError

State = dict[str, np.ndarray]


def make_states(count: int, parameters: int, seed: int = 0, scale: float = 1) -> list[State]:
    rng = np.random.default_rng(seed)
    base = 100 * rng.standard_normal(parameters)
    points = base + scale * rng.standard_normal((count, parameters))
    half = parameters // 2
    return [{"a": p[:half].astype(np.float32), "b": p[half:].astype(np.float32)} for p in points]


def naive_sketch(states: list[State], size: int, seed: int) -> np.ndarray:
    """The same matrix C, built in full and multiplied."""
    rng = np.random.default_rng(seed)
    rows = []
    for value in states[0].values():
        for start in range(0, value.size, size):
            width = min(size, value.size - start)
            signs, first = rng.integers(0, 2, width), rng.integers(size)
            for place in range(width):
                row = np.zeros(size)
                row[(first + place) % size] = -1 if signs[place] else 1
                rows.append(row)
    stacked = np.stack([np.concatenate([v.ravel() for v in s.values()]) for s in states])
    stacked = stacked.astype(np.float64)
    return (stacked - stacked[0]) @ np.stack(rows)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_sketch_is_the_product_with_a_matrix_of_signs(size: int) -> None:
    states = make_states(4, 301)
    found = sketch(states, size, np.random.default_rng(5))
    assert_allclose(found, naive_sketch(states, size, 5), rtol=1e-9, atol=1e-9)
    assert_array_equal(found[0], 0)


def test_squared_distances_are_unbiased_with_the_stated_variance() -> None:
    """200 independent sketches of m = 64 sums; the bound on the variance is 2 / m."""
    size, draws = 64, 200
    rng = np.random.default_rng(1)
    sparse = np.zeros(3000)
    sparse[[5, 900, 2100]] = 1, 2, 3  # three values, which differ most from a dense vector
    for difference in (rng.standard_normal(3000), sparse):
        states = [{"a": np.zeros(3000)}, {"a": difference}]
        ratios = []
        for seed in range(draws):
            rows = sketch(states, size, np.random.default_rng([3, seed]))
            ratios.append(np.sum((rows[1] - rows[0]) ** 2) / np.sum(difference**2))
        # Five standard errors of the mean, and of the variance with a kurtosis up to 12.
        assert abs(np.mean(ratios) - 1) < 5 * (2 / size / draws) ** 0.5
        assert np.var(ratios) < 2 / size * (1 + 5 * (11 / draws) ** 0.5)


def test_distances_are_within_the_stated_error_of_the_exact_ones() -> None:
    states = make_states(30, 40_000)
    exact, found = pairwise_distances(states), sketched_distances(states, seed=[0])
    pairs = np.triu_indices(30, 1)
    errors = found[pairs] ** 2 / exact[pairs] ** 2 - 1
    assert 0 < np.sqrt(np.mean(errors**2)) < 1.5 * (2 / SKETCH_SIZE) ** 0.5
    assert np.abs(errors).max() < 6 * (2 / SKETCH_SIZE) ** 0.5
    assert_array_equal(found, found.T)
    assert_array_equal(found.diagonal(), 0)


def test_a_common_offset_changes_nothing() -> None:
    """Offsets are powers of two, so that adding them rounds nothing."""
    rng = np.random.default_rng(2)
    points = rng.integers(-1000, 1000, (6, 20_000)) / 1024
    offset = 2.0 ** rng.integers(0, 20, 20_000)
    near, far = ([{"a": p} for p in points + o] for o in (0, offset))
    found = [sketched_distances(states, seed=[4]) for states in (near, far)]
    assert_allclose(found[0], found[1], rtol=1e-12)


def test_a_seed_gives_the_same_distances_and_another_seed_others() -> None:
    states = make_states(5, 20_000)
    first = sketched_distances(states, seed=[7, 2])
    assert_array_equal(sketched_distances(states, seed=[7, 2]), first)
    for other in ([7, 3], [8, 2]):
        assert np.all((sketched_distances(states, seed=other) != first) | np.eye(5, dtype=bool))


def test_identical_clients_are_at_distance_0() -> None:
    first, *others = make_states(4, 20_000)
    distances = sketched_distances([others[0], first, others[1], dict(first)], seed=[0])
    assert distances[1, 3] == 0
    assert_array_equal(distances[1], distances[3])
    assert np.count_nonzero(distances) == 16 - 4 - 2


def test_close_clients_far_from_the_first_keep_their_distances() -> None:
    centre = 1e6 * np.random.default_rng(3).standard_normal(20_000)
    close = make_states(3, 20_000, scale=1e-3)
    points = [np.concatenate([*s.values()]).astype(np.float64) for s in close]
    states = [{"a": np.zeros(20_000)}, *({"a": centre + p} for p in points)]
    exact = pairwise_distances(states)
    assert_allclose(sketched_distances(states, seed=[1]), exact, rtol=0.06)


def test_mapped_bfloat16_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 30_000, generator=generator).bfloat16()
    states = []
    for number, row in enumerate(values):
        path = str(tmp_path / f"{number}")
        tensor = torch.from_file(path, True, 30_000, dtype=torch.bfloat16)
        states.append({"a": tensor.copy_(row)})
    wide = [{"a": row.double().numpy()} for row in values]
    assert_array_equal(sketched_distances(states, seed=[6]), sketched_distances(wide, seed=[6]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    states = make_states(4, 20_000)
    states[2]["b"][17] = bad
    with pytest.raises(UpdateError, match="client 2: tensor `b` holds NaN or Inf"):
        sketched_distances(states, seed=[0])
    with pytest.raises(UpdateError, match="There is no client"):
        sketched_distances([], seed=[0])


def test_clear_neighbours_are_found() -> None:
    """Ten groups of three; a client is ten times closer to its group than to the others."""
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((10, 30_000)).repeat(3, axis=0)
    points = centres + 0.1 * rng.standard_normal((30, 30_000))
    states = [{"a": p.astype(np.float32)} for p in points]
    exact, found = pairwise_distances(states), sketched_distances(states, seed=[0])
    weights = [adaptive_weights(d, [1] * 30, 2) for d in (exact, found)]
    assert_array_equal(weights[0] > 0, weights[1] > 0)
    assert_allclose(weights[0], weights[1], atol=0.02)
