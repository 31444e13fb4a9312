"""Products of LoRAs of different ranks, against products that are built and decomposed by NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot_flwr.algorithm.aggregation import adaptive_weights, group_weights
from pilot_flwr.algorithm.lora_ranks import (
    at_rank,
    check_rank,
    mix_products,
    newcomer_lora,
    product_distances,
    rank_of,
    truncated,
)
from pilot_flwr.errors import UpdateError

LAYERS = {"q": (7, 5), "v": (4, 9)}
"""Layer → outputs and inputs."""

LARGEST = 4


def make_lora(rng, rank, dtype=torch.float64):
    state = {}
    for layer, (outputs, inputs) in LAYERS.items():
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = torch.from_numpy(rng.standard_normal(shape))
            state[f"{layer}.lora_{name}"] = values.to(dtype)
    return state


def drawn(rng, rank=LARGEST, dtype=torch.float64):
    """A LoRA before training: B is zero."""
    state = make_lora(rng, rank, dtype)
    return {n: t if n.endswith("A") else torch.zeros_like(t) for n, t in state.items()}


def products(state):
    """B A of every layer, in float64."""
    return {
        layer: (state[f"{layer}.lora_B"].double() @ state[f"{layer}.lora_A"].double()).numpy()
        for layer in LAYERS
    }


def vector(state):
    return np.concatenate([product.ravel() for product in products(state).values()])


def closest(matrix, rank):
    """The best approximation of a rank, and the squared norm of the rest (Eckart and Young)."""
    u, values, v = np.linalg.svd(matrix)
    kept = (u[:, :rank] * values[:rank]) @ v[:rank] if rank <= len(values) else matrix
    return kept, (values[rank:] ** 2).sum()


@st.composite
def clients(draw, smallest=1, dtype=torch.float64):
    """K LoRAs of ranks 1 to `LARGEST`, some of them copies of others, weights, and a spare LoRA."""
    count = draw(st.integers(smallest, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    distinct = [make_lora(rng, draw(st.integers(1, LARGEST)), dtype) for _ in range(count)]
    origin = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    weights = rng.random((count, count)) * (rng.random((count, count)) < 0.7)
    weights += np.eye(count) * 1e-3
    weights /= weights.sum(axis=1, keepdims=True)
    return [distinct[k] for k in origin], weights, drawn(rng, dtype=dtype)


def own(loras):
    """Row of weights and rank of every client's mixture at its own rank."""
    return [(row, rank_of(lora)) for row, lora in enumerate(loras)]


# Distances.


@settings(max_examples=50)
@given(clients())
def test_distances_are_those_of_the_built_products(case):
    loras, _, _ = case
    vectors = [vector(lora) for lora in loras]
    expected = [[np.linalg.norm(one - other) for other in vectors] for one in vectors]
    found = product_distances(loras)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert (found == found.T).all() and not found.diagonal().any()
    for k, one in enumerate(loras):
        for j, other in enumerate(loras):
            assert one is not other or found[k, j] == 0


@settings(max_examples=25)
@given(clients(2), st.floats(1e-9, 1e-4))
def test_close_clients_keep_their_distance(case, step):
    """‖B(A + e) − B A‖ = ‖B e‖, far below the rounding of a difference of squared norms."""
    (first, *_), _, _ = case
    rng = np.random.default_rng(0)
    change = {layer: torch.from_numpy(rng.standard_normal(LAYERS[layer][1])) for layer in LAYERS}
    second = dict(first)
    for layer in LAYERS:
        second[f"{layer}.lora_A"] = first[f"{layer}.lora_A"] + step * change[layer]
    expected = np.sqrt(
        sum(
            float((first[f"{layer}.lora_B"].sum(1)[:, None] * step * change[layer]).norm() ** 2)
            for layer in LAYERS
        )
    )
    found = product_distances([first, second])[0, 1]
    assert found == pytest.approx(expected, rel=1e-12 / step * 10, abs=1e-13)


