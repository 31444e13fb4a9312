"""A merged checkpoint computes what the stage-1 model computes."""

import pytest
import torch
from families import WRITERS
from perturbed import perturb, private_state
from PIL import Image
from projectors import projector
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from visuals import encoded, visual

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import ModelError
from pilot_flwr.inference.merge import check_mergeable, fold, merge_model, sum_of_adapters
from pilot_flwr.model.loading import load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel

TASKS = ("vqa", "counting", "captioning")


def naive(state, x):
    """The adapter of these tensors, unit by unit."""
    none = torch.zeros_like(state["linear_2.weight"][:, 0])
    out = state.get("linear_2.bias", none).clone()
    for unit, row in enumerate(state["linear_1.weight"]):
        bias = state["linear_1.bias"][unit] if "linear_1.bias" in state else 0.0
        hidden = torch.nn.functional.gelu(row @ x + bias)
        out += state["linear_2.weight"][:, unit] * hidden
    return out


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_the_sum_of_two_adapters_is_one(bias):
    first, second = projector(5, 8, bias=bias).double(), projector(5, 8, bias=bias).double()
    merged = sum_of_adapters(first, second)
    assert merged["linear_1.weight"].shape == (16, 5)
    assert merged["linear_2.weight"].shape == (8, 16)
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(naive(merged, x), first(x) + second(x), rtol=1e-13, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["inert", "equal first layers", "half of each"])
def test_units_that_are_not_needed_are_folded_away(how, bias):
    first, second = projector(5, 8, bias=bias).double(), projector(5, 8, bias=bias).double()
    if how == "inert":
        second.linear_2.weight.zero_()  # its bias still counts
    elif how == "equal first layers":
        second.linear_1.load_state_dict(first.linear_1.state_dict())
    else:
        first.linear_2.weight[:, :4] = 0
        second.linear_2.weight[:, 4:] = 0
    folded = fold(sum_of_adapters(first, second), 8)
    assert folded["linear_1.weight"].shape == (8, 5)
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(naive(folded, x), first(x) + second(x), rtol=1e-13, atol=1e-13)


def test_nothing_is_folded_away_that_is_needed():
    merged = sum_of_adapters(projector(5, 8), projector(5, 8))
    assert fold(merged, 8) is merged


@pytest.fixture
def batch_of(processor):
    data = DataConfig(train_examples=6, test_examples=4)
    examples = client_examples(data, federation_clients(data)[0], "test", seed=0)

    def make(model):
        collator = make_collator(ModelConfig(), processor, max_length=256)
        images = [example.images[0].read() for example in examples]
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return collator.train_batch(examples), visual(model, processor, examples), pixels

    return make


def logits(model, batch, pixels):
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixels
    )
    return output.logits[:, :-1][batch.labels[:, 1:] != -100]


# Largest difference measured in float32: 7e-6 on logits up to 14.5.
CLOSE = {"rtol": 0.0, "atol": 3e-5}


@torch.no_grad()
def test_a_model_without_a_client_adapter_merges_into_a_plain_checkpoint(
    make_model, batch_of, tmp_path
):
    model = perturb(make_model(client_adapter=False))
    batch, seen, pixels = batch_of(model)
    expected = model(batch, seen).logits
    assert merge_model(model, tmp_path, end_token_ids=[2]) == 0
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded.eval(), batch, pixels), expected, **CLOSE)


@torch.no_grad()
def test_a_personal_model_merges_into_a_wider_projector(
    make_model, batch_of, tmp_path, monkeypatch
):
    model = perturb(make_model())
    batch, seen, pixels = batch_of(model)
    expected = model(batch, seen).logits
    width = model.base.config.text_config.hidden_size
    assert merge_model(model, tmp_path, end_token_ids=[2]) == 2 * width
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded.eval(), batch, pixels), expected, **CLOSE)
    with pytest.raises((RuntimeError, ValueError)):  # never a projector that is cut or drawn anew
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_consensus_model_merges_into_a_plain_checkpoint(make_model, batch_of, tmp_path):
    model = make_model()
    model.enter_stage1("vqa", initialisation="identity")
    for group in ("lora", "own_task_adapter"):
        for parameter in model.groups()[group].values():
            parameter.data += 0.05 * torch.randn_like(parameter)
    batch, seen, pixels = batch_of(model)
    expected = model(batch, seen).logits
    assert merge_model(model, tmp_path, end_token_ids=[2]) == 0
    loaded, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert not list(tmp_path.glob("*.py"))
    torch.testing.assert_close(logits(loaded.eval(), batch, pixels), expected, **CLOSE)
    assert loaded.generation_config.eos_token_id == [2]


HOLDS_A_SUM = {
    *("llava-1.5", "interleave", "llava-next", "onevision", "fastvlm"),
    *("idefics3", "smolvlm"),
}
"""Families whose class of projector, or a wider one, computes the sum of two adapters."""


@torch.no_grad()
@pytest.mark.parametrize("personal", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.family("export")
def test_every_family_merges_what_its_projector_can_hold(kind, personal, tmp_path, monkeypatch):
    path = WRITERS[kind](tmp_path / "base")
    config = ModelConfig(path=path, lora=LoraConfig(rank=2))
    model = PilotModel(load_base(config, torch.device("cpu")), config)
    model.enter_stage1("vqa", initialisation="identity")
    for group in ("lora", "own_task_adapter", *["client_adapter"] * personal):
        for parameter in model.groups()[group].values():
            parameter.data += 0.05 * torch.randn_like(parameter)
    if personal and kind not in HOLDS_A_SUM:
        with pytest.raises(ModelError, match="cannot hold the sum of the task adapter and the cli"):
            merge_model(model.eval(), tmp_path / "merged", end_token_ids=[2])
        return
    processor = load_processor(path)
    collator = make_collator(config, processor, max_length=2048)
    one = Example(
        "a",
        (KeptImage(Image.effect_noise((61, 40), 90).convert("RGB")),),
        (Turn("user", "<image>\nWhat is in the image?"), Turn("assistant", "two zebras")),
    )
    batch = collator.train_batch([one])
    expected = model.eval()(batch, visual(model, processor, [one])).logits
    merge_model(model, tmp_path / "merged", end_token_ids=[2])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    output = loaded.eval()(**encoded(load_processor(str(tmp_path / "merged")), collator, one))
    got = output.logits[:, :-1][batch.labels[:, 1:] != -100]
    torch.testing.assert_close(got, expected, **CLOSE)


def test_stage_2_is_refused(make_model, generator):
    model = make_model()
    check_mergeable(private_state(model))
    check_mergeable(None)
    model.enter_stage2(TASKS, generator)
    with pytest.raises(ModelError, match="`--merge` needs a model of stage 1.*adapters of 3 tasks"):
        check_mergeable(private_state(model))
