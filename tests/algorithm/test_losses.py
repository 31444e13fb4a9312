import math

import pytest
import torch

from pilot_flwr.algorithm.losses import difference_loss, gram, load_balancing_loss, router_z_loss


def features(images: int, tokens: int, channels: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, tokens, channels, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]


def naive_energy(task: torch.Tensor, client: torch.Tensor) -> float:
    """‖x_tᵀ x_s‖²_F of one image, entry by entry of the C×C matrix."""
    tokens, channels = task.shape
    total = 0.0
    for i in range(channels):
        for j in range(channels):
            total += sum(float(task[n, i] * client[n, j]) for n in range(tokens)) ** 2
    return total


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3), (1, 4, 4), (3, 1, 2)])
def test_frobenius_is_the_papers_formula(shape):
    task, client = features(*shape)
    expected = sum(naive_energy(t, c) for t, c in zip(task, client, strict=True)) / shape[0]
    assert difference_loss(task, client, reduction="frobenius").item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3)])
def test_normalized_scales_each_image_to_unit_norm(shape):
    task, client = features(*shape)
    expected = 0.0
    for t, c in zip(task, client, strict=True):
        t_norm = math.sqrt(sum(float(x) ** 2 for x in t.flatten()))
        c_norm = math.sqrt(sum(float(x) ** 2 for x in c.flatten()))
        expected += naive_energy(t / t_norm, c / c_norm) / shape[0]
    assert difference_loss(task, client, reduction="normalized").item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(2, 3, 5), (7, 1, 2)])
def test_official_is_the_mean_over_all_entries_of_the_big_matrix(shape):
    task, client = features(*shape)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(shape[0], -1)
        return flat / (flat.norm(dim=1, keepdim=True) + 1e-6)

    matrix = scaled(task).T @ scaled(client)
    assert matrix.shape == (shape[1] * shape[2],) * 2
    expected = float((matrix**2).mean())
    got = difference_loss(task, client, reduction="official").item()
    assert got == pytest.approx(expected, rel=1e-12)


def test_official_gives_no_gradient_through_the_norm():
    task, client = (x.requires_grad_() for x in features(2, 3, 4))
    ours = torch.autograd.grad(difference_loss(task, client, reduction="official"), task)[0]

    def scaled(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(2, -1)
        return flat / (flat.norm(dim=1, keepdim=True).detach() + 1e-6)

    direct = ((scaled(task).T @ scaled(client)) ** 2).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(direct, task)[0])


@pytest.mark.parametrize("reduction", ["normalized", "frobenius"])
@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 3, 2)])
def test_difference_loss_gradient(reduction, shape):
    task, client = (x.requires_grad_() for x in features(*shape))
    assert torch.autograd.gradcheck(
        lambda a, b: difference_loss(a, b, reduction=reduction), (task, client)
    )


def test_gram_gradient_for_an_asymmetric_upstream_gradient():
    x = features(2, 3, 4)[0].requires_grad_()
    weights = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda a: (gram(a) * weights).sum(), x)


def test_normalized_is_zero_for_orthogonal_and_one_for_equal_rank_one_features():
    a = torch.tensor([[[1.0], [0.0]]])  # one channel, two tokens
    b = torch.tensor([[[0.0], [1.0]]])
    assert difference_loss(a, b, reduction="normalized").item() == pytest.approx(0.0)
    assert difference_loss(a, a, reduction="normalized").item() == pytest.approx(1.0)


def test_normalized_stays_within_zero_and_one():
    for seed in range(20):
        task, client = features(2, 6, 4, seed)
        assert 0 <= difference_loss(task, client, reduction="normalized").item() <= 1


