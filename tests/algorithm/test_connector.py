import math

import pytest
import torch
from projectors import projector
from torch import nn

from pilot_flwr.algorithm.connector import (
    CrossTaskMoA,
    TaskClientConnector,
    copied,
    merge_features,
    stage1_connector,
    stage2_connector,
)
from pilot_flwr.algorithm.losses import difference_loss, load_balancing_loss, router_z_loss
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError

B, N, D, C = 2, 3, 4, 6
LAST = "linear_2"
TASKS = ("vqa", "ocr", "caption")


@pytest.fixture
def visual() -> torch.Tensor:
    return torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def adapter(seed: int, bias: bool = True) -> nn.Module:
    made = projector(D, C, bias=bias).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return made


def moa(use_client_adapter: bool = True) -> CrossTaskMoA:
    return CrossTaskMoA(
        {task: adapter(i) for i, task in enumerate(TASKS)},
        {task: adapter(10 + i) for i, task in enumerate(TASKS[1:])},
        adapter(20),
        torch.nn.Linear(D, len(TASKS), bias=False).double(),
        use_client_adapter=use_client_adapter,
    )


def naive_mlp(module: nn.Module, token: torch.Tensor) -> list[float]:
    """The MLP for one token in plain Python, GELU by the error function."""

    def affine(layer, vector):
        return [
            sum(w * v for w, v in zip(row, vector, strict=True)) + b
            for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        ]

    hidden = affine(module.linear_1, token.tolist())
    hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
    return affine(module.linear_2, hidden)


def test_stage1_is_the_sum_of_both_adapters(visual):
    task, client = adapter(1), adapter(2)
    output = TaskClientConnector(task, client)(visual)
    for b in range(B):
        for n in range(N):
            pairs = zip(naive_mlp(task, visual[b, n]), naive_mlp(client, visual[b, n]), strict=True)
            expected = torch.tensor([x + y for x, y in pairs], dtype=torch.float64)
            torch.testing.assert_close(output.features[b, n], expected)
    expected = difference_loss(task(visual), client(visual), reduction="normalized")
    torch.testing.assert_close(output.difference, expected)
    assert output.balance.item() == output.z.item() == 0


@pytest.mark.parametrize("use_client_adapter", [True, False])
def test_stage2_is_the_mixture_of_the_design(visual, use_client_adapter):
    module = moa(use_client_adapter)
    output = module(visual)
    for b in range(B):
        for n in range(N):
            token = visual[b, n]
            logits = [
                sum(w * v for w, v in zip(row, token.tolist(), strict=True))
                for row in module.router.weight.tolist()
            ]
            weights = [math.exp(g) / sum(map(math.exp, logits)) for g in logits]
            expected = naive_mlp(module.client_adapter, token) if use_client_adapter else [0.0] * C
            for i, task in enumerate(TASKS):
                expert = naive_mlp(module.task_adapters[task], token)
                if i > 0:
                    cross = naive_mlp(module.cross_task_adapters[task], token)
                    expert = [x + y for x, y in zip(expert, cross, strict=True)]
                expected = [x + weights[i] * y for x, y in zip(expected, expert, strict=True)]
            torch.testing.assert_close(
                output.features[b, n], torch.tensor(expected, dtype=torch.float64)
            )
    logits = torch.einsum("bnd,td->bnt", visual, module.router.weight)
    torch.testing.assert_close(output.balance, load_balancing_loss(logits.softmax(-1)))
    torch.testing.assert_close(output.z, router_z_loss(logits))
    assert output.difference.item() == 0


def test_a_bfloat16_router_rounds_like_a_module_in_bfloat16(visual):
    """Gate and losses as torch computes them in bfloat16; only the softmax is in float32."""
    visual, plain = visual.float(), moa().float()
    coarse = CrossTaskMoA(
        plain.task_adapters,
        plain.cross_task_adapters,
        plain.client_adapter,
        plain.router,
        router_dtype="bfloat16",
        reduction="per_image",
    )
    gate = torch.nn.Linear(D, len(TASKS), bias=False).to(torch.bfloat16)
    gate.load_state_dict(plain.router.state_dict())
    logits = gate(visual.bfloat16())
    probs = torch.nn.functional.softmax(logits, dim=-1, dtype=torch.float).bfloat16()
    got, fine = coarse.route(visual), plain.route(visual)
    assert torch.equal(got.probs, probs)
    assert torch.equal(got.z, torch.logsumexp(logits, -1).square().mean())
    choices = torch.nn.functional.one_hot(probs.argmax(-1), len(TASKS)).float().mean(1)
    expected = (probs.mean(1) * choices).mean() * len(TASKS) ** 2
    torch.testing.assert_close(got.balance, expected)
    assert fine.probs.dtype == torch.float32
    assert not torch.equal(fine.probs, got.probs.float())
    torch.testing.assert_close(
        coarse(visual).features, plain(visual).features, rtol=0.05, atol=0.05
    )