@settings(max_examples=25)
@given(clients())
def test_distances_do_not_depend_on_the_factors(case):
    """(B G) (G⁻¹ A) is the same product."""
    loras, _, _ = case
    rng = np.random.default_rng(1)
    turned = []
    for lora in loras:
        other = {}
        for layer in LAYERS:
            basis = torch.from_numpy(np.linalg.qr(rng.standard_normal([rank_of(lora)] * 2))[0])
            other[f"{layer}.lora_A"] = 3 * basis.T @ lora[f"{layer}.lora_A"]
            other[f"{layer}.lora_B"] = lora[f"{layer}.lora_B"] @ basis / 3
        turned.append(other)
    np.testing.assert_allclose(product_distances(turned), product_distances(loras), atol=1e-6)


# Mixtures.


@settings(max_examples=50)
@given(clients())
def test_mixtures_are_the_best_approximations_of_the_mean_product(case):
    loras, weights, spare = case
    for row, (lora, error) in enumerate(mix_products(loras, weights, own(loras), spare=spare)):
        lost, whole = 0.0, 0.0
        assert rank_of(lora) == rank_of(loras[row])
        check_rank(lora, rank_of(loras[row]), LARGEST)
        for layer in LAYERS:
            mean = sum(w * products(one)[layer] for w, one in zip(weights[row], loras, strict=True))
            expected, rest = closest(mean, rank_of(lora))
            np.testing.assert_allclose(products(lora)[layer], expected, atol=1e-10)
            lost, whole = lost + rest, whole + np.square(mean).sum()
        assert error == pytest.approx(np.sqrt(lost / whole), abs=1e-12)


@settings(max_examples=25)
@given(clients(), st.randoms(use_true_random=False))
def test_a_permutation_of_the_clients_permutes_the_results(case, random):
    loras, weights, spare = case
    order = random.sample(range(len(loras)), len(loras))
    mixed = mix_products(loras, weights, own(loras), spare=spare)
    permuted = [loras[k] for k in order]
    found = mix_products(permuted, weights[np.ix_(order, order)], own(permuted), spare=spare)
    for k, one in zip(order, found, strict=True):
        np.testing.assert_allclose(vector(one.lora), vector(mixed[k].lora), atol=1e-8)


@settings(max_examples=25)
@given(clients())
def test_identical_clients_keep_their_product(case):
    loras, weights, spare = case
    same = [loras[0]] * len(loras)
    for one in mix_products(same, weights, own(same), spare=spare):
        np.testing.assert_allclose(vector(one.lora), vector(loras[0]), atol=1e-12)
        assert one.error < 1e-7


@given(clients())
def test_a_client_alone_gets_its_factors_back(case):
    loras, _, spare = case
    mixed = mix_products(loras, np.eye(len(loras)), own(loras), spare=spare)
    for lora, (found, error) in zip(loras, mixed, strict=True):
        assert error == 0
        assert all(torch.equal(found[name], tensor) for name, tensor in lora.items())


@settings(max_examples=25)
@given(clients())
def test_a_smaller_rank_gets_the_leading_part_of_a_larger_one(case):
    """So it does not matter whether a LoRA is truncated once or twice."""
    loras, weights, spare = case
    ranks = range(1, LARGEST + 1)
    mixed = mix_products(loras, weights, [(0, rank) for rank in ranks], spare=spare)
    whole, errors = mixed[-1].lora, [one.error for one in mixed]
    assert errors == sorted(errors, reverse=True)
    for rank, (lora, _) in zip(ranks, mixed, strict=True):
        np.testing.assert_allclose(vector(truncated(whole, rank, spare)), vector(lora), atol=1e-7)


@settings(max_examples=25)
@given(clients(dtype=torch.bfloat16))
def test_results_are_rounded_once_to_the_clients_type(case):
    loras, weights, spare = case
    wide = [{n: t.double() for n, t in lora.items()} for lora in loras]
    exact = mix_products(wide, weights, own(loras), spare={n: t.double() for n, t in spare.items()})
    for found, one in zip(
        mix_products(loras, weights, own(loras), spare=spare), exact, strict=True
    ):
        for name, tensor in one.lora.items():
            assert torch.equal(found.lora[name], tensor.bfloat16())


