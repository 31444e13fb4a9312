"""An exported folder, loaded by the file in it, computes what the personalised model computes."""

import ast
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from families import WRITERS
from peft import PeftModel
from perturbed import perturb
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from visuals import encoded, visual

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import FeatureCacheConfig, LoraConfig, ModelConfig
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.data.images import ImageFile, expand_to_square, mean_colour
from pilot_flwr.errors import ModelError, RunError
from pilot_flwr.inference import modeling_pilot
from pilot_flwr.inference.export import export_model
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel

TASKS = ("vqa", "counting", "captioning")


@pytest.fixture(scope="module")
def examples():
    data = DataConfig(train_examples=6, test_examples=4)
    return client_examples(data, federation_clients(data)[0], "test", seed=0)


def export(model, folder, *, client_adapter=True, **data):
    export_model(
        model,
        folder,
        client_adapter=client_adapter,
        end_token_ids=[2],
        data=DataConfig(**data),
    )
    return folder


def logits(model, processor, examples):
    """Logits that predict answers, and a function that gives those of any transformers model."""
    collator = make_collator(ModelConfig(), processor, max_length=256)
    batch = collator.train_batch(examples)
    images = [example.images[0].read() for example in examples]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def of(other):
        output = other(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixels
        )
        return output.logits[:, :-1][batch.labels[:, 1:] != -100]

    return model(batch, visual(model, processor, examples)).logits, of


