"""The aggregation equations against naive loops, and the inputs that they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pilot_flwr.algorithm import arrays
from pilot_flwr.algorithm.aggregation import (
    _components,
    adaptive_weights,
    mix,
    pairwise_distances,
    task_aware_average,
    weighted_average,
)
from pilot_flwr.errors import ConfigError, UpdateError

SHAPES = {"q.lora_A": (4, 33), "q.lora_B": (33, 4), "scale": ()}
DTYPES = [np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float32]

State = dict[str, np.ndarray]


def make_states(count: int, dtype: type = np.float32, seed: int = 0) -> list[State]:
    rng = np.random.default_rng(seed)
    return [
        {name: np.asarray(rng.standard_normal(s)).astype(dtype) for name, s in SHAPES.items()}
        for _ in range(count)
    ]


def as_dtype(states: list[State], dtype: object) -> list[dict]:
    if isinstance(dtype, torch.dtype):
        return [{n: torch.tensor(v).to(dtype) for n, v in s.items()} for s in states]
    return [{n: v.astype(dtype) for n, v in s.items()} for s in states]


def flat(state: dict) -> np.ndarray:
    """All elements as one longdouble vector."""
    parts = [torch.as_tensor(v).to(torch.float64).numpy().ravel() for v in state.values()]
    return np.concatenate(parts).astype(np.longdouble)


def naive_distances(states: list[dict]) -> np.ndarray:
    vectors = [flat(s) for s in states]
    return np.array([[np.sqrt(np.sum((a - b) ** 2)) for b in vectors] for a in vectors])


def naive_sum(states: list[dict], weights: np.ndarray) -> np.ndarray:
    total = np.zeros_like(flat(states[0]))
    for state, weight in zip(states, weights, strict=True):
        total += np.longdouble(weight) * flat(state)
    return total


def naive_ata(states: list[dict], counts: list[int], neighbours: int) -> list[np.ndarray]:
    """docs/explanation/method.md, section 4, word for word: N(k), w_kj, then the mixture."""
    distances, vectors = naive_distances(states), [flat(s) for s in states]
    mixtures = []
    for k in range(len(states)):
        ranked = sorted((distances[k, j], j) for j in range(len(states)) if j != k)[:neighbours]
        inverse_sum = sum(1 / d for d, _ in ranked)
        numerator, denominator = counts[k] * vectors[k], np.longdouble(counts[k])
        for d, j in ranked:
            w_kj = (1 / d) / inverse_sum
            numerator = numerator + counts[j] * w_kj * vectors[j]
            denominator = denominator + counts[j] * w_kj
        mixtures.append(numerator / denominator)
    return mixtures


def half_ulp(dtype: object) -> float:
    """Relative error of one rounding."""
    eps = torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) else np.finfo(dtype).eps
    return float(eps) / 2


@pytest.mark.parametrize("neighbours", [1, 2, 3, 4, 5, 9])
def test_ata_is_the_formula_of_the_design(neighbours: int) -> None:
    states, counts = make_states(5), [10, 250, 31, 7, 90]
    weights = adaptive_weights(pairwise_distances(states), counts, neighbours)
    mixed = mix(states, weights)
    assert (weights > 0).sum() == 5 * (1 + min(neighbours, 4))
    for state, expected in zip(mixed, naive_ata(states, counts, neighbours), strict=True):
        assert_allclose(flat(state), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_summed_wide_and_rounded_once(dtype: object) -> None:
    states, counts = as_dtype(make_states(6), dtype), [3, 1, 4, 1, 5, 9]
    weights = np.array(counts) / 23
    rows = np.tile(weights, (6, 1))
    results = [weighted_average(states, counts), *mix(states, rows)]
    for result in results:
        for name, value in states[0].items():
            assert type(result[name]) is type(value)
            assert result[name].dtype == value.dtype and result[name].shape == value.shape
        # Rounded once: half an ulp of the result (and the sum's 1e-15 of the largest operand).
        bound = half_ulp(dtype) * np.abs(naive_sum(states, weights)) * 1.0001 + 1e-14
        assert np.all(np.abs(flat(result) - naive_sum(states, weights)) <= bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances_of_every_dtype(dtype: object) -> None:
    states = as_dtype(make_states(5), dtype)
    distances = pairwise_distances(states)
    assert distances.dtype == np.float64
    assert_allclose(distances, naive_distances(states).astype(float), rtol=1e-12)


def test_tensors_that_span_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weights = make_states(5), np.random.default_rng(1).dirichlet(np.ones(5), 5)
    distances, mixed = pairwise_distances(states), mix(states, weights)
    monkeypatch.setattr("pilot_flwr.algorithm.arrays._BLOCK_ELEMENTS", 5 * 7)
    monkeypatch.setattr("pilot_flwr.algorithm.arrays._BLOCK_COLUMNS", 1)  # 132 = 18 * 7 + 6 columns
    assert_allclose(pairwise_distances(states), distances, rtol=1e-14)
    for one, many in zip(mixed, mix(states, weights), strict=True):
        assert_array_equal(flat(one), flat(many))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, torch.bfloat16], ids=str)
def test_rows_that_name_few_of_many_clients(dtype: object) -> None:
    count, rng = 40, np.random.default_rng(7)
    states = as_dtype(make_states(count), dtype)
    twin = {n: v.clone() if torch.is_tensor(v) else v.copy() for n, v in states[3].items()}
    states[11] = twin
    weights = np.zeros((count, count))
    for row in weights:
        row[rng.choice(count, rng.integers(1, 5), replace=False)] = rng.random() + 0.1
    weights[5] = np.eye(count)[8]
    weights[6] = 0.3 * np.eye(count)[3] + 0.7 * np.eye(count)[11]
    weights /= weights.sum(axis=1, keepdims=True)
    mixed = mix(states, weights)
    for row, state in zip(weights, mixed, strict=True):
        expected = naive_sum(states, row)
        bound = half_ulp(dtype) * np.abs(expected) * 1.0001 + 1e-14
        assert np.all(np.abs(flat(state) - expected) <= bound)
    # Clients with the same bits keep them, whatever the rest of the federation sent.
    assert_array_equal(flat(mixed[5]), flat(states[8]))
    assert_array_equal(flat(mixed[6]), flat(states[3]))


def test_nan_of_a_client_that_no_row_names_is_found() -> None:
    states = make_states(40)
    states[17]["q.lora_B"][2, 1] = np.nan
    weights = np.zeros((40, 40))
    weights[:, 4] = 1
    with pytest.raises(UpdateError, match="client 17: tensor `q.lora_B` holds NaN or Inf"):
        mix(states, weights)


def test_common_offset_costs_no_accuracy() -> None:
    rng = np.random.default_rng(2)
    base = 1000 * rng.standard_normal((64, 512))
    states = [{"a": (base + rng.standard_normal(base.shape)).astype(np.float32)} for _ in range(6)]
    assert_allclose(pairwise_distances(states), naive_distances(states).astype(float), rtol=1e-12)
    weights = rng.dirichlet(np.ones(6), 6)
    for row, state in zip(weights, mix(states, weights), strict=True):
        expected = naive_sum(states, row)
        assert np.max(np.abs(flat(state) - expected) / np.abs(expected)) <= 2**-24 * 1.0001


def test_tight_clusters_far_from_the_first_client() -> None:
    rng = np.random.default_rng(3)
    # Client 0 at the origin, a cluster at 1e6 with spread 1e-3, and inside it one of 1e-9.
    centre = 1e6 * rng.standard_normal(200)
    inner = centre + 1e-3 * rng.standard_normal(200)
    points = [np.zeros(200), centre]
    points += [centre + 1e-3 * rng.standard_normal(200) for _ in range(3)]
    points += [inner + 1e-9 * rng.standard_normal(200) for _ in range(3)]
    states = [{"a": p} for p in points]
    assert_allclose(pairwise_distances(states), naive_distances(states).astype(float), rtol=1e-9)


def test_an_outlier_matters_only_where_it_has_weight() -> None:
    states = make_states(4)
    states[0] = {n: np.full_like(value, 1e20) for n, value in states[0].items()}
    distances = pairwise_distances(states)
    assert_allclose(distances, naive_distances(states).astype(float), rtol=1e-9)
    weights = adaptive_weights(distances, [1] * 4, 2)
    assert_array_equal(weights[1:, 0], 0)
    for k in (1, 2, 3):
        expected = naive_sum(states[1:], weights[k, 1:])
        assert_allclose(flat(mix(states, weights)[k]), expected, rtol=1e-7, atol=1e-12)


def test_weights_leave_the_distances_as_they_are() -> None:
    distances = pairwise_distances(make_states(4))
    before = distances.copy()
    adaptive_weights(distances, [1] * 4, 2)
    assert_array_equal(distances, before)


def test_ties_go_to_the_lower_index() -> None:
    distances = np.array([[0, 2, 1, 1], [2, 0, 2, 2], [1, 2, 0, 3], [1, 2, 3, 0]], dtype=float)
    chosen = [adaptive_weights(distances, [1] * 4, m)[1].nonzero()[0].tolist() for m in (1, 2, 3)]
    assert chosen == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert adaptive_weights(distances, [1] * 4, 1)[0].nonzero()[0].tolist() == [0, 2]


def test_copies_of_a_client_are_at_equal_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = make_states(8)
    states = [others[0], first, others[1], *(dict(first) for _ in range(9)), *others[2:]]
    copies = [1, *range(3, 12)]
    rng = np.random.default_rng(4)

    def inexact_gram(states: list[State]) -> np.ndarray:  # a BLAS whose last digits depend on rows
        gram = arrays.centred_gram(states)
        return gram * (1 + 1e-13 * rng.standard_normal(gram.shape))

    monkeypatch.setattr("pilot_flwr.algorithm.aggregation.centred_gram", inexact_gram)
    distances = pairwise_distances(states)
    assert_array_equal(distances[np.ix_(copies, copies)], 0)
    assert_array_equal(distances[copies], distances[[1] * len(copies)])
    assert_array_equal(distances, distances.T)


def test_clusters_are_found_along_chains() -> None:
    linked = np.zeros((9, 9), dtype=bool)
    for k, j in [(8, 1), (1, 7), (7, 2), (2, 6), (3, 5)]:
        linked[k, j] = linked[j, k] = True
    assert _components(linked) == [[1, 2, 6, 7, 8], [3, 5]]


def staged_clients(states: list[State], monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the clients that all passes of `pairwise_distances` stage; check the distances."""
    staged = []

    def counted(members: list[State]) -> np.ndarray:
        staged.append(len(members))
        return arrays.centred_gram(members)

    monkeypatch.setattr("pilot_flwr.algorithm.aggregation.centred_gram", counted)
    distances = pairwise_distances(states)
    assert_allclose(distances, naive_distances(states).astype(float), rtol=1e-8)
    return sum(staged)