def test_connector_gradients(visual):
    visual = visual[:1, :2].requires_grad_()
    assert torch.autograd.gradcheck(TaskClientConnector(adapter(1), adapter(2)), visual)
    module = moa()
    parts = lambda x: (module(x).features, module(x).balance, module(x).z)  # noqa: E731
    assert torch.autograd.gradcheck(parts, visual)


def test_identity_initialisation_starts_at_the_projector(visual):
    own = adapter(3)
    connector = stage1_connector(own, ModelConfig(initialisation="identity"), last=LAST)
    assert torch.equal(connector(visual).features, own(visual))
    # Only the last layer of ψ_s is zero, so that it can learn.
    assert connector.client_adapter.linear_1.weight.abs().sum() > 0


def test_official_initialisation_copies_the_projector_everywhere(visual):
    own = adapter(3)
    stage1 = stage1_connector(own, ModelConfig(initialisation="official"), last=LAST)
    torch.testing.assert_close(stage1(visual).features, 2 * own(visual))
    stage2 = stage2_connector(
        own,
        ModelConfig(initialisation="official", stage2_client_adapter="off"),
        last=LAST,
        channels=D,
        tasks=TASKS,
        client_adapter=stage1.client_adapter,
        generator=torch.Generator().manual_seed(0),
    )
    for cross in stage2.cross_task_adapters.values():
        assert torch.equal(cross(visual), own(visual))


