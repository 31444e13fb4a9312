"""A merged checkpoint computes what the stage-1 model computes."""

import pytest
import torch
from perturbed import perturb, private_state
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from visuals import visual

from pilot_flwr.base import make_collator
from pilot_flwr.connector import Adapter
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.data_settings import DataConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.merging import check_mergeable, fold, merge_model, sum_of_adapters
from pilot_flwr.model_settings import LoraConfig, ModelConfig
from pilot_flwr.models import PilotModel

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
    first, second = Adapter(5, 7, bias=bias).double(), Adapter(5, 7, bias=bias).double()
    merged = sum_of_adapters(first, second)
    assert merged["linear_1.weight"].shape == (14, 5)
    assert merged["linear_2.weight"].shape == (7, 14)
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(naive(merged, x), first(x) + second(x), rtol=1e-13, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["inert", "equal first layers", "half of each"])
def test_units_that_are_not_needed_are_folded_away(how, bias):
    first, second = Adapter(5, 8, bias=bias).double(), Adapter(5, 8, bias=bias).double()
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
    merged = sum_of_adapters(Adapter(5, 8), Adapter(5, 8))
    assert fold(merged, 8) is merged


@pytest.fixture
def batch_of(processor):
    data = DataConfig(train_examples=6, test_examples=4)
    examples = client_examples(data, federation_clients(data)[0], "test", seed=0)

    def make(model):
        collator = make_collator(ModelConfig(), processor, model.llava.config, max_length=256)
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
def test_a_personal_model_merges_into_a_wider_projector(
    make_model, processor, batch_of, tmp_path, monkeypatch
):
    model = perturb(make_model())
    batch, seen, pixels = batch_of(model)
    expected = model(batch, seen).logits
    width = model.llava.config.text_config.hidden_size
    assert merge_model(model, processor, tmp_path, end_token_ids=[2]) == 2 * width
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded.eval(), batch, pixels), expected, **CLOSE)
    with pytest.raises((RuntimeError, ValueError)):  # never a projector that is cut or drawn anew
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_consensus_model_merges_into_a_plain_checkpoint(
    make_model, processor, batch_of, tmp_path
):
    model = make_model()
    model.enter_stage1("vqa", initialisation="identity")
    for group in ("lora", "own_task_adapter"):
        for parameter in model.groups()[group].values():
            parameter.data += 0.05 * torch.randn_like(parameter)
    batch, seen, pixels = batch_of(model)
    expected = model(batch, seen).logits
    width = model.llava.config.text_config.hidden_size
    assert merge_model(model, processor, tmp_path, end_token_ids=[2]) == width
    loaded, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert not list(tmp_path.glob("*.py"))
    torch.testing.assert_close(logits(loaded.eval(), batch, pixels), expected, **CLOSE)
    assert loaded.generation_config.eos_token_id == [2]


def onevision():
    """A random LLaVA-OneVision, tiny."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=CLIPVisionConfig(
            **sizes, num_hidden_layers=2, image_size=16, patch_size=8, projection_dim=16
        ),
        text_config=LlamaConfig(**{**sizes, "hidden_size": 24}, num_hidden_layers=2, vocab_size=50),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config).eval()


@torch.no_grad()
def test_another_architecture_merges_as_well(processor, tmp_path, monkeypatch):
    config = ModelConfig(lora=LoraConfig(rank=2, targets=["q_proj", "down_proj"]))
    model = PilotModel(onevision(), config)
    model.enter_stage1("vqa")
    perturb(model.eval())
    features = torch.randn(2, 5, 16)
    connected = model.connector(features).features
    embedded = torch.randn(1, 6, 24)
    hidden = model.llava.model.language_model(inputs_embeds=embedded).last_hidden_state
    merge_model(model, processor, tmp_path, end_token_ids=[2])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "WideLlavaOnevision"
    torch.testing.assert_close(loaded.model.multi_modal_projector(features), connected, **CLOSE)
    again = loaded.model.language_model(inputs_embeds=embedded).last_hidden_state
    torch.testing.assert_close(again, hidden, **CLOSE)


def test_stage_2_is_refused(make_model, generator):
    model = make_model()
    check_mergeable(private_state(model))
    check_mergeable(None)
    model.enter_stage2(TASKS, generator)
    with pytest.raises(ModelError, match="`--merge` needs a model of stage 1.*3 tasks by a router"):
        check_mergeable(private_state(model))