@torch.no_grad()
@pytest.mark.parametrize("use_client_adapter", ["frozen", "off"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_loaded_model_computes_the_same(
    make_model, processor, examples, generator, tmp_path, stage, use_client_adapter
):
    model = make_model(stage2_client_adapter=use_client_adapter)
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    expected, of = logits(perturb(model), processor, examples)
    loaded, _ = modeling_pilot.load(export(model, tmp_path / "model"))
    torch.testing.assert_close(of(loaded), expected, rtol=1e-5, atol=1e-5)
    kept = load_file(tmp_path / "model" / "connector.safetensors")
    assert any("client_adapter" in name for name in kept) == (
        stage == 1 or use_client_adapter == "frozen"
    )


@torch.no_grad()
def test_the_routers_precision_is_exported(make_model, processor, examples, generator, tmp_path):
    model = make_model(router_dtype="bfloat16")
    model.enter_stage2(TASKS, generator)
    expected, of = logits(perturb(model), processor, examples)
    loaded, _ = modeling_pilot.load(export(model, tmp_path / "model"))
    torch.testing.assert_close(of(loaded), expected, rtol=1e-5, atol=1e-5)
    model.connector.router_dtype = "float32"
    other, _ = logits(model, processor, examples)
    assert float((other - expected).abs().max()) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("stage", "left_out"),
    [
        (1, {"client_adapter"}),
        (2, {"client_adapter"}),
        (2, {"cross_task_adapters"}),
        (2, {"client_adapter", "cross_task_adapters"}),
    ],
)
def test_a_model_that_was_trained_without_some_parts(
    make_model, processor, examples, generator, tmp_path, stage, left_out
):
    model = make_model(**dict.fromkeys(left_out, False))
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    expected, of = logits(perturb(model), processor, examples)
    loaded, _ = modeling_pilot.load(export(model, tmp_path / "model"))
    torch.testing.assert_close(of(loaded), expected, rtol=1e-5, atol=1e-5)
    kept = load_file(tmp_path / "model" / "connector.safetensors")
    assert not {name.split(".")[0] for name in kept} & left_out


@torch.no_grad()
def test_a_consensus_model_is_exported_without_a_client_adapter(
    make_model, processor, examples, tmp_path
):
    model = make_model()
    model.enter_stage1("vqa", initialisation="identity")  # ψ_s ends in zero
    for group in ("lora", "own_task_adapter"):
        for parameter in model.groups()[group].values():
            parameter.data += 0.05
    expected, of = logits(model, processor, examples)
    loaded, _ = modeling_pilot.load(export(model, tmp_path / "model", client_adapter=False))
    torch.testing.assert_close(of(loaded), expected, rtol=1e-5, atol=1e-5)
    assert len(load_file(tmp_path / "model" / "connector.safetensors")) == 4


SCRIPT = """
import sys
sys.modules["pilot_flwr"] = None  # importing it raises from here on
sys.path.insert(0, ".")
from modeling_pilot import load; model, processor = load(".")
from PIL import Image
inputs = processor(
    text=["USER: <image>\\nWhat digit is at the top left? ASSISTANT:", "USER: Hello ASSISTANT:"],
    images=[Image.open("image.png")], padding=True, return_tensors="pt",
)
new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print(*processor.tokenizer.batch_decode(new, skip_special_tokens=True), sep="|")
"""


def test_its_code_needs_nothing_but_published_packages(exported):
    tree = ast.parse((exported / "modeling_pilot.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    needed = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert needed == {"numpy", "torch", "transformers", "peft", "safetensors", "PIL"}


@pytest.mark.slow
def test_it_loads_in_two_lines_without_the_package(make_model, processor, generator, tmp_path):
    model = make_model()
    model.enter_stage2(TASKS, generator)
    folder = export(perturb(model), tmp_path / "model")
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    image.save(folder / "image.png")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer = Turn("assistant", "?")
    question = Turn("user", "<image>\nWhat digit is at the top left?")
    asked = [
        Example("a", (KeptImage(image),), (question, answer)),
        Example("b", (), (Turn("user", "Hello"), answer)),
    ]
    collator = make_collator(ModelConfig(), processor, max_length=256)
    tokens = model.generate(
        collator.prompt_batch(asked), visual(model, processor, asked[:1]), max_new_tokens=8
    )
    answers = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert done.stdout.strip("\n").split("|") == answers
    assert answers[0].strip()


@torch.no_grad()
def test_the_lora_is_in_pefts_own_format(make_model, processor, examples, tmp_path):
    model = perturb(make_model())
    expected, of = logits(model, processor, examples)
    folder = export(model, tmp_path / "model")
    base = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    connector = model.connector
    base.model.multi_modal_projector = peft.tuners.tuners_utils.nn.Identity()
    base.model.multi_modal_projector.forward = lambda features: connector(features).features
    loaded = PeftModel.from_pretrained(base, folder / "lora").eval()
    torch.testing.assert_close(of(loaded), expected, rtol=1e-5, atol=1e-5)
    layers = [n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert layers and all(".language_model." in name for name in layers)


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    return export(perturb(make_model()), tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture
def folder(exported, tmp_path):
    """An exported folder, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.mark.parametrize("file", ["connector.safetensors", "lora/adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_every_key_is_checked_when_it_is_loaded(folder, file, damage):
    state = load_file(folder / file)
    name, tensor = next(iter(state.items()))
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state["more"] = tensor.clone()
    else:
        state[name] = tensor[1:].clone()
    save_file(state, folder / file)
    with pytest.raises(ValueError, match="shape" if damage == "shape" else f"{damage} \\['"):
        modeling_pilot.load(folder)


def test_another_format_is_refused(folder):
    path = folder / "connector.json"
    path.write_text(path.read_text().replace(modeling_pilot.FORMAT, "pilot-export-9"))
    with pytest.raises(ValueError, match="'pilot-export-9'"):
        modeling_pilot.load(folder)


def test_the_base_may_be_elsewhere(folder, tmp_path):
    shutil.move(folder / "base", tmp_path / "elsewhere")
    with pytest.raises((OSError, ValueError)):
        modeling_pilot.load(folder)
    modeling_pilot.load(folder, tmp_path / "elsewhere")


def test_an_answer_ends_at_the_runs_end_tokens(make_model, processor, tmp_path):
    model = perturb(make_model())
    question = Example("a", (), (Turn("user", "Hello"), Turn("assistant", "?")))
    collator = make_collator(ModelConfig(), processor, max_length=256)
    batch = collator.prompt_batch([question])
    prompt = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    loaded = modeling_pilot.load_model(export(model, tmp_path / "a"))
    loaded.generation_config.eos_token_id = None
    length = batch.input_ids.shape[1]
    free = loaded.generate(**prompt, max_new_tokens=8, do_sample=False)[0, length:].tolist()
    assert len(free) == 8
    position = next(n for n in range(1, 8) if free[n] not in free[:n])
    folder = tmp_path / "b"
    export_model(
        model,
        folder,
        client_adapter=True,
        end_token_ids=[free[position]],
        data=DataConfig(),
    )
    ending = modeling_pilot.load_model(folder)
    answer = ending.generate(**prompt, max_new_tokens=8, do_sample=False)[0, length:]
    assert answer.tolist() == free[: position + 1]


def test_half_precision_is_kept_as_it_was(make_model, tmp_path):
    model = perturb(make_model(adapter_dtype="bfloat16"))
    loaded, _ = modeling_pilot.load(export(model, tmp_path / "model"))
    for name, parameter in loaded.named_parameters():
        if ".lora_" in name or ".multi_modal_projector." in name:
            assert parameter.dtype == torch.bfloat16, name
    mine = model.state("lora")["layers.0.self_attn.q_proj.lora_A"]
    theirs = loaded.model.model.language_model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(mine, theirs)


def test_images_are_padded_as_the_run_padded_them(make_model, processor, tmp_path):
    _, loaded = modeling_pilot.load(export(make_model(), tmp_path / "m", image_aspect_ratio="pad"))
    image = Image.effect_noise((50, 31), 80)
    squared = expand_to_square(image.convert("RGB"), mean_colour(processor.image_processor))
    expected = processor.image_processor(images=[squared], return_tensors="pt")["pixel_values"]
    prompt = "USER: <image>\nWhat? ASSISTANT:"
    inputs = loaded(text=[prompt], images=[image], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected)
    with pytest.raises(ValueError, match="PIL"):
        loaded(text=[prompt], images=[torch.zeros(3, 50, 31)], return_tensors="pt")


@pytest.mark.parametrize("reading", ["viewer", "official"])
@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "I;16 transparent", "turned"])
def test_images_are_read_as_in_the_run(processor_of, processor, tmp_path, reading, mode):
    """Of an export's processor and of `ImageFile`, from one file."""
    exif, options = Image.Exif(), {}
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture, options = picture.convert("RGB").convert("P"), {"transparency": b"\0" * 128}
    if mode.startswith("I;16"):
        ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
        picture = Image.fromarray(ramp)
        options = {"transparency": 777} if mode.endswith("transparent") else {}
    if mode == "turned":
        exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif, **options)
    expected = ImageFile(tmp_path, "a.png", "", official=reading == "official").read()
    pixels = processor.image_processor(images=[expected], return_tensors="pt")["pixel_values"]
    loaded = processor_of(reading)
    with Image.open(tmp_path / "a.png") as opened:
        found = loaded.image_processor(images=[opened], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, pixels)
    again = loaded.image_processor(images=[np.asarray(expected)], return_tensors="pt")
    assert torch.equal(again["pixel_values"], pixels)


@pytest.fixture(scope="module")
def processor_of(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readings")
    model = make_model()
    return functools.cache(
        lambda reading: modeling_pilot.load_processor(
            export(model, folder / reading, image_reading=reading)
        )
    )


def test_a_folder_that_holds_something_is_left_alone(make_model, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        export(make_model(), tmp_path)
    with pytest.raises(RunError, match="cannot be written"):
        export(make_model(), tmp_path / "mine" / "model")


def test_parameters_without_a_place_are_refused(make_model, tmp_path, monkeypatch):
    model = make_model()
    groups = {**model.groups(), "vision_lora": {"x": torch.nn.Parameter(torch.zeros(1))}}
    monkeypatch.setattr(model, "groups", lambda: groups)
    with pytest.raises(ModelError, match="vision_lora"):
        export(model, tmp_path / "model")


def test_the_description_says_what_the_folder_is(folder):
    description = json.loads((folder / "connector.json").read_text())
    assert description["base"]["path"] == "tiny-llava"
    assert description["connector"]["tasks"] == ["vqa"]
    assert description["end_token_ids"] == [2]


@torch.no_grad()
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.family("export")
def test_every_architecture_is_exported(kind, stage, generator, tmp_path):
    path = WRITERS[kind](tmp_path / "base")
    config = ModelConfig(path=path, lora=LoraConfig(rank=2))
    model = PilotModel(load_base(config, torch.device("cpu")), config)
    model.enter_stage1("vqa")
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    perturb(model.eval())
    processor = load_processor(path)
    collator = make_collator(config, processor, max_length=2048)
    picture = Image.effect_noise((61, 40), 90).convert("RGB")
    one = Example(
        "a",
        (KeptImage(picture),),
        (Turn("user", "<image>\nWhat is in the image?"), Turn("assistant", "two zebras")),
    )
    batch = collator.train_batch([one])
    cache = FeatureCache(FeatureCacheConfig(where="off"))
    expected = model(batch, cache.encode(model, processor, [one])).logits
    loaded, reader = modeling_pilot.load(export(model, tmp_path / "model"))
    own = SimpleNamespace(original=reader, tokenizer=reader.tokenizer)
    output = loaded(**encoded(own, collator, one))
    got = output.logits[:, :-1][batch.labels[:, 1:] != -100]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    description = json.loads((tmp_path / "model" / "connector.json").read_text())
    assert description["base"] == {
        "path": path,
        "revision": "",
        "dtype": "float32",
        "included": False,
        "quantization": "none",
    }
