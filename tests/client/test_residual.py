"""What exact aggregation adds to the frozen base: in the model, in a run, on disk, in an export."""

import copy

import peft
import pytest
import torch
from inprocess import TWO_TASKS, Federation
from quick_training import quick_training
from safetensors.torch import load_file

from pilot_flwr.config.loading import load_config, to_yaml
from pilot_flwr.errors import ConfigError, ModelError
from pilot_flwr.flower.messages import decode_instruction, decode_update
from pilot_flwr.inference.export import export_lora
from pilot_flwr.inference.merge import merge_lora
from pilot_flwr.inference.runs import client_model, open_run
from pilot_flwr.model.loading import loaded_model
from pilot_flwr.run.checkpoint import latest_checkpoint
from pilot_flwr.server.resume import restored

FEDEX = f"{TWO_TASKS} strategy=fedex_lora evaluation.enabled=false"


@pytest.fixture
def model():
    config = load_config("").model
    model = loaded_model(config, reduction="normalized", device=torch.device("cpu"))
    model.enter_stage1("vqa")
    yield model
    model.set_residual({})


def draw_residual(model, ranks):
    generator = torch.Generator().manual_seed(0)
    layers = [name.removesuffix(".lora_A") for name in model.state("lora") if name[-1] == "A"]
    residual = {}
    for layer, rank in zip(layers, ranks, strict=False):
        base = model.base.model.language_model.get_submodule(layer).base_layer
        a, b = (rank, base.in_features), (base.out_features, rank)
        residual[f"{layer}.lora_A"] = torch.randn(a, generator=generator)
        residual[f"{layer}.lora_B"] = torch.randn(b, generator=generator)
    return residual


def test_a_layer_computes_with_the_sum_of_all_three(model):
    residual = draw_residual(model, [3, 5])
    lora = {name: torch.randn_like(tensor) for name, tensor in model.state("lora").items()}
    model.set_residual(residual)
    model.load("lora", lora)
    x = torch.randn(4, 96)
    for layer in list(lora)[0][:-7], list(lora)[2][:-7]:
        module = model.base.model.language_model.get_submodule(layer)
        product = lora[f"{layer}.lora_B"].double() @ lora[f"{layer}.lora_A"].double()
        product += residual[f"{layer}.lora_B"].double() @ residual[f"{layer}.lora_A"].double()
        weight = module.base_layer.weight.double() + 16 / 8 * product
        expected = x.double() @ weight.T
        torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-3)


def test_it_is_frozen_and_leaves_no_trace(model):
    before = {name: (p.requires_grad, p.shape) for name, p in model.named_parameters()}
    residual = draw_residual(model, [3])
    model.set_residual(residual)
    groups = model.groups()
    assert groups["residual"].keys() == residual.keys()
    assert not any(p.requires_grad for p in groups["residual"].values())
    assert all(p.requires_grad for p in groups["lora"].values())
    model.set_residual(draw_residual(model, [7, 2]))  # of another rank, in place of it
    assert {len(p) for n, p in model.groups()["residual"].items() if n[-1] == "A"} == {7, 2}
    model.set_residual({})
    assert {name: (p.requires_grad, p.shape) for name, p in model.named_parameters()} == before


def test_a_residual_that_does_not_fit_is_refused(model):
    residual = draw_residual(model, [3])
    with pytest.raises(ModelError, match=r"unexpected .*\['nowhere.lora_A'\]"):
        model.set_residual(residual | {"nowhere.lora_A": torch.zeros(3, 3)})
    (name, tensor) = next(iter(residual.items()))
    with pytest.raises(ModelError, match="has factors of shape \\[0, 96\\]"):
        model.set_residual(residual | {name: tensor[:0]})
    with pytest.raises(ModelError, match=r"float32 \(3, 95\) but must be"):
        model.set_residual(residual | {name: tensor[:, :-1]})