def test_every_direction_can_be_trained():
    """Where a mixture has fewer directions than its receiver, A has rows and B is zero."""
    rng = np.random.default_rng(2)
    one, spare = make_lora(rng, 1), drawn(rng)
    grown = truncated(one, 3, spare)
    np.testing.assert_allclose(vector(grown), vector(one), atol=1e-12)
    for layer in LAYERS:
        a, b = grown[f"{layer}.lora_A"], grown[f"{layer}.lora_B"]
        torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64) / 3)
        assert b[:, 1:].abs().max() < 1e-12 < b[:, 0].abs().max()


def test_a_layer_smaller_than_the_rank_is_filled_with_zeros():
    rng = np.random.default_rng(3)
    lora = {"q.lora_A": torch.randn(4, 2).double(), "q.lora_B": torch.randn(3, 4).double()}
    other = {n: torch.from_numpy(rng.standard_normal(t.shape)) for n, t in lora.items()}
    mixed, error = mix_products([lora, other], np.full((2, 2), 0.5), [(0, 4)], spare=lora)[0]
    expected = (lora["q.lora_B"] @ lora["q.lora_A"] + other["q.lora_B"] @ other["q.lora_A"]) / 2
    torch.testing.assert_close(mixed["q.lora_B"] @ mixed["q.lora_A"], expected)
    assert not mixed["q.lora_A"][2:].any() and error == 0


def test_equal_results_share_one_state_and_land_where_they_are_asked_for():
    rng = np.random.default_rng(4)
    loras, spare = [make_lora(rng, rank) for rank in (2, 4, 2)], drawn(rng)
    asked = []

    def allocate(index, layout):
        asked.append((index, rank_of(layout)))
        return {name: torch.full_like(tensor, torch.nan) for name, tensor in layout.items()}

    weights = group_weights(["all"] * 3, [1, 2, 3])
    mixed = mix_products(loras, weights, own(loras), spare=spare, allocate=allocate)
    assert asked == [(0, 2), (1, 4)]
    assert mixed[0].lora is mixed[2].lora and mixed[0].lora is not mixed[1].lora
    assert all(torch.isfinite(t).all() for one in mixed for t in one.lora.values())


# A problem with a known optimum.


def test_products_reach_the_optimum_that_zero_padding_misses():
    """Least squares: Σ_k p_k ‖X − Y_k‖²_F has its optimum at the mean of the Y_k.

    Y_k is what client k uploads, the closest of its rank to a matrix of its own, in factors of its
    own; all lie in a common space of dimension 3. Products reach the optimum, and at rank 1 the
    best of that rank; zero padding of the factors, as in HetLoRA, does not come near either.
    """
    rng = np.random.default_rng(5)
    ranks, (outputs, inputs) = (1, 2, 3, 3), (12, 10)
    left, right = rng.standard_normal((outputs, 3)), rng.standard_normal((3, inputs))
    targets = [left @ np.diag(rng.uniform(0.5, 2, 3)) @ right for _ in ranks]
    loras, padded = [], []
    for rank, target in zip(ranks, targets, strict=True):
        u, values, v = np.linalg.svd(target)
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
        b, a = (u[:, :rank] * values[:rank]) @ turn, turn.T @ v[:rank]
        loras.append({"w.lora_A": torch.from_numpy(a), "w.lora_B": torch.from_numpy(b)})
        padded.append((np.pad(b, ((0, 0), (0, 3 - rank))), np.pad(a, ((0, 3 - rank), (0, 0)))))
    shares = np.array([3.0, 1, 4, 2]) / 10
    received = sum(
        share * closest(target, rank)[0]
        for share, rank, target in zip(shares, ranks, targets, strict=True)
    )
    weights = np.tile(shares, (4, 1))
    spare = {
        "w.lora_A": torch.zeros(3, inputs).double(),
        "w.lora_B": torch.zeros(outputs, 3).double(),
    }
    mixed = mix_products(loras, weights, [(0, 3), (0, 1)], spare=spare)
    whole, one = ((m.lora["w.lora_B"] @ m.lora["w.lora_A"]).numpy() for m in mixed)
    zero_padded = sum(s * b for s, (b, _) in zip(shares, padded, strict=True)) @ sum(
        s * a for s, (_, a) in zip(shares, padded, strict=True)
    )

    def excess(found):
        """Distance to the optimum of all that the clients know, relative to its norm."""
        return np.linalg.norm(found - received) / np.linalg.norm(received)

    assert excess(whole) < 1e-12
    assert excess(one) == pytest.approx(mixed[1].error) and mixed[1].error < 0.6
    assert excess(zero_padded) > 0.7 > 0.6 > excess(one)