def test_many_close_pairs_cost_one_more_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    centres = rng.standard_normal((30, 64))
    points = np.repeat(centres, 2, axis=0) + 1e-5 * rng.standard_normal((60, 64))
    assert staged_clients([{"a": p} for p in points], monkeypatch) <= 2 * 60


def test_a_long_chain_of_close_clients_costs_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    steps = rng.standard_normal((100, 64)) * 5e-4 / 8
    points = np.concatenate([np.zeros((1, 64)), rng.standard_normal(64) + steps.cumsum(axis=0)])
    assert staged_clients([{"a": p} for p in points], monkeypatch) <= 3 * 101


def test_zero_distances_take_all_the_neighbours_weight() -> None:
    distances = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]], dtype=float)
    weights = adaptive_weights(distances, [2, 3, 5, 7], 3)
    # Client 0: w = (1/2, 1/2, 0) on clients 1, 2, 3; Z = 2 + 3/2 + 5/2 = 6.
    assert_allclose(weights[0], [2 / 6, 1.5 / 6, 2.5 / 6, 0], rtol=1e-15)
    # Only those in N(k) share: with M = 1 that is client 1 alone; Z = 2 + 3.
    assert_allclose(adaptive_weights(distances, [2, 3, 5, 7], 1)[0], [2 / 5, 3 / 5, 0, 0])
    # The limit: a distance of 1e-300 gives the same.
    near = np.where(distances == 0, 1e-300, distances)
    assert_allclose(adaptive_weights(near, [2, 3, 5, 7], 3), weights, rtol=1e-15, atol=1e-299)


