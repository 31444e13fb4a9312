"""`plan` for every family and every file of conf/model, against the models themselves."""

import functools
import json

import pytest
import torch
from families import WRITERS
from PIL import Image
from transformers import AutoModelForImageTextToText

from pilot_flwr.cli import main as cli
from pilot_flwr.config.loading import config_folder, load_config
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.model.architectures import SPECS, known_config, spec_of
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.resource_plan import make_plan

SIZE = (61, 90)
MODELS = sorted(file.stem for file in (config_folder() / "model").glob("*.yaml"))
SMALLER = {
    *("llava-1.5-7b", "llava-1.6-mistral-7b", "llava-onevision-0.5b", "qwen2.5-vl-3b"),
    *("qwen3-vl-4b", "internvl3-2b", "gemma-3-4b", "smolvlm2-0.5b"),
}
"""A size of every family that a card of 24 GiB trains."""


def linear_layers(decoder):
    """Paths of the linear layers of a decoder's first layer."""
    modules = decoder.layers[0].named_modules()
    return {name for name, module in modules if isinstance(module, torch.nn.Linear)}


def numbers(model):
    return {
        group: sum(p.numel() for p in named.values()) for group, named in model.groups().items()
    }


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.family("plan")
def test_the_plan_of_a_family_is_that_of_its_model(name, tmp_path):
    path = WRITERS[name](tmp_path / "base")
    config = load_config(f"model.path={path} model.lora.rank=2 data.tasks=[vqa,counting]")
    plan = make_plan(config, image_size=SIZE)
    base = load_base(config.model, torch.device("cpu"))
    layers = linear_layers(base.model.get_decoder())
    model = PilotModel(base, config.model)
    model.enter_stage1("vqa")
    for stage in (1, 2):
        if stage == 2:
            model.enter_stage2(("vqa", "counting"), torch.Generator())
        planned = plan.stages[stage]
        assert planned.parameters == numbers(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sent = [*model.state("lora").values(), *model.state("own_task_adapter").values()]
        assert (planned.trained, planned.sent) == (trained, sum(t.numel() for t in sent))
        assert planned.up_bytes == sum(tensor.nbytes for tensor in sent)
        assert planned.memory.total > planned.memory.base >= 4 * planned.parameters["base"]
    assert set(plan.lora_layers) == layers and plan.other_layers == []
    processor = load_processor(path)
    picture = KeptImage(Image.new("RGB", SIZE[::-1]))
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "one"))
    one = Example("a", (picture,), turns)
    visual = FeatureCache(config.model.feature_cache).encode(model, processor, [one])
    assert plan.batch.features == tuple(visual.features.shape)
    collator = make_collator(config.model, processor, max_length=2048)
    ids, _ = collator.tokenize(one)
    template = collator.tokenizer(collator._render(turns).text, add_special_tokens=False)
    added = collator.tokenizer.added_tokens_decoder
    special, of_template = (
        sum(token in added for token in tokens) for tokens in (ids, template["input_ids"])
    )
    if collator.tokenizer("a")["input_ids"][0] in added and template["input_ids"][0] != ids[0]:
        special -= 1  # the tokenizer's first token
    assert plan.batch.image_tokens == special - of_template + 1


@functools.cache
def plan_of(name):
    return make_plan(load_config(f"model={name}"), micro_batch=1)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SMALLER else pytest.mark.slow) for n in MODELS]
)
def test_every_model_file_is_planned(name):
    config = load_config(f"model={name}").model
    read = known_config(config)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(read)
    connector = base.model.get_submodule(spec_of(read).projector)
    adapter = sum(parameter.numel() for parameter in connector.parameters())
    whole = sum(parameter.numel() for parameter in base.parameters())
    plan = plan_of(name)
    first = plan.stages[1]
    assert first.parameters["base"] == whole - adapter
    assert first.parameters["own_task_adapter"] == first.parameters["client_adapter"] == adapter
    linear = [m for m in base.model.get_decoder().layers.modules() if type(m) is torch.nn.Linear]
    lora = sum(config.lora.rank * (m.in_features + m.out_features) for m in linear)
    assert first.parameters["lora"] == lora
    width = {"bfloat16": 2, "float32": 4}[config.wire_dtype]
    assert first.up_bytes == first.down_bytes == width * (lora + adapter)
    assert first.memory.base == {"bfloat16": 2, "float32": 4}[config.dtype] * (whole - adapter)
    assert set(plan.lora_layers) == linear_layers(base.model.get_decoder())


def test_a_smaller_size_of_every_family_trains_on_24_gib():
    """Both stages, one example at a time."""
    plans = [plan_of(name) for name in sorted(SMALLER)]
    without_a_file = {"idefics3", "fast_vlm"}
    assert {plan.architecture for plan in plans} | without_a_file == set(SPECS)
    for plan in plans:
        assert max(s.memory.total for s in plan.stages.values()) < 24 * 2**30, plan.path


def test_linear_layers_without_a_lora_are_listed(capsys):
    assert cli.main(["plan", "model.lora.targets=[q_proj,down_proj]"]) == 0
    out = capsys.readouterr().out
    assert "LoRA on self_attn.q_proj, mlp.down_proj; none on self_attn.k_proj, " in out
    assert cli.main(["plan", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["lora_layers"]) == 7 and figures["other_layers"] == []


def test_a_plan_follows_the_image_processor_and_survives_a_damaged_memory(tmp_path, monkeypatch):
    """What is remembered belongs to the checkpoint's files; other content is computed anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "base"
    config = load_config(f"model.path={WRITERS['llava-1.5'](folder)}")
    first = make_plan(config).batch
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("null")
    assert make_plan(config).batch == first
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    larger = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | larger))
    assert make_plan(config).batch.image_tokens == 4 * first.image_tokens