def test_inert_stage2_with_equal_task_adapters_is_the_projector(visual):
    """Σ_i P_i = 1: if all ψ_t are the projector and ψ_s, ψ_c are inert, so is the mixture."""
    own = adapter(3)
    connector = stage2_connector(
        own,
        ModelConfig(initialisation="identity"),
        last=LAST,
        channels=D,
        tasks=TASKS,
        client_adapter=copied(own, LAST),
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(connector(visual).features, own(visual))


def test_one_task_needs_no_cross_task_adapter(visual):
    own = adapter(1)
    router = torch.nn.Linear(D, 1, bias=False).double()
    module = CrossTaskMoA({"vqa": own}, {}, adapter(2), router, use_client_adapter=False)
    torch.testing.assert_close(module(visual).features, own(visual))


def test_without_a_client_adapter_stage_1_is_the_task_adapter(visual):
    own = adapter(3)
    connector = stage1_connector(
        own, ModelConfig(initialisation="official", client_adapter=False), last=LAST
    )
    output = connector(visual)
    assert torch.equal(output.features, own(visual))
    assert output.difference.item() == 0
    assert {name for name, _ in connector.named_parameters()} == {
        f"task_adapter.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("client", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
def test_ct_moa_without_some_of_its_parts_is_as_if_they_were_zero(visual, client, crossed):
    """Those that are left out have no parameters; the rest computes what it did."""
    whole = moa()
    inert = [] if client else [whole.client_adapter]
    inert += [] if crossed else whole.cross_task_adapters.values()
    for parameter in (p for part in inert for p in part.linear_2.parameters()):
        torch.nn.init.zeros_(parameter)
    part = stage2_connector(
        adapter(5),
        ModelConfig(initialisation="official", cross_task_adapters=crossed),
        last=LAST,
        channels=D,
        tasks=TASKS,
        client_adapter=whole.client_adapter if client else None,
        generator=torch.Generator().manual_seed(0),
    )
    missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
    assert missing == []
    present = {"client_adapter": client, "cross_task_adapters": crossed}
    absent = {name for name, there in present.items() if not there}
    assert {name.split(".")[0] for name in unexpected} == absent
    torch.testing.assert_close(part(visual).features, whole(visual).features)


def test_adapters_without_bias(visual):
    plain = adapter(1, bias=False)
    connector = stage1_connector(plain, ModelConfig(initialisation="identity"), last=LAST)
    assert torch.equal(connector(visual).features, plain(visual))


def test_copies_are_independent():
    original = adapter(1)
    twin = copied(original)
    with torch.no_grad():
        twin.linear_1.weight.zero_()
    assert original.linear_1.weight.abs().sum() > 0


def test_copying_draws_no_random_numbers():
    original = adapter(1)
    before = torch.get_rng_state()
    copied(original)
    assert torch.equal(torch.get_rng_state(), before)


def test_router_is_drawn_from_the_generator_alone():
    def router_weight(seed: int) -> torch.Tensor:
        return stage2_connector(
            adapter(1),
            ModelConfig(initialisation="identity"),
            last=LAST,
            channels=D,
            tasks=TASKS,
            client_adapter=adapter(2),
            generator=torch.Generator().manual_seed(seed),
        ).router.weight

    torch.manual_seed(1)
    first = router_weight(5)
    torch.manual_seed(2)
    assert torch.equal(first, router_weight(5))
    assert not torch.equal(first, router_weight(6))
    assert first.abs().max() <= D**-0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cross_task_adapters": {"ocr": adapter(1)}}, "must be for the foreign tasks"),
        ({"router": torch.nn.Linear(D, 2, bias=False)}, "2 outputs but there are 3 tasks"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed, message):
    parts = {
        "task_adapters": {task: adapter(0) for task in TASKS},
        "cross_task_adapters": {task: adapter(0) for task in TASKS[1:]},
        "client_adapter": adapter(0),
        "router": torch.nn.Linear(D, 3, bias=False),
    }
    with pytest.raises(ModelError, match=message):
        CrossTaskMoA(**(parts | changed))


def test_task_names_that_torch_uses_are_refused():
    router = torch.nn.Linear(D, 1, bias=False)
    with pytest.raises(ModelError, match="'keys' is reserved"):
        CrossTaskMoA({"keys": adapter(0)}, {}, adapter(1), router)


@pytest.mark.parametrize("task", ["keys", "training"])
def test_a_task_name_that_torch_has_taken_is_refused(task):
    adapters = {name: projector(2, 3) for name in ("vqa", task)}
    with pytest.raises(ModelError, match=f"Task name '{task}' is reserved by torch"):
        CrossTaskMoA(
            adapters, {task: projector(2, 3)}, projector(2, 3), nn.Linear(2, 2, bias=False)
        )


@pytest.mark.parametrize(("side", "square"), [(1, True), (2, True), (3, True), (2, False)])
def test_merged_features_are_a_square_or_adjacent(side, square):
    """A square of a grid of 6 x 6 features, or features that follow each other; by indices."""
    features = torch.arange(2 * 36 * 3).reshape(2, 36, 3)
    made = merge_features(features, side, square=square)
    edge = 6 // side
    assert made.shape == (2, edge * edge, 3 * side * side)
    for image in range(2):
        for token in range(edge * edge):
            row, column = divmod(token, edge)
            if square:
                cells = [
                    (row * side + i, column * side + j) for i in range(side) for j in range(side)
                ]
                places = [6 * r + c for r, c in cells]
            else:
                places = range(token * side * side, (token + 1) * side * side)
            expected = torch.cat([features[image, place] for place in places])
            assert torch.equal(made[image, token], expected)


class Merger(nn.Module):
    """Joins pairs of features: a projector with fewer tokens than features."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(2 * D, C).double()

    def forward(self, features):
        return self.linear(features.reshape(*features.shape[:-2], -1, 2 * D))


@pytest.mark.parametrize("reduction", ["normalized", "frobenius"])
def test_packed_images_have_the_losses_of_separate_ones(reduction):
    """Packed images of 4 and 8 features: L_d is the mean of the two losses."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, n, D, dtype=torch.float64, generator=generator) for n in (4, 8)]
    stage1 = TaskClientConnector(Merger(1), Merger(2), reduction=reduction)
    packed = stage1(torch.cat(images, dim=1)[0], (4, 8))
    separate = [stage1(image) for image in images]
    torch.testing.assert_close(packed.features, torch.cat([o.features[0] for o in separate]))
    torch.testing.assert_close(packed.difference, sum(o.difference for o in separate) / 2)


def test_a_router_decides_per_token_and_its_losses_are_per_image():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, n, D, dtype=torch.float64, generator=generator) for n in (4, 8)]
    stage2 = CrossTaskMoA(
        {"a": Merger(1), "b": Merger(2)},
        {"b": Merger(3)},
        None,
        nn.Linear(2 * D, 2, bias=False).double(),
        merge=lambda features: features.reshape(*features.shape[:-2], -1, 2 * D),
        reduction="per_image",
    )
    packed = stage2(torch.cat(images, dim=1)[0], (4, 8))
    separate = [stage2(image) for image in images]
    assert packed.features.shape == (6, C)
    torch.testing.assert_close(packed.features, torch.cat([o.features[0] for o in separate]))
    torch.testing.assert_close(packed.balance, sum(o.balance for o in separate) / 2)


class Square(nn.Module):
    """A projector that gives the tokens of an image as a grid."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.inner(features).unflatten(1, (2, 2))


def test_tokens_in_a_grid_are_flattened():
    features = torch.randn(3, 4, D, dtype=torch.float64)
    plain = TaskClientConnector(adapter(1), adapter(2))(features)
    square = TaskClientConnector(Square(adapter(1)), Square(adapter(2)))(features)
    assert all(torch.equal(one, other) for one, other in zip(plain, square, strict=True))
    router = nn.Linear(D, len(TASKS), bias=False).double()

    def mixture(wrap):
        tasks = {task: wrap(adapter(i)) for i, task in enumerate(TASKS)}
        crossed = {task: wrap(adapter(10 + i)) for i, task in enumerate(TASKS[1:])}
        return CrossTaskMoA(tasks, crossed, wrap(adapter(20)), router)(features)

    pairs = zip(mixture(lambda inner: inner), mixture(Square), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