@pytest.mark.parametrize("seed", range(3))
def test_federated_least_squares_ends_nearer_the_optimum_with_products(seed):
    """Ten exchanges of gradient descent on ‖B A − X_k‖² / 2, in ranks 1, 2, 4 and 4.

    The optimum is the mean of all X_k, of rank 4. A client of a smaller rank cannot keep all of
    what it receives, so that the federation stays away from it with either rule.
    """
    rng = np.random.default_rng(seed)
    ranks, (outputs, inputs) = (1, 2, 4, 4), (10, 8)
    left, right = rng.standard_normal((outputs, 4)), rng.standard_normal((4, inputs))
    scales = [np.diag(rng.uniform(0.5, 1.5, 4)) for _ in ranks]
    targets = [torch.from_numpy(left @ scale @ right) / 3 for scale in scales]
    optimum = sum(targets) / 4
    start = torch.from_numpy(rng.uniform(-1, 1, (4, inputs)) / np.sqrt(inputs))

    def train(b, a, target):
        b, a = b.clone().requires_grad_(), a.clone().requires_grad_()
        for _ in range(100):
            loss = (b @ a - target).square().sum() / 2
            grad_b, grad_a = torch.autograd.grad(loss, (b, a))
            with torch.no_grad():
                b -= 0.01 * grad_b
                a -= 0.01 * grad_a
        return b.detach(), a.detach()

    spare = {"w.lora_A": start, "w.lora_B": torch.zeros(outputs, 4).double()}
    received = [at_rank(spare, rank) for rank in ranks]
    padded_b, padded_a = spare["w.lora_B"], spare["w.lora_A"]
    pad = torch.nn.functional.pad
    for _ in range(10):
        loras = []
        for lora, target in zip(received, targets, strict=True):
            b, a = train(lora["w.lora_B"], lora["w.lora_A"], target)
            loras.append({"w.lora_A": a, "w.lora_B": b})
        mixed = mix_products(loras, np.full((4, 4), 0.25), own(loras), spare=spare)
        received = [one.lora for one in mixed]
        trained = [
            train(padded_b[:, :rank], padded_a[:rank], target)
            for rank, target in zip(ranks, targets, strict=True)
        ]
        padded_b = sum(pad(b, (0, 4 - b.shape[1])) for b, _ in trained) / 4
        padded_a = sum(pad(a, (0, 0, 0, 4 - len(a))) for _, a in trained) / 4

    def excess(product):
        return float((product - optimum).norm() / optimum.norm())

    products_end = excess(received[3]["w.lora_B"] @ received[3]["w.lora_A"])
    assert products_end < 0.35 and products_end < 0.7 * excess(padded_b @ padded_a)


# Newcomers.


@settings(max_examples=25)
@given(clients(), st.integers(1, LARGEST))
def test_a_newcomer_gets_the_mean_product_of_its_tasks_clients(case, rank):
    loras, _, spare = case
    names = {f"x-{k}": lora for k, lora in enumerate(loras)}
    task_of = dict.fromkeys(names, "x")
    found = newcomer_lora(task_of, names.__getitem__, "x", rank=rank, spare=spare)
    assert rank_of(found) == rank
    if rank == LARGEST == min(map(rank_of, loras)):
        return  # the mean of factors, as without ranks
    for layer in LAYERS:
        mean = np.mean([products(lora)[layer] for lora in loras], axis=0)
        expected, _ = closest(mean, rank)
        np.testing.assert_allclose(products(found)[layer], expected, atol=1e-10)


