"""The groups of clients that distances choose, against vectors and what must hold for them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pilot_flwr.algorithm.aggregation import LORA_RULES, adaptive_weights, pairwise_distances
from pilot_flwr.algorithm.neighbors import grouped_neighbors
from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import UpdateError

SEEDS = st.integers(0, 2**32 - 1)


def error(vectors, members):
    """The squared distances of the members to the mean of the others, or to the nearest client."""
    if len(members) == 1:
        (k,) = members
        return min(np.sum((vectors[k] - v) ** 2) for j, v in enumerate(vectors) if j != k)
    means = {k: np.mean([vectors[j] for j in members if j != k], axis=0) for k in members}
    return sum(np.sum((vectors[k] - mean) ** 2) for k, mean in means.items())


def naive(vectors):
    """Join the two closest clusters again and again; keep a join that does not raise the error."""
    clusters = [([k], [[k]]) for k in range(len(vectors))]
    while len(clusters) > 1:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]

        def mean_square(pair):
            ones, others = clusters[pair[0]][0], clusters[pair[1]][0]
            return np.mean([np.sum((vectors[i] - vectors[j]) ** 2) for i in ones for j in others])

        a, b = min(pairs, key=mean_square)
        (one, its_groups), (other, their_groups) = clusters.pop(a), clusters.pop(b)
        apart = sum(error(vectors, group) for group in its_groups + their_groups)
        together = error(vectors, one + other) <= apart * (1 + 1e-9)
        groups = [one + other] if together else its_groups + their_groups
        clusters.append((one + other, groups))
    return sorted(sorted(group) for group in clusters[0][1])


def neighbors_in(groups, distances):
    """Whether j is another client of k's group, or the nearest of a client alone."""
    found = np.zeros(distances.shape, dtype=bool)
    for group in groups:
        for k in group:
            others = [j for j in group if j != k]
            alone = np.where(np.arange(len(distances)) == k, np.inf, distances[k]).argmin()
            found[k, others or [alone]] = True
    return found


def distances_of(vectors):
    return pairwise_distances([{"w": v} for v in vectors])


def random_distances(count, seed):
    return distances_of(np.random.default_rng(seed).standard_normal((count, 5)))


def clusters(sizes, *, apart, seed, width=20_000):
    """Clients with noise of length 1 around centres at a distance `apart` from each other."""
    rng = np.random.default_rng(seed)
    centres = apart / np.sqrt(2) * np.eye(len(sizes), width)
    return np.repeat(centres, sizes, axis=0) + rng.standard_normal((sum(sizes), width)) / width**0.5


@given(st.integers(2, 9), st.integers(1, 6), st.floats(0, 4), SEEDS)
def test_groups_are_those_whose_members_predict_each_other_best(count, width, apart, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, width)) + apart * rng.integers(0, 2, (count, 1))
    distances = distances_of(vectors)
    assert_array_equal(grouped_neighbors(distances), neighbors_in(naive(vectors), distances))


@pytest.mark.parametrize("apart", [3, 1000])
@pytest.mark.parametrize("sizes", [(1, 5), (2, 2), (2, 30), (5, 4), (1, 3, 9, 2)], ids=str)
def test_distant_clusters_of_any_size_are_the_groups(sizes, apart):
    distances = distances_of(clusters(sizes, apart=apart, seed=len(sizes)))
    groups = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    expected = neighbors_in([group.tolist() for group in groups], distances)
    found = grouped_neighbors(distances)
    assert_array_equal(found, expected)
    weights = adaptive_weights(distances, [3] * sum(sizes), found)
    assert_array_equal(weights > 0, expected | np.eye(sum(sizes), dtype=bool))


@pytest.mark.parametrize("count", [2, 3, 9, 60])
def test_clients_that_are_alike_are_all_neighbours(count):
    others = ~np.eye(count, dtype=bool)
    for distances in (1.0 * others, 0.0 * others, distances_of(clusters([count], apart=0, seed=0))):
        assert_array_equal(grouped_neighbors(distances), others)


@pytest.mark.parametrize(("count", "width"), [(9, 50), (100, 300)])
def test_noise_of_few_dimensions_makes_small_groups(count, width):
    """Clients of one kind are close by chance then: a limit that the method's page tells."""
    few, many = (
        grouped_neighbors(distances_of(clusters([count], apart=0, seed=0, width=dimensions)))
        for dimensions in (10, width)
    )
    assert few.sum(axis=1).mean() < 4 and many.sum() == count * (count - 1)


