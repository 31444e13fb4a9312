import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from visuals import visual

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import ModelError
from pilot_flwr.model import checkpoints, loading
from pilot_flwr.model.architectures import known_config, read_config
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.model.loading import (
    initial_state,
    load_base,
    load_processor,
    loaded_model,
    make_collator,
)

TASKS = ("vqa", "counting", "captioning")


@pytest.fixture
def examples():
    data = DataConfig(train_examples=6, test_examples=4)
    return client_examples(data, federation_clients(data)[0], "test", seed=0)


@pytest.fixture
def collator(processor, llava):
    return make_collator(ModelConfig(), processor, max_length=256)


def pixels(processor, examples):
    images = [example.images[0].read() for example in examples]
    return processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


def base_logits(llava, batch, pixel_values):
    """Logits of transformers' own forward pass at the positions that predict an answer token."""
    output = llava(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixel_values
    )
    return output.logits[:, :-1][batch.labels[:, 1:] != -100]


@torch.no_grad()
@pytest.mark.parametrize("stage", [1, 2])
def test_inert_adapters_leave_the_base_models_logits_unchanged(
    make_model, llava, processor, collator, examples, generator, stage
):
    batch, pixel_values = collator.train_batch(examples), pixels(processor, examples)
    expected = base_logits(llava, batch, pixel_values)
    model = make_model()
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    output = model(batch, visual(model, processor, examples))
    if stage == 1:
        assert torch.equal(output.logits, expected)
    else:  # Σ_i P_i = 1 up to rounding
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_trained_adapters_do_change_the_logits(make_model, llava, processor, collator, examples):
    batch, pixel_values = collator.train_batch(examples), pixels(processor, examples)
    model = make_model()
    state = {name: t + 0.1 for name, t in model.state("lora").items()}
    model.load("lora", state)
    output = model(batch, visual(model, processor, examples))
    assert not torch.allclose(output.logits, base_logits(llava, batch, pixel_values), atol=0.1)


@torch.no_grad()
def test_generation_is_transformers_own(make_model, llava, processor, collator, examples):
    """Inert adapters, left padding, prompts of different lengths: the same new tokens."""
    batch, pixel_values = collator.prompt_batch(examples), pixels(processor, examples)
    expected = llava.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=pixel_values,
        max_new_tokens=8,
        do_sample=False,
    )[:, batch.input_ids.shape[1] :]
    model = make_model()
    got = model.generate(batch, visual(model, processor, examples), max_new_tokens=8)
    assert torch.equal(got, expected)


def test_the_switch_keeps_the_private_adapter_and_makes_room_for_all_tasks(make_model, generator):
    model = make_model("counting")
    client_adapter = model.connector.client_adapter
    with torch.no_grad():
        client_adapter.linear_2.bias.fill_(3.0)
    model.enter_stage2(TASKS, generator)
    assert model.stage == 2
    assert model.connector.client_adapter is client_adapter
    assert model.connector.tasks == ("counting", "vqa", "captioning")
    assert model.base.model.multi_modal_projector.pilot is model.connector


def test_the_switch_is_refused_twice_and_for_a_foreign_own_task(make_model, generator):
    model = make_model("ocr")
    with pytest.raises(ModelError, match="'ocr' is not among"):
        model.enter_stage2(TASKS, generator)
    model.enter_stage1("vqa")
    model.enter_stage2(TASKS, generator)
    with pytest.raises(ModelError, match="only be entered from stage 1"):
        model.enter_stage2(TASKS, generator)


def test_image_tokens_and_features_must_fit(make_model, processor, collator, examples):
    model = make_model()
    features = visual(model, processor, examples[:1])
    with pytest.raises(ValueError, match="features and image tokens do not match, tokens: 32"):
        model(collator.train_batch(examples[:2]), features)


def test_initial_state_is_what_the_base_holds_without_loading_it(llava):
    initial = initial_state(ModelConfig(), seed=3)
    expected = llava.model.multi_modal_projector.state_dict()
    assert initial.adapter.keys() == expected.keys()
    for name, tensor in initial.adapter.items():
        assert torch.equal(tensor, expected[name])


def test_initial_lora_fits_the_model_and_is_inert(make_model):
    initial = initial_state(ModelConfig(), seed=3)
    model = make_model()
    model.load("lora", initial.lora)  # exactly the names and shapes
    for name, tensor in initial.lora.items():
        if name.endswith("lora_B"):
            assert torch.equal(tensor, torch.zeros_like(tensor))
        else:  # uniform in ±1/√inputs: its standard deviation is that over √3
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    again = initial_state(ModelConfig(), seed=3)
    assert all(torch.equal(t, again.lora[n]) for n, t in initial.lora.items())
    other = initial_state(ModelConfig(), seed=4)
    assert any(not torch.equal(t, other.lora[n]) for n, t in initial.lora.items())