def test_equal_ranks_average_factors():
    rng = np.random.default_rng(7)
    loras = {f"x-{k}": make_lora(rng, LARGEST) for k in range(3)}
    spare = drawn(rng)
    found = newcomer_lora(dict.fromkeys(loras, "x"), loras.__getitem__, "x", rank=4, spare=spare)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(lora[name] for lora in loras.values()) / 3)
    another = loras | {"y-0": make_lora(rng, 2)}
    tasks = {name: name[0] for name in another}
    found = newcomer_lora(tasks, another.__getitem__, "x", rank=4, spare=spare)
    mean = sum(vector(lora) for lora in loras.values()) / 3
    assert np.linalg.norm(vector(found) - mean) < np.linalg.norm(mean)  # of products, truncated


def test_the_first_lora_of_a_smaller_rank_is_the_leading_part_of_the_drawn_one():
    spare = drawn(np.random.default_rng(8))
    first = newcomer_lora({}, dict.__getitem__, "x", rank=2, spare=spare)
    assert rank_of(first) == 2 and not vector(first).any()
    assert torch.equal(first["q.lora_A"], spare["q.lora_A"][:2])
    assert at_rank(spare, LARGEST) is spare


# Bad input.


def test_ranks_are_checked():
    lora = make_lora(np.random.default_rng(9), 2)
    check_rank(lora, 2, LARGEST)
    with pytest.raises(UpdateError, match="is 2 but must be 3, as the client declared"):
        check_rank(lora, 3, LARGEST)
    with pytest.raises(UpdateError, match="is 2 but must be from 1 to 1, `model.lora.rank`"):
        check_rank(lora, 2, 1)
    empty = {name: t[:0] if name.endswith("A") else t[:, :0] for name, t in lora.items()}
    with pytest.raises(UpdateError, match="is 0 but must be from 1 to 4"):
        check_rank(empty, 2, LARGEST)
    mixed = lora | {"v.lora_A": torch.zeros(3, 9)}
    with pytest.raises(UpdateError, match="is 2 in `q.lora_A` but 3 in `v.lora_A`"):
        check_rank(mixed, 2, LARGEST)


@pytest.mark.parametrize("use", ["distances", "mix"])
@pytest.mark.parametrize("fault", ["none", "layers", "ranks", "nan"])
def test_bad_input_is_refused(use, fault):
    rng = np.random.default_rng(10)
    loras, message = [make_lora(rng, 2), make_lora(rng, 3)], "There is no client"
    if fault == "none":
        loras = []
    elif fault == "layers":
        del loras[1]["q.lora_A"]
        message = "client 1: its LoRA has other layers"
    elif fault == "ranks":
        loras[1]["v.lora_B"] = loras[1]["v.lora_B"][:, :2]
        message = "client 1: the rank of its LoRA is 3 in `q.lora_A` but 2 in `v.lora_B`"
    else:
        loras[1]["v.lora_A"][0, 0] = torch.nan
        message = "layer `v` holds NaN or Inf"
    with pytest.raises(UpdateError, match=message):
        if use == "distances":
            product_distances(loras)
        else:
            weights = np.full((len(loras), len(loras)), 1 / max(1, len(loras)))
            mix_products(loras, weights, [(0, 2)], spare=drawn(rng))


def test_weights_are_checked():
    rng = np.random.default_rng(11)
    loras, spare = [make_lora(rng, 2)] * 2, drawn(rng)
    for weights, message in (
        (np.eye(3), "have shape"),
        (np.array([[2.0, -1], [0, 1]]), "must not be negative"),
    ):
        with pytest.raises(UpdateError, match=message):
            mix_products(loras, weights, [(0, 2)], spare=spare)


def test_ata_works_on_product_distances():
    """The nearest client in product space is the one with the same product in other factors."""
    rng = np.random.default_rng(12)
    first, other = make_lora(rng, 2), make_lora(rng, 3)
    turned = {n: t.flip(0) if n.endswith("A") else t.flip(1) for n, t in first.items()}
    weights = adaptive_weights(product_distances([first, turned, other]), [1, 1, 1], 1)
    np.testing.assert_allclose(weights[0], [0.5, 0.5, 0])