@pytest.mark.parametrize("clients", [3, 5, 20])
def test_where_tasks_become_one_group(clients):
    """Three tasks of m clients with noise 1 and centres at a distance b.

    The m - 1 of the own task err by 1 + 1 / (m - 1). All 3 m - 1 err by 1 + 1 / (3 m - 1) plus the
    square of the mean's bias, two centres' share m / (3 m - 1) each: 3 b^2 (m / (3 m - 1))^2.
    """
    few, many = clients - 1, 3 * clients - 1
    equal = np.sqrt((1 / few - 1 / many) / 3) * many / clients
    below, above = (
        grouped_neighbors(distances_of(clusters([clients] * 3, apart=b, seed=1))).sum(axis=1)
        for b in (0.9 * equal, 1.1 * equal)
    )
    assert set(below) == {many} and set(above) == {few}


@given(st.integers(1, 9), SEEDS, st.randoms(use_true_random=False))
def test_a_permutation_of_the_clients_permutes_the_groups(count, seed, random):
    distances = random_distances(count, seed)
    order = np.ix_(*[random.sample(range(count), count)] * 2)
    assert_array_equal(grouped_neighbors(distances[order]), grouped_neighbors(distances)[order])


@given(st.integers(1, 9), SEEDS, st.sampled_from([2.0**-600, 2.0**-9, 2.0**600]))
def test_the_unit_of_the_distances_does_not_matter(count, seed, factor):
    distances = random_distances(count, seed)
    assert_array_equal(grouped_neighbors(factor * distances), grouped_neighbors(distances))


def test_one_client_is_its_own_mixture():
    found = grouped_neighbors(np.zeros((1, 1)))
    assert_array_equal(adaptive_weights(np.zeros((1, 1)), [5], found), [[1]])


def test_a_client_far_from_all_others_is_nobodys_neighbour():
    vectors = clusters([8], apart=0, seed=3)
    vectors[5] += 100
    found = grouped_neighbors(distances_of(vectors))
    assert not found[:, 5].any() and found[5].sum() == 1
    assert set(np.delete(found.sum(axis=1), 5)) == {6}


@given(st.integers(2, 9), SEEDS)
def test_weights_of_given_neighbours_are_the_formula(count, seed):
    rng = np.random.default_rng(seed)
    distances, counts = random_distances(count, seed), rng.integers(1, 99, count)
    neighbors = (rng.random((count, count)) < 0.5) & ~np.eye(count, dtype=bool)
    neighbors[range(count), np.roll(range(count), 1)] = True
    weights = adaptive_weights(distances, counts, neighbors)
    for k, row in enumerate(neighbors):
        inverse = {j: 1 / distances[k, j] for j in np.flatnonzero(row)}
        shares = {j: counts[j] * w / sum(inverse.values()) for j, w in inverse.items()}
        shares[k] = counts[k]
        expected = [shares.get(j, 0) / sum(shares.values()) for j in range(count)]
        assert_allclose(weights[k], expected, rtol=1e-12)


def test_an_identical_client_elsewhere_takes_no_weight():
    distances = np.array([[0, 0, 1, 2], [0, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]], dtype=float)
    neighbors = np.zeros((4, 4), dtype=bool)
    neighbors[[0, 0, 1, 2, 3], [2, 3, 0, 3, 2]] = True
    weights = adaptive_weights(distances, [1, 1, 1, 1], neighbors)
    assert_allclose(weights[0], [1 / 2, 0, 1 / 3, 1 / 6])


def test_the_setting_chooses_the_rule():
    distances, counts = distances_of(clusters([3, 4], apart=10, seed=0)), [5, 4, 3, 2, 1, 9, 7]
    weights = {
        name: LORA_RULES["adaptive"].weights(
            distances, ["x"] * 7, counts, load_config(f"strategy={name}").strategy
        )
        for name in ("pilot", "pilot_auto")
    }
    assert_array_equal(weights["pilot"], adaptive_weights(distances, counts, 2))
    grouped = adaptive_weights(distances, counts, grouped_neighbors(distances))
    assert_array_equal(weights["pilot_auto"], grouped)
    assert (grouped > 0).sum(axis=1).tolist() == [3] * 3 + [4] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_distances(bad):
    distances = 1.0 - np.eye(3)
    distances[0, 2] = bad
    with pytest.raises(UpdateError, match="must be finite and not negative"):
        grouped_neighbors(distances)
    with pytest.raises(UpdateError, match="must be square"):
        grouped_neighbors(np.ones((2, 3)))