def test_adapters_have_their_own_type(make_model):
    model = make_model(adapter_dtype="bfloat16")
    groups = model.groups()
    for group in ("lora", "own_task_adapter", "client_adapter"):
        assert {p.dtype for p in groups[group].values()} == {torch.bfloat16}
    assert {p.dtype for p in groups["base"].values()} == {torch.float32}
    assert {t.dtype for t in initial_state(model.config, seed=0).lora.values()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_adapters_train_and_generate(
    make_model, processor, collator, examples, generator, stage
):
    model = make_model(adapter_dtype="bfloat16")
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    features = visual(model, processor, examples)
    output = model(collator.train_batch(examples), features)
    (output.logits.float().sum() + output.connector.z).backward()
    assert all(p.grad is not None for p in model.groups()["lora"].values())
    tokens = model.generate(collator.prompt_batch(examples), features, max_new_tokens=2)
    assert tokens.shape == (len(examples), 2)


def test_a_process_loads_the_base_once():
    config = ModelConfig()
    device = torch.device("cpu")
    first = loaded_model(config, reduction="normalized", device=device)
    assert loaded_model(ModelConfig(), reduction="normalized", device=device) is first
    other = ModelConfig(lora=LoraConfig(rank=4))
    assert loaded_model(other, reduction="normalized", device=device) is not first


def test_a_base_whose_files_change_is_loaded_again(tmp_path):
    """A warm site keeps its process for months."""
    folder = tmp_path / "base"
    shutil.copytree(checkpoint_path("tiny-llava"), folder)
    config, device = ModelConfig(path=str(folder)), torch.device("cpu")
    first = loaded_model(config, reduction="normalized", device=device)
    processor = load_processor(str(folder))
    assert loaded_model(config, reduction="normalized", device=device) is first
    assert load_processor(str(folder)) is processor
    weights = folder / "model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    second = loaded_model(config, reduction="normalized", device=device)
    assert second.vision_identity != first.vision_identity
    assert load_processor(str(folder)) is not processor


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/nothing"])
def test_a_folder_that_is_not_there_is_called_so(path):
    """And not mistaken for a hub id."""
    for read in (known_config, read_config):
        with pytest.raises(ModelError, match=rf"`model\.path` is '{path}', but there is no such"):
            read(ModelConfig(path=path))


def test_a_base_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ModelError, match=r"`model\.path` is '.*nothing'"):
        load_base(ModelConfig(path=str(tmp_path / "nothing")), torch.device("cpu"))


@pytest.mark.parametrize(
    ("targets", "unknown"),
    [
        (["foo"], "'foo'"),
        (["q_proj", "k_porj"], "'k_porj'"),
        (["proj", "q_proj", "mlp"], "'proj', 'mlp'"),  # not a whole name; no linear layer
    ],
)
def test_every_lora_target_must_be_a_linear_layer(make_model, targets, unknown):
    message = rf"`model\.lora\.targets` names \[{unknown}\] but must .*, of \[.*'k_proj', "
    with pytest.raises(ModelError, match=message):
        make_model(lora=LoraConfig(targets=targets))
    with pytest.raises(ModelError, match=message):  # the server finds it, before any round
        initial_state(ModelConfig(lora=LoraConfig(targets=targets)), seed=0)


def test_a_lora_target_may_name_one_layer(make_model):
    model = make_model(lora=LoraConfig(targets=["0.self_attn.q_proj", "down_proj"]))
    layers = {name.rpartition(".")[0] for name in model.state("lora")}
    down = {name for name in layers if name.endswith("down_proj")}
    assert len(down) == model.base.config.text_config.num_hidden_layers
    assert layers - down == {"layers.0.self_attn.q_proj"}


def test_the_vision_tower_stays_in_evaluation(make_model):
    model = make_model(lora=LoraConfig(dropout=0.1))
    assert model.train() is model
    assert not any(module.training for module in model.base.model.vision_tower.modules())
    assert all(module.training for module in model.base.model.language_model.modules())
    assert model.connector.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_checkpoint_with_missing_keys_is_refused(tmp_path, llava, processor):
    from safetensors.torch import load_file, save_file

    llava.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "multi_modal_projector" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing_keys.*multi_modal_projector"):
        load_base(ModelConfig(path=str(tmp_path)), torch.device("cpu"))


def test_the_pinned_revision_is_the_one_that_the_projector_comes_from(monkeypatch):
    asked = []

    def find_file(config, name, **options):
        asked.append(config.revision)
        return found(replace(config, path="tiny-llava", revision=""), name, **options)

    found, shipped = checkpoints.find_file, checkpoints.checkpoint_path("tiny-llava")
    monkeypatch.setattr(checkpoints, "find_file", find_file)
    monkeypatch.setattr(checkpoints, "checkpoint_path", lambda path: shipped)
    loading.initial_state(ModelConfig("org/name", revision="v1.5"), seed=0)
    assert set(asked) == {"v1.5"}


def test_the_revision_reaches_the_hub(monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, name, *, revision, local_files_only):
        asked.append((repository, name, revision))
        return checkpoints.find_file(ModelConfig(), "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    checkpoints.find_file(ModelConfig(path="a/b", revision="v1.5"), "config.json")
    assert asked == [("a/b", "config.json", "v1.5")]


def test_load_wants_exactly_the_groups_names_and_shapes(make_model):
    model = make_model()
    state = model.state("own_task_adapter")
    name = next(iter(state))
    model.load("own_task_adapter", {key: tensor + 1 for key, tensor in state.items()})
    assert torch.equal(model.state("own_task_adapter")[name], state[name] + 1)
    rest = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ModelError, match="Parameters of own_task_adapter: missing tensors"):
        model.load("own_task_adapter", rest | {"other": state[name]})
    with pytest.raises(ModelError, match=f"Parameters of own_task_adapter: tensor `{name}` is"):
        model.load("own_task_adapter", rest | {name: state[name][:1]})
