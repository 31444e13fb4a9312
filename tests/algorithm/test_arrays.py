"""What the passes over named arrays accept, leave alone and refuse."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import threadpoolctl
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pilot_flwr.algorithm.aggregation import (
    mix,
    pairwise_distances,
    task_aware_average,
    weighted_average,
)
from pilot_flwr.algorithm.arrays import centred_gram
from pilot_flwr.algorithm.blocks import in_threads, threads
from pilot_flwr.errors import UpdateError

SHAPES = {"q.lora_A": (4, 33), "q.lora_B": (33, 4), "scale": ()}
DTYPES = [np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float32]


def make_states(count: int, dtype: object = np.float32) -> list[dict]:
    rng = np.random.default_rng(0)
    states = []
    for _ in range(count):
        values = {name: np.asarray(rng.standard_normal(s)) for name, s in SHAPES.items()}
        if isinstance(dtype, torch.dtype):
            states.append({name: torch.tensor(v).to(dtype) for name, v in values.items()})
        else:
            states.append({name: v.astype(dtype) for name, v in values.items()})
    return states


def flat(state: dict) -> np.ndarray:
    parts = [v.detach().double().numpy() if torch.is_tensor(v) else v for v in state.values()]
    return np.concatenate([np.ravel(part).astype(np.float64) for part in parts])


@pytest.mark.parametrize("wrap", ["read-only", "strided", "parameter"])
def test_inputs_of_any_layout_are_read_and_not_changed(wrap: str) -> None:
    states = make_states(3)
    expected = flat(weighted_average(states, [1, 2, 3])), pairwise_distances(states)
    before = [flat(s).tobytes() for s in states]
    for state in states:
        for name, value in state.items():
            if wrap == "read-only":
                value.flags.writeable = False
            elif wrap == "strided":
                state[name] = np.repeat(value, 2, axis=0)[::2] if value.ndim else value
            else:
                state[name] = torch.nn.Parameter(torch.tensor(value))
    average = weighted_average(states, [1, 2, 3])
    assert_array_equal(flat(average), expected[0])
    assert_array_equal(pairwise_distances(states), expected[1])
    assert [flat(s).tobytes() for s in states] == before
    assert not any(torch.is_tensor(v) and v.requires_grad for v in average.values())


def test_clients_that_differ_in_some_columns_only() -> None:
    states = [{"a": np.float32([1, 2, k]), "b": np.float32([5, 5])} for k in (3, 6)]
    average = weighted_average(states, [1, 1])
    assert_array_equal(average["a"], [1, 2, 4.5])
    assert_array_equal(average["b"], [5, 5])


def test_the_number_of_threads_is_put_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        pairwise_distances(make_states(2))
        with pytest.raises(UpdateError):
            mix([{"a": np.float32([np.nan])}] * 2, np.eye(2))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_results_share_no_memory() -> None:
    states = make_states(3)
    results = mix(states, np.eye(3))
    results[0]["q.lora_A"][:] = 7
    assert_array_equal(flat(results[1]), flat(states[1]))
    assert not np.any(states[0]["q.lora_A"] == 7)
    assert results[0]["q.lora_A"].base is None


def test_order_of_names_is_free_and_empty_tensors_pass() -> None:
    states = [
        {"a": np.float32([k, 1]), "b": np.float32([2 * k]), "c": np.zeros((0, 3))} for k in (1, 3)
    ]
    states[1] = dict(reversed(states[1].items()))
    average = weighted_average(states, [1, 1])
    assert_array_equal(average["a"], [2, 1])
    assert_array_equal(average["b"], [4])
    assert average["c"].shape == (0, 3)
    assert_allclose(pairwise_distances(states)[0, 1], np.sqrt(4 + 16))


ALL_PASSES: dict[str, Callable[[list], object]] = {
    "pairwise_distances": pairwise_distances,
    "mix": lambda states: mix(states, np.eye(len(states))),
    "weighted_average": lambda states: weighted_average(states, [1] * len(states)),
    "task_aware_average": lambda s: task_aware_average(s, ["t"] * len(s), [1] * len(s)),
}
all_passes = pytest.mark.parametrize("run", ALL_PASSES.values(), ids=ALL_PASSES)


@all_passes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("client", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(run: Callable, bad: float, client: int, dtype: object) -> None:
    states = make_states(3, dtype)
    states[client]["q.lora_B"][32, 1] = bad
    if isinstance(dtype, type):
        states[client]["q.lora_B"].flags.writeable = False
    with pytest.raises(UpdateError, match=rf"client {client}: tensor `q.lora_B` holds NaN or Inf"):
        run(states)


def test_infinities_that_cancel_are_found() -> None:
    states = make_states(2)
    states[0]["q.lora_A"][0, 0], states[1]["q.lora_A"][0, 0] = np.inf, -np.inf
    for run in ALL_PASSES.values():
        with pytest.raises(UpdateError, match="client 0: tensor `q.lora_A`"):
            run(states)


@all_passes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scale"), r"missing tensors \['scale'\]"),
        (lambda s: s.update(extra=s["scale"]), r"unexpected ones \['extra'\]"),
        (
            lambda s: s.update(scale=np.zeros(1, np.float32)),
            r"numpy float32 \(1,\) but must be .*, as client 0's",
        ),
        (lambda s: s.update(scale=np.float64(s["scale"]).reshape(())), "`scale`"),
        (lambda s: s.update(scale=s["scale"].astype(np.float16)), "`scale` is numpy float16"),
        (lambda s: s.update(scale=torch.tensor(1.0)), "`scale` is torch float32"),
        (lambda s: s.update(scale=[1.0]), "`scale` is of type list"),
        (lambda s: s.clear(), "holds no tensor"),
    ],
)
def test_states_that_do_not_match(run: Callable, change: Callable, message: str) -> None:
    states = make_states(3)
    change(states[1])
    with pytest.raises(UpdateError, match=f"client 1: .*{message}"):
        run(states)


def test_torch_states_that_do_not_match() -> None:
    states = make_states(2, torch.float32)
    states[1]["q.lora_B"] = states[1]["q.lora_B"].T
    with pytest.raises(UpdateError, match=r"client 1: .* \(4, 33\) but must be .* \(33, 4\)"):
        pairwise_distances(states)


@all_passes
@pytest.mark.parametrize("value", [np.arange(3), torch.arange(3), np.ones(3, ">f4"), "text"])
def test_types_that_cannot_be_aggregated(run: Callable, value: object) -> None:
    with pytest.raises(UpdateError, match="client 0: tensor `a` is .*, which cannot be aggregated"):
        run([{"a": value}, {"a": value}])


@all_passes
def test_no_client_or_no_tensor(run: Callable) -> None:
    with pytest.raises(UpdateError, match="no client"):
        run([])
    with pytest.raises(UpdateError, match="client 0: the update holds no tensor"):
        run([{}, {}])


def test_values_too_large_for_float64_are_not_called_nan() -> None:
    states = [{"a": np.full(3, sign * 1e300)} for sign in (1, -1)]
    with pytest.raises(UpdateError, match="values of tensor `a` are too large"):
        pairwise_distances(states)
    states = [{"a": np.full(3, 1e308)} for _ in range(2)]
    with pytest.raises(UpdateError, match="values of tensor `a` are too large"):
        mix(states, np.eye(2))


def test_task_errors_name_the_client_in_the_whole_list() -> None:
    states = make_states(4)
    states[3]["scale"] = np.float32(np.nan).reshape(())
    with pytest.raises(UpdateError, match="client 3: tensor `scale`"):
        task_aware_average(states, ["a", "b", "a", "b"], [1] * 4)
    with pytest.raises(UpdateError, match="4 adapters but 3 tasks"):
        task_aware_average(states, ["a", "b", "a"], [1] * 4)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """12 blocks of 3,000 columns; each number of threads takes other blocks at other times."""
    rng = np.random.default_rng(1)
    states = [{"a": rng.standard_normal(33_000).astype(np.float32)} for _ in range(20)]
    weights = rng.dirichlet(np.ones(20), 20)
    monkeypatch.setattr("pilot_flwr.algorithm.blocks.BLOCK_ELEMENTS", 20 * 3000)
    before = torch.get_num_threads()
    expected = 0
    for start in range(0, 33_000, 3000):  # one thread, block by block
        block = np.stack([s["a"][start : start + 3000] for s in states]).astype(np.float64)
        block -= block[0].copy()
        with threadpoolctl.threadpool_limits(1):
            expected = expected + block @ block.T
    torch.set_num_threads(number)
    try:
        assert_array_equal(centred_gram(states), expected)
        mixed = mix(states, weights)
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    assert_array_equal(
        np.stack([m["a"] for m in mixed]), np.stack([m["a"] for m in mix(states, weights)])
    )


def test_a_job_that_fails_ends_the_others() -> None:
    """The first failure in the order of the jobs is raised; few jobs run ahead of it."""
    done = []

    def job(number: int, buffer: str) -> str:
        done.append(number)
        if number == 3:
            raise UpdateError("the third")
        return buffer + str(number)

    jobs = (functools.partial(job, number) for number in range(1, 100))
    results = in_threads(jobs, ["b", "b"])
    assert [next(results), next(results)] == ["b1", "b2"]
    with pytest.raises(UpdateError, match="the third"):
        next(results)
    assert max(done) <= 6


def test_threads_are_as_many_as_their_buffers_allow() -> None:
    cores = torch.get_num_threads()
    with threads(1) as number:
        assert (number, torch.get_num_threads()) == (cores, 1)
    with threads(1 << 40) as number:  # one product at a time, on all cores
        assert number == 1
        blas = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"]
        assert all(library["num_threads"] == cores for library in blas)
    assert torch.get_num_threads() == cores
