import pytest
import torch
from torch import nn

from pilot_flwr.algorithm.parameter_groups import (
    GROUPS,
    group_parameters,
    trained_groups,
)
from pilot_flwr.errors import ModelError

TASKS = ("vqa", "counting", "captioning")

# Design section 2: "trained" and "frozen" of each stage, written down a second time.
TRAINED = {
    1: {"own_task_adapter", "client_adapter", "lora"},
    2: {"own_task_adapter", "cross_task_adapters", "router", "lora"},
}


def test_what_is_trained_sent_and_private_is_the_designs():
    for stage in (1, 2):
        assert set(trained_groups(stage)) == TRAINED[stage]
    assert {g for g, row in GROUPS.items() if row.sent} == {"lora", "own_task_adapter"}
    private = {g for g, row in GROUPS.items() if row.private}
    assert private == {"client_adapter", "cross_task_adapters", "router"}
    assert not any(row.sent and row.private for row in GROUPS.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_every_parameter_is_claimed_once_and_only_the_trained_ones_have_gradients(
    make_model, generator, stage
):
    model = make_model()
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    groups = group_parameters(model.base, own_task="vqa")
    claimed = [id(p) for named in groups.values() for p in named.values()]
    assert sorted(claimed) == sorted(id(p) for p in model.base.parameters())
    for group, named in groups.items():
        for parameter in named.values():
            assert parameter.requires_grad == (group in TRAINED[stage])


def test_group_sizes_are_those_of_the_formulas(make_model, generator):
    model = make_model()
    model.enter_stage2(TASKS, generator)
    text, vision = model.base.config.text_config, model.base.config.vision_config
    d, c, rank = vision.hidden_size, text.hidden_size, model.config.lora.rank
    one_adapter = d * c + c + c * c + c
    key_value = text.num_key_value_heads * text.head_dim
    lora_per_layer = rank * (
        2 * (c + c)  # q_proj, o_proj
        + 2 * (c + key_value)  # k_proj, v_proj
        + 3 * (c + text.intermediate_size)  # gate_proj, up_proj, down_proj
    )
    sizes = {g: sum(p.numel() for p in named.values()) for g, named in model.groups().items()}
    assert sizes["own_task_adapter"] == sizes["client_adapter"] == one_adapter
    assert sizes["foreign_task_adapters"] == sizes["cross_task_adapters"] == 2 * one_adapter
    assert sizes["router"] == d * len(TASKS)
    assert sizes["lora"] == text.num_hidden_layers * lora_per_layer


def test_names_within_a_group_do_not_depend_on_stage_or_own_task(make_model, generator):
    model = make_model("counting")
    before = set(model.state("own_task_adapter"))
    model.enter_stage2(TASKS, generator)
    assert set(model.state("own_task_adapter")) == before == {
        "linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"
    }  # fmt: skip
    assert {name.split("/")[0] for name in model.state("foreign_task_adapters")} == {
        "vqa",
        "captioning",
    }


def test_an_unclaimed_parameter_is_an_error(make_model):
    model = make_model()
    model.connector.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ModelError, match=r"pilot\.extra.*matches no group"):
        group_parameters(model.base, own_task="vqa")


def test_a_lora_outside_the_language_model_is_unclaimed(make_model):
    model = make_model()
    model.base.model.vision_tower.lora_A = nn.Linear(1, 1)
    with pytest.raises(ModelError, match="matches no group"):
        group_parameters(model.base, own_task="vqa")


def test_a_models_groups_are_those_of_its_architecture_now(make_model, generator):
    """They are looked up once for each: never may they be of a connector that has gone."""
    model = make_model("vqa")
    layer = next(iter(model.state("lora"))).removesuffix(".lora_A")
    base = model.base.model.language_model.get_submodule(layer).base_layer
    residual = {
        f"{layer}.lora_A": torch.zeros(3, base.in_features),
        f"{layer}.lora_B": torch.zeros(base.out_features, 3),
    }
    changes = (
        lambda: model.enter_stage2(("vqa", "captioning"), generator),
        lambda: model.set_residual(residual),
        lambda: model.set_residual({}),
        lambda: model.enter_stage1("captioning"),
    )
    for change in changes:
        before = model.groups()
        change()
        now, found = model.groups(), group_parameters(model.base, own_task=model.own_task)
        assert now is not before and now.keys() == found.keys()
        for group, named in found.items():
            assert list(named) == list(now[group])
            assert all(now[group][name] is p for name, p in named.items())


def test_a_models_groups_are_kept_while_its_architecture_stays(make_model):
    model = make_model("vqa")
    before = model.groups()
    model.load("lora", model.state("lora"))
    model.set_residual({})
    assert model.groups() is before


def test_a_task_name_is_matched_whole(make_model, generator):
    """`vq` must not claim `vqa`'s adapters, whatever the regular expression makes of it."""
    model = make_model("vq")
    model.enter_stage2(("vq", "vqa"), generator)
    assert {n.split("/")[0] for n in model.state("foreign_task_adapters")} == {"vqa"}


def test_load_wants_exactly_the_groups_names_and_shapes(make_model):
    model = make_model()
    state = model.state("client_adapter")
    ones = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    model.load("client_adapter", ones)
    assert all(torch.equal(t, ones[n]) for n, t in model.state("client_adapter").items())
    bias = ones.pop("linear_2.bias")
    missing = r"client_adapter: missing tensors \['linear_2.bias'\], unexpected ones \['c'\]"
    with pytest.raises(ModelError, match=missing):
        model.load("client_adapter", {**ones, "c": bias})
    size = len(bias)
    shapes = rf"torch float32 \({size + 1},\) but must be torch float32 \({size},\)"
    with pytest.raises(ModelError, match=f"`linear_2.bias` is {shapes}"):
        model.load("client_adapter", {**ones, "linear_2.bias": torch.ones(size + 1)})


def test_read_copies(make_model):
    model = make_model()
    state = model.state("lora")
    name = next(iter(state))
    state[name] += 1
    assert not torch.equal(state[name], model.state("lora")[name])
