"""Norms of updates and their bound: against naive loops, and what a minority can do."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from pilot_flwr.algorithm.norm_bounds import (
    FEWEST,
    bounds_of,
    check_norms,
    outliers,
    shortened,
    update_norm,
)
from pilot_flwr.algorithm.server_state import InitialState, ServerState
from pilot_flwr.config.schema import UpdateNormConfig
from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import Update

DTYPES = [np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float32]
SHAPES = {"a": (4, 33), "b": (7,), "scale": ()}
NORMS = st.floats(0, 1e6, allow_subnormal=False)
FACTORS = st.floats(1, 10)


def make_state(seed, dtype=np.float32, offset=0.0):
    rng = np.random.default_rng(seed)
    values = {n: np.asarray(offset + rng.standard_normal(s)) for n, s in SHAPES.items()}
    if isinstance(dtype, torch.dtype):
        return {n: torch.tensor(v).to(dtype) for n, v in values.items()}
    return {n: v.astype(dtype) for n, v in values.items()}


def numbers(state):
    """All elements as Python floats, which are float64."""
    return [float(x) for name in sorted(SHAPES) for x in state[name].reshape(-1)]


def naive_norm(state, start):
    return math.sqrt(
        math.fsum((x - y) ** 2 for x, y in zip(numbers(state), numbers(start), strict=True))
    )


def naive_outliers(norms, factor):
    """The rule itself, one removal at a time; norms is a list of rows."""
    left, found = list(range(len(norms))), []
    while len(left) >= 3:
        bounds = [factor * statistics.median(norms[k][p] for k in left) for p in range(2)]
        excess = {
            k: max(
                norms[k][p] / bounds[p] if bounds[p] else math.inf if norms[k][p] else 0
                for p in range(2)
            )
            for k in left
        }
        worst = max(left, key=lambda k: excess[k])
        if excess[worst] <= 1:
            break
        left.remove(worst)
        found.append(worst)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_norm_is_that_of_all_tensors_as_one_vector(dtype, offset):
    start, state = make_state(0, dtype, offset), make_state(1, dtype, offset)
    assert_allclose(update_norm(state, start), naive_norm(state, start), rtol=1e-12)


def test_a_small_update_of_large_values_keeps_its_digits():
    start = {"w": np.full(1000, 1e4, np.float32)}
    state = {"w": start["w"] + np.float32(2**-10)}
    assert_allclose(update_norm(state, start), math.sqrt(1000) * 2**-10, rtol=1e-12)


def test_nothing_changed_is_exactly_zero():
    assert update_norm(make_state(3), make_state(3)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_of_what_is_not_finite_is_refused(bad):
    state = make_state(0)
    state["a"][0, 0] = bad
    with pytest.raises(UpdateError, match="client 1: tensor `a` holds NaN or Inf"):
        update_norm(state, make_state(1))


def test_the_largest_float32_values_have_a_norm():
    largest = np.finfo(np.float32).max
    state, start = {"w": np.full(4, largest)}, {"w": np.full(4, -largest)}
    assert_allclose(update_norm(state, start), 4 * float(largest), rtol=1e-12)


@given(st.lists(st.tuples(NORMS, NORMS), max_size=9), FACTORS)
def test_bounds_are_medians_times_the_factor(rows, factor):
    bounds = bounds_of(np.array(rows).reshape(-1, 2), factor)
    if len(rows) < 3:
        assert bounds is None
    else:
        expected = [factor * statistics.median(column) for column in zip(*rows, strict=True)]
        assert_allclose(bounds, expected, rtol=1e-15)


@given(st.lists(st.tuples(NORMS, NORMS), max_size=9), FACTORS)
def test_who_is_out_is_what_the_rule_says(rows, factor):
    found = outliers(np.array(rows).reshape(-1, 2), factor)
    assert list(found) == naive_outliers(rows, factor)


@st.composite
def attacked(draw):
    """Draw honest norms and fewer arbitrary ones, mixed."""
    honest = draw(st.lists(NORMS, min_size=2, max_size=6))
    hostile = draw(st.lists(st.floats(0, 1e30), max_size=len(honest) - 1))
    order = draw(st.permutations(range(len(honest) + len(hostile))))
    return honest, np.array([*honest, *hostile])[list(order)][:, None], [
        k for k, source in enumerate(order) if source < len(honest)
    ]  # fmt: skip


@given(attacked(), FACTORS)
def test_a_minority_cannot_move_the_bound_out_of_what_honest_clients_do(drawn, factor):
    honest, norms, _ = drawn
    if (bounds := bounds_of(norms, factor)) is not None:
        assert factor * min(honest) * (1 - 1e-12) <= bounds[0]
        assert bounds[0] <= factor * max(honest) * (1 + 1e-12)


@given(attacked(), FACTORS)
def test_a_minority_leaves_in_none_of_its_own_above_the_largest_honest_bound(drawn, factor):
    honest, norms, _ = drawn
    out = set(outliers(norms, factor))
    left = [norms[k, 0] for k in range(len(norms)) if k not in out]
    if len(norms) >= FEWEST and len(left) >= FEWEST:
        assert max(left) <= factor * max(honest) * (1 + 1e-12)


@given(attacked(), FACTORS)
def test_a_minority_gets_no_honest_client_out_that_is_within_the_factor(drawn, factor):
    honest, norms, places = drawn
    if max(honest) <= factor * min(honest):
        assert not set(outliers(norms, factor)) & set(places)


def test_half_of_the_clients_can_move_the_bound():
    """The breakdown point is sharp: with half of them it does not hold."""
    norms = np.array([[1.0], [1.0], [1e9], [1e9]])
    assert bounds_of(norms, 3.0)[0] > 1e9
    assert outliers(norms, 3.0) == {}
    assert list(outliers(norms[:3], 3.0)) == [2]


@given(st.lists(st.tuples(NORMS, NORMS), min_size=3, max_size=8), FACTORS, st.data())
def test_a_permutation_of_the_clients_permutes_who_is_out(rows, factor, data):
    norms = np.array([(a, b + k * 1e-3) for k, (a, b) in enumerate(rows)])  # no two are equal
    order = data.draw(st.permutations(range(len(rows))))
    found = list(outliers(norms[order], factor))
    assert {order[k] for k in found} == set(outliers(norms, factor))
    assert_allclose(bounds_of(norms[order], factor), bounds_of(norms, factor))


@given(st.lists(st.tuples(NORMS, NORMS), min_size=3, max_size=8), FACTORS, st.integers(-20, 20))
def test_the_scale_of_the_norms_does_not_matter(rows, factor, exponent):
    norms = np.array(rows)
    scaled = outliers(norms * 2.0**exponent, factor)
    assert list(scaled) == list(outliers(norms, factor))


@given(st.lists(NORMS, min_size=3, max_size=9), FACTORS)
def test_without_anyone_above_the_first_bound_the_others_are_judged_the_same(values, factor):
    norms = np.array(values)[:, None]
    out = set(outliers(norms, factor))
    for gone in np.flatnonzero(norms[:, 0] > bounds_of(norms, factor)):
        assert gone in out
        rest = [k for k in range(len(norms)) if k != gone]
        assert {rest[k] for k in outliers(norms[rest], factor)} == out - {gone}


@given(st.lists(st.tuples(NORMS, NORMS), min_size=3, max_size=8), FACTORS)
def test_without_the_first_outlier_of_two_parts_the_others_are_judged_the_same(rows, factor):
    norms = np.array(rows)
    if found := list(outliers(norms, factor)):
        rest = [k for k in range(len(norms)) if k != found[0]]
        assert [rest[k] for k in outliers(norms[rest], factor)] == found[1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_shortening_keeps_the_direction(dtype, factor):
    start, state = make_state(0, dtype), make_state(1, dtype)
    short = shortened(state, start, factor)
    eps = torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) else np.finfo(dtype).eps
    for name in SHAPES:
        assert short[name].dtype == state[name].dtype and short[name].shape == state[name].shape
    expected = [y + factor * (x - y) for x, y in zip(numbers(state), numbers(start), strict=True)]
    assert_allclose(numbers(short), expected, rtol=eps, atol=4 * 2.0**-52)
    rounding = eps * math.sqrt(math.fsum(x**2 for x in expected))
    assert update_norm(short, start) <= factor * naive_norm(state, start) + rounding


def test_an_update_of_any_size_is_shortened_to_the_bound():
    start = {"w": np.zeros(100, np.float32)}
    state = {"w": np.full(100, np.finfo(np.float32).max)}
    norm = update_norm(state, start)
    assert_allclose(update_norm(shortened(state, start, 2.5 / norm), start), 2.5, rtol=1e-6)


def test_clipped_parts_are_kept_where_the_caller_says():
    start = {"w": torch.zeros(4)}
    state = ServerState(("t",), InitialState(start, start))
    updates = [
        Update(f"c{k}", "t", 1, 1, {"w": torch.ones(4)}, {"w": torch.full((4,), size)})
        for k, size in enumerate([1.0, 1.0, 100.0])
    ]
    config, kept = UpdateNormConfig(action="clip", factor=2.0), []
    found, checks = check_norms(updates, state, config, keep=lambda part: kept.append(part) or part)
    assert [check.action for check in checks] == ["accepted", "accepted", "clipped"]
    assert len(kept) == 1 and found[2].lora is kept[0]
    assert found[2].lora["w"].tolist() == [2.0] * 4
