"""One code path for CPU and GPU: what a GPU computes is what the CPU does.

Every test runs on the CPU too, so that what is marked `gpu` cannot rot where there is none.
"""

import importlib.util

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pilot_flwr.client import rank as rank_module
from pilot_flwr.client.node import Site
from pilot_flwr.client.session import run_session
from pilot_flwr.client.training import autocast, train
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import FeatureCacheConfig, LoraConfig, ModelConfig
from pilot_flwr.config.schema import EvaluationConfig, PilotConfig
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import TrainingError
from pilot_flwr.model.feature_cache import FeatureCache, forget_features
from pilot_flwr.model.feature_folder import FeatureFolder
from pilot_flwr.model.loading import initial_state, load_base, loaded_model, make_collator
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import Instruction

CPU = torch.device("cpu")
TASKS = ("vqa", "counting", "captioning")
WARNINGS = pytest.mark.filterwarnings("default")  # of the libraries for a GPU, none of ours


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WARNINGS])])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def whole_float32():
    """No TF32 in cuDNN's convolutions, torch's default: its ten bits are not what is compared."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def examples():
    data = DataConfig(train_examples=12)
    return client_examples(data, federation_clients(data)[0], "train", seed=0)[:6]


def build(device, *, stage=1, **config):
    """A model whose every adapter does something, the same on every device."""
    config = ModelConfig(**config)
    model = PilotModel(load_base(config, device), config)
    model.enter_stage1("vqa", initialisation="official")
    if stage == 2:
        model.enter_stage2(TASKS, torch.Generator().manual_seed(1))
    model.load("lora", initial_state(config, seed=0).lora)
    generator = torch.Generator().manual_seed(0)
    for group in ("lora", "own_task_adapter", "client_adapter", "cross_task_adapters"):
        state = model.state(group)
        noise = {n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        model.load(group, {name: tensor + noise[name] for name, tensor in state.items()})
    return model.eval()


def cache(folder, where, namespace):
    forget_features()
    disk = FeatureFolder(folder / namespace, limit=2**30, since=0, progress=print)
    return FeatureCache(FeatureCacheConfig(where=where), disk if where == "disk" else None)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stage", [1, 2])
def test_layers_on_two_gpus_give_the_gradients_of_one(kit, examples, stage):
    results = []
    for device_map in ("single", "auto"):
        model = build(torch.device("cuda"), stage=stage, device_map=device_map)
        collator, encode = kit(model)
        batch = collator.train_batch(examples).to(model.device)
        output = model(batch, next(encode([examples])))
        torch.nn.functional.cross_entropy(output.logits, output.labels).backward()
        devices = {parameter.device for parameter in model.base.parameters()}
        assert len(devices) == (2 if device_map == "auto" else 1)
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        other = results[1][name].to(gradient.device)
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


@pytest.fixture
def kit(processor, tmp_path):
    """The collator and an encoder of a model, on its own device and without a shared cache."""

    def make(model):
        collator = make_collator(ModelConfig(), processor, max_length=256)
        features = cache(tmp_path, "off", "kit")
        return collator, lambda parts: features.stream(model, processor, parts, workers=1)

    return make


def outcome(model, kit, examples, precision):
    """Logits, losses and gradients of one training pass, on the CPU."""
    collator, encode = kit(model)
    (visual,) = encode([examples])
    with autocast(model.device, precision):
        output = model(collator.train_batch(examples).to(model.device), visual)
        loss = torch.nn.functional.cross_entropy(output.logits.float(), output.labels)
    losses = torch.stack([loss, *(part.float() for part in output.connector[1:])])
    losses.sum().backward()
    assert output.logits.device == output.labels.device == model.base.device
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().float().cpu(), losses.detach().cpu(), gradients


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_pass_is_the_cpus(kit, examples, device, stage):
    expected = outcome(build(CPU, stage=stage), kit, examples, "off")
    got = outcome(build(device, stage=stage), kit, examples, "off")
    torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=1e-4)
    for one, other in [(got[0], expected[0]), *zip_gradients(got[2], expected[2])]:
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_pass_in_bfloat16_is_the_cpus_in_float32(kit, examples, device, stage):
    """Eight bits of precision: every parameter's gradient points the same way."""
    expected = outcome(build(CPU, stage=stage), kit, examples, "off")
    got = outcome(build(device, stage=stage), kit, examples, "bfloat16")
    torch.testing.assert_close(got[1], expected[1], rtol=0.05, atol=5e-3)
    assert 0 < (got[0] - expected[0]).norm() <= 0.05 * expected[0].norm()
    for one, other in zip_gradients(got[2], expected[2]):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95


def zip_gradients(one, other):
    assert one.keys() == other.keys()
    return [(one[name], other[name]) for name in one]


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpointing_and_a_bfloat16_base_train_the_same(kit, examples, device, stage):
    plain = outcome(build(device, stage=stage, dtype="bfloat16"), kit, examples, "bfloat16")
    light = build(device, stage=stage, dtype="bfloat16", gradient_checkpointing=True).train()
    light = outcome(light, kit, examples, "bfloat16")
    torch.testing.assert_close(light[1], plain[1], rtol=1e-3, atol=1e-5)
    for one, other in zip_gradients(light[2], plain[2]):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-6


def test_generation_is_the_cpus(kit, examples, device):
    answers = []
    for model in (build(CPU), build(device)):
        collator, encode = kit(model)
        (visual,) = encode([examples])
        batch = collator.prompt_batch(examples).to(model.device)
        tokens = model.generate(batch, visual, max_new_tokens=6, stop=collator.end_token_id())
        assert tokens.device == model.base.device
        answers.append(tokens.cpu())
    assert torch.equal(*answers)