def test_zero_client_features_have_a_finite_gradient():
    """At identity initialisation x_s is exactly zero."""
    task = features(1, 3, 4)[0].requires_grad_()
    client = torch.zeros(1, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = difference_loss(task, client, reduction="normalized")
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(task.grad).all()
    assert torch.isfinite(client.grad).all()


def test_bfloat16_features_are_reduced_in_float32():
    task, client = (x.to(torch.bfloat16) for x in features(1, 8, 4))
    loss = difference_loss(task, client, reduction="normalized")
    exact = difference_loss(task.double(), client.double(), reduction="normalized")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_autocast_does_not_lower_the_loss_precision():
    task, client = (x.float() for x in features(1, 8, 64))
    plain = difference_loss(task, client, reduction="normalized")
    with torch.autocast("cpu", torch.bfloat16):
        assert difference_loss(task, client, reduction="normalized").item() == plain.item()


def test_difference_loss_refuses_other_shapes_and_reductions():
    task, client = features(2, 3, 4)
    with pytest.raises(ValueError, match="one shape"):
        difference_loss(task, client[:, :2], reduction="normalized")
    with pytest.raises(ValueError, match="Unknown reduction 'mean'"):
        difference_loss(task, client, reduction="mean")


def test_load_balancing_loss_is_the_naive_sum():
    logits = features(2, 5, 3)[0]
    probs = logits.softmax(-1)
    tokens = probs.reshape(-1, 3)
    expected = 0.0
    for expert in range(3):
        share = sum(int(row.argmax()) == expert for row in tokens) / len(tokens)
        mean = sum(float(row[expert]) for row in tokens) / len(tokens)
        expected += 3 * share * mean
    assert load_balancing_loss(probs).item() == pytest.approx(expected)


def test_load_balancing_loss_is_one_when_even_and_T_when_collapsed():
    even = torch.eye(4).repeat(3, 1)
    collapsed = torch.eye(4)[:1].repeat(8, 1)
    assert load_balancing_loss(even).item() == pytest.approx(1.0)
    assert load_balancing_loss(collapsed).item() == pytest.approx(4.0)


@pytest.mark.parametrize("images", [1, 4])
def test_load_balancing_per_image_is_the_official_double_mean(images):
    """The official code's ``(density_proxy * density).mean() * T²``, image by image, in a loop."""
    probs = features(images, 5, 3)[0].softmax(-1)
    products = []
    for image in probs.tolist():
        for expert in range(3):
            share = sum(row.index(max(row)) == expert for row in image) / len(image)
            products.append(share * sum(row[expert] for row in image) / len(image))
    expected = sum(products) / len(products) * 3**2
    got = load_balancing_loss(probs, reduction="per_image").item()
    assert got == pytest.approx(expected, rel=1e-12)
    if images == 1:
        assert got == pytest.approx(load_balancing_loss(probs).item(), rel=1e-12)


def test_images_that_collapse_on_different_experts_are_balanced_only_when_pooled():
    """Three images, three experts: every token of image i puts p on expert i, the rest is even.

    Per image: f_i = 1 and P̄_i = p for one expert, so L_b = 3 p; p = 0.9033 gives 2.71. Pooled: f_i
    = 1/3 and P̄_i = (p + 2 (1 − p)/2) / 3 = 1/3 for each, so L_b = 3 · 3 · 1/9 = 1 for every p.
    """
    p = 0.9033
    rest = (1 - p) / 2
    one = torch.full((3, 3), rest, dtype=torch.float64).fill_diagonal_(p)
    probs = one[:, None].expand(3, 7, 3)
    assert load_balancing_loss(probs, reduction="per_image").item() == pytest.approx(3 * p)
    assert load_balancing_loss(probs, reduction="per_image").item() == pytest.approx(2.71, abs=5e-3)
    assert load_balancing_loss(probs, reduction="pooled").item() == pytest.approx(1.0)


def test_load_balancing_loss_refuses_another_reduction():
    with pytest.raises(ValueError, match="Unknown reduction 'sum'"):
        load_balancing_loss(torch.ones(2, 3), reduction="sum")


def test_load_balancing_gradient_flows_through_the_mean_probability_only():
    probs = features(1, 6, 3)[0].softmax(-1).requires_grad_()
    load_balancing_loss(probs).backward()
    share = torch.nn.functional.one_hot(probs.argmax(-1).flatten(), 3).double().mean(0)
    torch.testing.assert_close(probs.grad[0], (3 * share / 6).expand(6, 3))


def test_router_z_loss_is_the_naive_mean():
    logits = features(2, 5, 3)[0]
    rows = logits.reshape(-1, 3).tolist()
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in rows) / len(rows)
    assert router_z_loss(logits).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "loss",
    [
        router_z_loss,
        lambda x: load_balancing_loss(x.softmax(-1)),
        lambda x: load_balancing_loss(x.softmax(-1), reduction="per_image"),
    ],
)
def test_router_loss_gradients(loss):
    logits = features(2, 4, 3)[0].requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