@pytest.mark.parametrize("dtype", [np.float32, torch.bfloat16], ids=str)
def test_results_are_written_into_the_given_states(dtype: object, tmp_path: Path) -> None:
    states = as_dtype(make_states(4), dtype)
    weights = np.random.default_rng(6).dirichlet(np.ones(4), 4)
    weights[3] = weights[1]
    given: dict[int, dict] = {}

    def allocate(row: int) -> dict:
        given[row] = {}
        for name, value in states[0].items():
            path = str(tmp_path / f"{row}.{name}")
            if isinstance(value, torch.Tensor):
                empty = torch.from_file(path, True, value.numel(), dtype=value.dtype)
                given[row][name] = empty.reshape(value.shape)
            else:
                given[row][name] = np.full(value.shape, np.nan, value.dtype)
        return given[row]

    mixed = mix(states, weights, allocate=allocate)
    assert list(given) == [0, 1, 2]
    for row, state in enumerate(mixed):
        assert state is given[1 if row == 3 else row]
    for found, expected in zip(mixed, mix(states, weights), strict=True):
        assert_array_equal(flat(found), flat(expected))


def test_one_client_is_its_own_mixture() -> None:
    states = make_states(1)
    assert_array_equal(pairwise_distances(states), [[0]])
    assert_array_equal(adaptive_weights(np.zeros((1, 1)), [5], 3), [[1]])
    for result in (mix(states, np.ones((1, 1)))[0], weighted_average(states, [5])):
        assert_array_equal(flat(result), flat(states[0]))
        assert result["q.lora_A"] is not states[0]["q.lora_A"]


