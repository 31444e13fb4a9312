"""FedEx-LoRA's residual: the mean of the products, exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot_flwr.algorithm.aggregation import weighted_average
from pilot_flwr.algorithm.fedex_lora import joined, product_residual
from pilot_flwr.errors import UpdateError

LAYERS = {"q": (7, 5), "v": (4, 9)}
"""Layer → outputs and inputs."""


def make_lora(rng, rank, dtype=np.float64, offset=0.0):
    state = {}
    for layer, (outputs, inputs) in LAYERS.items():
        state[f"{layer}.lora_A"] = (offset + rng.standard_normal((rank, inputs))).astype(dtype)
        state[f"{layer}.lora_B"] = rng.standard_normal((outputs, rank)).astype(dtype)
    return state


def product(state, layer):
    """B A in float64; zero if the layer is not there."""
    if f"{layer}.lora_A" not in state:
        return np.zeros(LAYERS[layer])
    a, b = (np.asarray(state[f"{layer}.lora_{m}"], dtype=np.float64) for m in "AB")
    return b @ a


def naive_mean(states, counts, layer):
    total = np.zeros(LAYERS[layer])
    for state, count in zip(states, counts, strict=True):
        total += count / sum(counts) * product(state, layer)
    return total


@st.composite
def clients(draw, dtype=np.float64):
    count, rank = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset = draw(st.sampled_from([0.0, 10.0]))
    states = [make_lora(rng, rank, dtype, offset) for _ in range(count)]
    return states, draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))


def largest(states):
    return max(np.abs(product(s, layer)).max() for s in states for layer in LAYERS)


@settings(max_examples=50)
@given(clients())
def test_mean_plus_residual_is_the_mean_of_the_products(drawn):
    states, counts = drawn
    mean = weighted_average(states, counts)
    residual = product_residual(states, counts, mean)
    for layer in LAYERS:
        found = product(mean, layer) + product(residual, layer)
        expected = naive_mean(states, counts, layer)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * largest(states))


@settings(max_examples=25)
@given(clients(), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(drawn, random):
    states, counts = drawn
    order = random.sample(range(len(states)), len(states))
    mean = weighted_average(states, counts)
    residual = product_residual(states, counts, mean)
    permuted = product_residual([states[k] for k in order], [counts[k] for k in order], mean)
    for layer in LAYERS:
        np.testing.assert_allclose(
            product(permuted, layer), product(residual, layer), atol=1e-12 * largest(states)
        )


@settings(max_examples=25)
@given(clients(), st.integers(1, 4))
def test_one_client_or_copies_of_one_leave_nothing(drawn, copies):
    states, counts = [drawn[0][0]] * copies, [drawn[1][0]] * copies
    assert product_residual(states, counts, weighted_average(states, counts)) == {}


@settings(max_examples=25)
@given(clients())
def test_the_rank_is_no_larger_than_that_of_the_clients_differences(drawn):
    states, counts = drawn
    rank = len(states[0]["q.lora_A"])
    residual = product_residual(states, counts, weighted_average(states, counts))
    for layer, (outputs, inputs) in LAYERS.items():
        if f"{layer}.lora_A" in residual:
            found = len(residual[f"{layer}.lora_A"])
            # Σ p_k (B_k − B̄) (A_k − Ā) has K terms; the mean's rounding may add one.
            assert found <= min((len(states) + 1) * rank, outputs, inputs)
            assert residual[f"{layer}.lora_B"].shape == (outputs, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_rounds_of_narrow_numbers_stay_exact_to_their_own_precision(dtype):
    """The mean's rounding to `dtype` is made up for; the residual's own to float32 is left."""
    rng = np.random.default_rng(0)
    residual, counts = {}, [1, 2, 5]
    for _ in range(3):
        states = [
            {n: torch.from_numpy(v).to(dtype) for n, v in make_lora(rng, 2).items()}
            for _ in range(3)
        ]
        as_numpy = [{n: t.double().numpy() for n, t in s.items()} for s in states]
        expected = {
            layer: naive_mean(as_numpy, counts, layer) + product(residual, layer)
            for layer in LAYERS
        }
        mean = weighted_average(states, counts)
        residual = product_residual(states, counts, mean, residual)
        assert {tensor.dtype for tensor in residual.values()} == {torch.float32}
        wide = {name: tensor.double().numpy() for name, tensor in mean.items()}
        for layer in LAYERS:
            found = product(wide, layer) + product(residual, layer)
            scale = np.abs(expected[layer]).max()
            np.testing.assert_allclose(found, expected[layer], rtol=0, atol=1e-5 * scale)


def test_the_residual_matters():
    """Without it the mean of the factors is another model: the reason for the method."""
    rng = np.random.default_rng(0)
    states = [make_lora(rng, 2) for _ in range(3)]
    mean = weighted_average(states, [1, 1, 1])
    difference = naive_mean(states, [1, 1, 1], "q") - product(mean, "q")
    assert np.abs(difference).max() > 0.1 * largest(states)


def test_joined_is_the_sum_of_both_products():
    rng = np.random.default_rng(0)
    lora, residual = make_lora(rng, 2), make_lora(rng, 5)
    del residual["v.lora_A"], residual["v.lora_B"]
    whole = joined(lora, residual)
    assert [len(whole[f"{layer}.lora_A"]) for layer in LAYERS] == [7, 7]
    for layer in LAYERS:
        expected = product(lora, layer) + product(residual, layer)
        np.testing.assert_allclose(product(whole, layer), expected, rtol=1e-12)


def test_clients_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    states = [make_lora(rng, 2), make_lora(rng, 3)]
    with pytest.raises(UpdateError, match="client 1: "):
        product_residual(states, [1, 1], states[0])
    with pytest.raises(UpdateError, match="must be positive"):
        product_residual(states[:1], [0], states[0])
