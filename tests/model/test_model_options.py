"""Options that change time or memory and must not change the result, or only as they say."""

import importlib.util

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForImageTextToText
from visuals import visual

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import ModelError
from pilot_flwr.model.loading import load_base, make_collator
from pilot_flwr.model.pilot_model import PilotModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples():
    data = DataConfig(train_examples=6)
    return client_examples(data, federation_clients(data)[0], "train", seed=0)[:3]


def build(**config):
    config = ModelConfig(lora=LoraConfig(rank=4), **config)
    torch.manual_seed(0)  # peft draws the LoRA's A
    model = PilotModel(load_base(config, CPU), config)
    model.enter_stage1("vqa", initialisation="official")
    return model


def outcome(model, processor, examples, *, autocast=False):
    """Logits of a training pass, and the gradients of all that is trained."""
    collator = make_collator(ModelConfig(), processor, max_length=99)
    features = visual(model, processor, examples)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(collator.train_batch(examples), features)
        loss = torch.nn.functional.cross_entropy(output.logits.float(), output.labels)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def assert_same(one, other, **tolerance):
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], **tolerance)


def test_layers_that_accelerate_dispatches_compute_the_same(processor, examples):
    """Its hooks replace forward passes, as on several GPUs; here all layers stay on the CPU."""
    plain, model = outcome(build(), processor, examples), build()
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    dispatch_model(model.base, places, main_device="cpu", force_hooks=True)
    assert hasattr(model.base.model.language_model, "_hf_hook")
    assert_same(plain, outcome(model, processor, examples), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device_map", "device", "expected"),
    [
        ("auto", "cuda", "auto"),
        ("auto", "cuda:1", {"": torch.device("cuda:1")}),
        ("single", "cuda", {"": torch.device("cuda")}),
        ("auto", "cpu", None),
    ],
)
def test_the_base_is_spread_over_all_gpus_unless_one_is_named(
    monkeypatch, device_map, device, expected
):
    class Loaded(Exception):
        """Ends the loading."""

    def load(**options):
        raise Loaded(options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    with pytest.raises(Loaded) as caught:
        load_base(ModelConfig(device_map=device_map), torch.device(device))
    assert caught.value.args[0].get("device_map") == expected


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_gradient(processor, examples, autocast):
    plain = outcome(build(), processor, examples, autocast=autocast)
    model = build(gradient_checkpointing=True)
    runs = []
    layer = model.base.model.language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    light = outcome(model, processor, examples, autocast=autocast)
    assert len(runs) == 2  # forward, and again in backward
    assert_same(plain, light, rtol=0, atol=0)


def test_attention_implementations_agree(processor, examples):
    plain = outcome(build(attention="sdpa"), processor, examples)
    eager = build(attention="eager")
    assert eager.base.model.language_model.config._attn_implementation == "eager"
    assert_same(plain, outcome(eager, processor, examples), rtol=1e-3, atol=1e-5)


def test_loras_share_their_inputs_under_autocast_without_a_change(processor, examples, monkeypatch):
    shared = outcome(build(), processor, examples, autocast=True)
    monkeypatch.setattr(PilotModel, "share_lora_inputs", lambda self, shared: None)
    assert_same(shared, outcome(build(), processor, examples, autocast=True), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch and its compiler, of which there are many
def test_compiled_layers_give_the_same(processor, examples):
    model = build(compile=True)
    assert_same(
        outcome(build(), processor, examples),
        outcome(model, processor, examples),
        rtol=1e-3,
        atol=1e-5,
    )
    collator = make_collator(ModelConfig(), processor, max_length=99)
    prompts, features = collator.prompt_batch(examples), visual(model, processor, examples)
    tokens = model.eval().generate(prompts, features, max_new_tokens=3)
    assert torch.equal(tokens, build().eval().generate(prompts, features, max_new_tokens=3))


def test_a_4_bit_base_computes_with_its_rounded_weights_and_all_else_is_whole(processor, examples):
    """The reference is a whole base that is given the rounded weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, whole = (build(quantization=q, dtype="bfloat16") for q in ("4bit", "none"))
    layers = dict(whole.base.named_modules())
    rounded = 0
    for name, module in model.base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert "language_model.layers" in name
            weight = module.weight
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert not torch.equal(values, layers[name].weight)
            layers[name].weight.data.copy_(values)
            rounded += 1
    assert rounded == 7 * model.base.config.text_config.num_hidden_layers
    logits, gradients = outcome(model, processor, examples, autocast=True)
    expected, others = outcome(whole, processor, examples, autocast=True)
    assert gradients.keys() == others.keys()
    assert (logits.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_4_bit_without_its_library_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ModelError, match=r"pip install 'pilot-flwr\[quantization\]'"):
        load_base(ModelConfig(quantization="4bit"), CPU)