def fit(model, kit, examples, *, seed=0, precision="off"):
    collator, encode = kit(model)
    return train(
        model,
        examples,
        collator=collator,
        encode=encode,
        config=TrainConfig(batch_size=2, accumulation_steps=2, autocast=precision),
        generator=torch.Generator().manual_seed(seed),
        progress=lambda line: None,
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_training_is_the_cpus(kit, examples, device, stage):
    expected, got = (fit(build(where, stage=stage), kit, examples) for where in (CPU, device))
    assert got.losses == pytest.approx(expected.losses, rel=1e-2, abs=1e-4)
    assert (got.steps, got.gradients) == (expected.steps, expected.gradients)


def test_the_optimizer_is_fused_on_a_gpu_alone(kit, examples, device):
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append([group["fused"] for group in optimizer.param_groups])
    )
    fit(build(device), kit, examples)
    handle.remove()
    assert seen == [[True, True] if device.type == "cuda" else [None, None]] * 2


def test_dropout_follows_the_given_generator_and_leaves_the_devices_own(kit, examples, device):
    states, lora = [], LoraConfig(dropout=0.5)
    for seed in (1, 1, 2):
        torch.manual_seed(7)
        expected = torch.rand(3, device=device)
        model = build(device, lora=lora)
        torch.manual_seed(7)
        fit(model, kit, examples, seed=seed)
        assert torch.equal(torch.rand(3, device=device), expected)
        states.append(model.state("lora"))
    same, other = (
        sum(float((tensor - states[0][name]).square().sum()) for name, tensor in state.items())
        for state in states[1:]
    )
    assert same < 0.01 * other  # not zero: attention on a GPU adds up in any order


@pytest.mark.parametrize("where", ["memory", "disk", "off"])
def test_features_come_to_the_models_device_and_are_kept_on_the_host(
    tmp_path, processor, examples, device, where
):
    expected = (
        cache(tmp_path / "cpu", "off", "cpu").encode(build(CPU), processor, examples).features
    )
    model, name = build(device), f"{device}-{where}"
    kept = cache(tmp_path, where, name)
    for part in (examples[:2], examples, examples[::-1]):  # new; some known; all known
        features = kept.encode(model, processor, part).features
        assert features.device == model.base.device
        order = [examples.index(example) for example in part]
        torch.testing.assert_close(features.cpu(), expected[order], rtol=1e-3, atol=1e-3)
    keys = [key for example in examples for key in kept._keys(model, processor, example)]
    found = [kept._get(model, key) for key in keys]
    if where == "off":
        assert found == [None] * len(examples)
    else:
        assert {tensor.device.type for (tensor,) in found} == {"cpu"}


@pytest.fixture
def take(tmp_path, device):
    """Run a session of the first client on the device; `batch_size` is that of training."""
    model = ModelConfig(lora=LoraConfig(rank=4))
    config = PilotConfig(
        model=model,
        data=DataConfig(clients_per_task=1, train_examples=6, test_examples=4),
        train=TrainConfig(epochs=1, batch_size=2),
        evaluation=EvaluationConfig(max_new_tokens=2),
    )
    site = Site(federation_clients(config.data)[0], tmp_path, str(device))
    initial = initial_state(config.model, seed=0)

    def call(stage):
        known = TASKS if stage == 2 else (site.client.task,)
        adapters = dict.fromkeys(known, initial.adapter)
        order = Instruction(stage, stage, TASKS, adapters, initial.lora)
        return run_session(site, config, order, progress=lambda line: None)

    call.site = site
    return call


def test_sessions_of_both_stages(take, device):
    for stage in (1, 2):
        result = take(stage)
        assert result.training.steps == 2
        assert 0 <= result.evaluation.score <= 1
        sent = [*result.adapter.values(), *result.lora.values()]
        assert {tensor.device.type for tensor in sent} == {"cpu"}
        assert all(torch.isfinite(tensor).all() for tensor in sent)
        private = take.site.private_store.load()
        assert private.stage == stage
    assert loaded_model(
        ModelConfig(lora=LoraConfig(rank=4)), reduction="normalized", device=device
    ).device.type == (device.type)


def test_out_of_memory_says_what_to_change_and_leaves_the_state(take, device, monkeypatch):
    take(1)
    before = take.site.private_store.load()

    def too_much(*_, **__):
        if device.type == "cpu":  # whose own error is another
            raise torch.OutOfMemoryError("out of memory")
        torch.empty(2**44, dtype=torch.uint8, device=device)

    with monkeypatch.context() as patch:
        patch.setattr(rank_module, "train", too_much)
        with pytest.raises(TrainingError, match=r"ran out of memory in stage 2.*`train\.batch_siz"):
            take(2)
    after = take.site.private_store.load()
    assert after.stage == before.stage == 1
    for name, tensor in before.groups["client_adapter"].items():
        assert torch.equal(after.groups["client_adapter"][name], tensor)
    assert take(2).training.steps == 2


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra `quantization`"
)
@WARNINGS
def test_a_four_bit_base_trains(kit, examples, device):
    """The decoder's matrices are packed; the rest is as it was; the logits are near."""
    four = build(device, dtype="bfloat16", quantization="4bit")
    layer = four.base.model.language_model.layers[0].mlp.down_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    assert four.base.lm_head.weight.dtype == torch.bfloat16
    assert {p.device.type for p in four.parameters()} == {device.type}
    got = outcome(four, kit, examples, "bfloat16")
    expected = outcome(build(device, dtype="bfloat16"), kit, examples, "bfloat16")
    assert got[2].keys() == expected[2].keys()
    assert (got[0] - expected[0]).norm() < 0.5 * expected[0].norm()
    assert fit(build(device, dtype="bfloat16", quantization="4bit"), kit, examples).steps == 2