def test_the_export_has_lora_and_residual_in_one(model, tmp_path):
    residual = draw_residual(model, [3, 5])
    model.set_residual(residual)
    export_lora(model, tmp_path, base="somewhere")
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config.r == 8 + 5 and config.lora_alpha / config.r == 16 / 8
    for layer in {name[:-7] for name in residual}:
        prefix = f"base_model.model.model.language_model.{layer}"
        found = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        lora = model.state("lora")
        expected = lora[f"{layer}.lora_B"] @ lora[f"{layer}.lora_A"]
        expected += residual[f"{layer}.lora_B"] @ residual[f"{layer}.lora_A"]
        torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with quick_training():
        return Federation(tmp_path_factory.mktemp("fedex"), FEDEX).run()


def test_after_a_round_every_client_has_the_mean_of_all_weights(run):
    """W + s (R + B A) of the orders of exchange 2 is the mean of what exchange 1 sent back."""
    updates = [decode_update(m.content) for m in run.replies("train")]
    first = [update for update in updates if update.server_round == 1]
    orders = [
        decode_instruction(m.content)[0]
        for m in run.grid.messages
        if m.metadata.message_type == "train" and not m.metadata.reply_to_message_id
    ]
    assert all(not order.residual for order in orders if order.server_round == 1)
    assert len(first) == 4
    shares = []
    for order in (order for order in orders if order.server_round == 2):
        for name in (name for name in order.lora if name.endswith("A")):
            layer = name[:-7]
            mean = sum(product(u.lora, layer) * u.num_examples for u in first)
            mean = mean / sum(u.num_examples for u in first)
            found = product(order.lora, layer) + product(order.residual, layer)
            scale = max(product(u.lora, layer).abs().max() for u in first)
            torch.testing.assert_close(found, mean, rtol=0, atol=float(1e-6 * scale))
            without = product(order.lora, layer)  # FedAvg of the factors
            shares.append(float((without - mean).norm() / mean.norm()))
    assert max(shares) > 0.01  # far more than rounding: R matters


def product(state, layer):
    if f"{layer}.lora_A" not in state:
        return torch.zeros(())
    return state[f"{layer}.lora_B"].double() @ state[f"{layer}.lora_A"].double()


def test_the_checkpoint_has_it_and_the_next_round_is_the_same_bit_by_bit(run):
    checkpoint, _ = latest_checkpoint(run.folder.checkpoints)
    state = run.strategy.state
    again = restored(checkpoint, state.tasks, state.initial)
    assert again.residual and again.residual.keys() == state.residual.keys()
    updates = [decode_update(m.content) for m in run.replies("train")]
    whole = copy.deepcopy(state)
    for server in (whole, again):
        server.aggregate([u for u in updates if u.server_round == 2], run.config.strategy)
    for name, tensor in whole.residual.items():
        assert torch.equal(again.residual[name], tensor)


def test_it_is_in_the_timeline(run):
    sizes = [event["down"].get("residual", 0) for event in run.events("order")]
    assert sizes[:4] == [0] * 4 and min(sizes[4:]) > 0
    assert "R " in (run.folder.path / "timeline.md").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.sharing.lora=A", "`strategy.sharing.lora` is A but must be AB"),
        ("strategy.server_optimizer.name=adam", "must be none with `strategy.lora=exact`"),
        ("train.personal.model=whole train.epochs=2", "`train.personal.model` is whole"),
    ],
)
def test_what_does_not_go_with_it_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(f"strategy=fedex_lora {override}")


def test_a_merged_model_has_it_in_its_weights(model):
    residual = draw_residual(model, [3])
    model.set_residual(residual)
    lora = {name: torch.randn_like(tensor) for name, tensor in model.state("lora").items()}
    model.load("lora", lora)
    layer = next(iter(residual))[:-7]
    language_model = copy.deepcopy(model.base.model.language_model)
    before = language_model.get_submodule(layer).base_layer.weight.clone()
    merge_lora(language_model)
    found = language_model.get_submodule(layer).weight
    expected = before + 16 / 8 * (product(lora, layer) + product(residual, layer)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_finished_run_gives_each_client_its_model_with_it(run):
    run.folder.write("config.yaml", to_yaml(run.config))
    opened = open_run(run.folder.path)
    loaded = client_model(opened, "vqa-0", device=torch.device("cpu"))
    found = loaded.state("residual")
    assert found and all(torch.equal(found[n], t) for n, t in run.strategy.state.residual.items())
    loaded.set_residual({})
