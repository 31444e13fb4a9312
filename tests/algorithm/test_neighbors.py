"""The number of neighbours that distances choose, against vectors and what must hold for it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pilot_flwr.algorithm.aggregation import LORA_RULES, adaptive_weights, pairwise_distances
from pilot_flwr.algorithm.neighbors import closest_mean_neighbors
from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import UpdateError

SEEDS = st.integers(0, 2**32 - 1)


def naive(vectors):
    """The best M of every client, from means of the vectors themselves."""
    chosen = []
    for k, own in enumerate(vectors):
        others = [v for j, v in enumerate(vectors) if j != k]
        others.sort(key=lambda v: np.linalg.norm(own - v))
        errors = [np.linalg.norm(own - np.mean(others[:m], axis=0)) for m in range(1, len(vectors))]
        chosen.append(1 + int(np.argmin(errors)))
    return chosen


def distances_of(vectors):
    return pairwise_distances([{"w": v} for v in vectors])


def random_distances(count, seed):
    return distances_of(np.random.default_rng(seed).standard_normal((count, 5)))


def clusters(sizes, *, apart, seed, width=20_000):
    """Clients with noise of length 1 around centres at a distance `apart` from each other."""
    rng = np.random.default_rng(seed)
    centres = apart / np.sqrt(2) * np.eye(len(sizes), width)
    return np.repeat(centres, sizes, axis=0) + rng.standard_normal((sum(sizes), width)) / width**0.5


@given(st.integers(2, 12), st.integers(1, 6), st.floats(0, 4), SEEDS)
def test_the_mean_of_the_chosen_neighbours_is_the_closest(count, width, apart, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, width)) + apart * rng.integers(0, 2, (count, 1))
    assert closest_mean_neighbors(distances_of(vectors)).tolist() == naive(vectors)


@pytest.mark.parametrize("apart", [3, 1000])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 9), (5, 4), (3, 3, 3)], ids=str)
def test_clients_of_distant_clusters_have_their_own_as_neighbours(sizes, apart):
    distances = distances_of(clusters(sizes, apart=apart, seed=len(sizes)))
    found = closest_mean_neighbors(distances)
    assert found.tolist() == [size - 1 for size in sizes for _ in range(size)]
    counts = np.random.default_rng(0).integers(1, 200, sum(sizes))
    mixed = adaptive_weights(distances, counts, found.tolist()) > 0
    cluster = np.repeat(range(len(sizes)), sizes)
    assert_array_equal(mixed, cluster[:, None] == cluster)


@pytest.mark.parametrize("count", [2, 3, 9, 60])
def test_clients_that_are_alike_are_all_neighbours(count):
    everyone = [count - 1] * count
    for distance in (1.0, 0.0):  # identical clients, too
        found = closest_mean_neighbors(np.where(np.eye(count), 0, distance))
        assert found.tolist() == everyone


@pytest.mark.parametrize("clients", [3, 5])
def test_where_neighbours_of_other_tasks_begin_to_help(clients):
    """Three tasks of m clients with noise 1 and centres at a distance b.

    The m - 1 of the own task err by 1 + 1 / (m - 1). All 3 m - 1 err by 1 + 1 / (3 m - 1) plus the
    square of the mean's bias, two centres' share m / (3 m - 1) each: 3 b^2 (m / (3 m - 1))^2.
    """
    few, many = clients - 1, 3 * clients - 1
    equal = np.sqrt((1 / few - 1 / many) / 3) * many / clients
    below, above = (
        closest_mean_neighbors(distances_of(clusters([clients] * 3, apart=b, seed=1))).mean()
        for b in (0.5 * equal, 2 * equal)
    )
    assert below > many - 1 and above < few + 0.5


@given(st.integers(2, 9), SEEDS, st.randoms(use_true_random=False))
def test_a_permutation_of_the_clients_permutes_the_numbers(count, seed, random):
    distances = random_distances(count, seed)
    order = random.sample(range(count), count)
    permuted = closest_mean_neighbors(distances[np.ix_(order, order)])
    assert_array_equal(permuted, closest_mean_neighbors(distances)[order])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 3, 1, 2], [0, 2, 3, 1]], ids=str)
def test_clients_at_the_same_distance_are_neighbours_together(order):
    """The mean of the first two alone is at a distance of 1 / sqrt(2), of 1 and 3 of 0."""
    line = np.array([[0, 1, 1, 1], [1, 0, np.sqrt(2), 2], [1, np.sqrt(2), 0, np.sqrt(2)],
                     [1, 2, np.sqrt(2), 0]])  # fmt: skip
    assert closest_mean_neighbors(line[np.ix_(order, order)])[0] == 3


@given(st.integers(1, 9), SEEDS, st.sampled_from([2.0**-600, 2.0**-9, 2.0**600]))
def test_the_unit_of_the_distances_does_not_matter(count, seed, factor):
    distances = random_distances(count, seed)
    found = closest_mean_neighbors(factor * distances)
    assert_array_equal(found, closest_mean_neighbors(distances))


def test_one_client_is_its_own_mixture():
    found = closest_mean_neighbors(np.zeros((1, 1)))
    assert_array_equal(adaptive_weights(np.zeros((1, 1)), [5], found.tolist()), [[1]])


def test_a_client_far_from_all_others_is_nobodys_neighbour():
    vectors = clusters([8], apart=0, seed=3)
    vectors[5] += 100
    found = closest_mean_neighbors(distances_of(vectors))
    mixed = adaptive_weights(distances_of(vectors), [1] * 5 + [1000, 1, 1], found.tolist()) > 0
    assert np.delete(mixed[:, 5], 5).sum() == 0
    assert np.delete(np.delete(mixed, 5, 0), 5, 1).mean() > 0.9


@given(st.integers(1, 9), SEEDS)
def test_weights_of_different_numbers_are_the_rows_of_each_number(count, seed):
    rng = np.random.default_rng(seed)
    distances, counts = random_distances(count, seed), rng.integers(1, 99, count)
    numbers = rng.integers(1, count + 2, count).tolist()
    weights = adaptive_weights(distances, counts, numbers)
    assert_allclose(weights.sum(axis=1), 1, rtol=1e-14)
    for row, number, k in zip(weights, numbers, range(count), strict=True):
        expected = adaptive_weights(distances, counts, number)[k]
        assert_allclose(row, expected, rtol=1e-14)
        assert_array_equal(row > 0, expected > 0)


def test_the_setting_chooses_the_rule():
    distances, counts = distances_of(clusters([3, 4], apart=10, seed=0)), [5, 4, 3, 2, 1, 9, 7]
    weights = {
        name: LORA_RULES["adaptive"].weights(
            distances, ["x"] * 7, counts, load_config(f"strategy={name}").strategy
        )
        for name in ("pilot", "pilot_auto")
    }
    assert_array_equal(weights["pilot"], adaptive_weights(distances, counts, 2))
    assert_array_equal(
        weights["pilot_auto"], adaptive_weights(distances, counts, [2] * 3 + [3] * 4)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_distances(bad):
    distances = 1.0 - np.eye(3)
    distances[0, 2] = bad
    with pytest.raises(UpdateError, match="must be finite and not negative"):
        closest_mean_neighbors(distances)
    with pytest.raises(UpdateError, match="must be square"):
        closest_mean_neighbors(np.ones((2, 3)))