def test_task_aware_average_is_the_weighted_mean_of_each_task() -> None:
    states, counts = make_states(6), [5, 20, 1, 7, 9, 100]
    tasks = ["vqa", "caption", "vqa", "vqa", "caption", "ocr"]
    averages = task_aware_average(states, tasks, counts)
    assert list(averages) == ["vqa", "caption", "ocr"]
    for task, average in averages.items():
        numerator = sum(
            n * flat(s) for s, t, n in zip(states, tasks, counts, strict=True) if t == task
        )
        total = sum(n for t, n in zip(tasks, counts, strict=True) if t == task)
        assert_allclose(flat(average), numerator / total, rtol=1e-7)
    assert_array_equal(flat(averages["ocr"]), flat(states[5]))


def test_tasks_may_have_adapters_of_different_shapes() -> None:
    small, large = np.ones(2, np.float32), np.full(3, 2, np.float32)
    averages = task_aware_average([{"w": small}, {"w": large}], ["a", "b"], [1, 1])
    assert_array_equal(averages["a"]["w"], small)
    assert_array_equal(averages["b"]["w"], large)


@pytest.mark.parametrize("count", [0, -1, np.nan, np.inf])
def test_numbers_of_examples_must_be_positive_and_finite(count: float) -> None:
    states, counts = make_states(3), [4, 5, count]
    message = "client 2: the number of examples is .* but must be positive and finite"
    for run in (
        lambda: weighted_average(states, counts),
        lambda: task_aware_average(states, ["a", "b", "c"], counts),
        lambda: adaptive_weights(pairwise_distances(states), counts, 1),
    ):
        with pytest.raises(UpdateError, match=message):
            run()
    with pytest.raises(UpdateError, match="3 clients but 2 numbers of examples"):
        weighted_average(states, [1, 2])


@pytest.mark.parametrize("neighbours", [0, -3])
def test_num_neighbors_must_be_positive(neighbours: int) -> None:
    message = f"^`strategy.num_neighbors` is {neighbours} but must be at least 1.$"
    with pytest.raises(ConfigError, match=message):
        adaptive_weights(np.zeros((2, 2)), [1, 1], neighbours)


@pytest.mark.parametrize(
    "distances", [np.zeros((2, 3)), np.full((2, 2), np.nan), -np.ones((2, 2)), np.zeros(4)]
)
def test_bad_distances(distances: np.ndarray) -> None:
    with pytest.raises(UpdateError, match="The distances"):
        adaptive_weights(distances, [1, 1], 1)


@pytest.mark.parametrize(
    "weights",
    [np.eye(2), np.ones((3, 3)), np.full((3, 3), np.nan), 2 * np.eye(3) - np.full((3, 3), 1 / 3)],
)
def test_weights_that_are_not_row_stochastic(weights: np.ndarray) -> None:
    with pytest.raises(UpdateError, match="The weights"):
        mix(make_states(3), weights)
