"""Every family is trained as the method says: groups, losses, checkpointing, the switch of stages.

The references are naive: one image at a time, one token at a time.
"""

import math

import numpy as np
import pytest
import torch
from families import WRITERS
from perturbed import perturb
from PIL import Image

from pilot_flwr.algorithm.parameter_groups import GROUPS, WHOLE
from pilot_flwr.client.personalization import (
    Received,
    extract_private_state,
    personalize,
    personalize_as_trained,
)
from pilot_flwr.client.private_state import PrivateStore
from pilot_flwr.client.training import train
from pilot_flwr.config.model import FeatureCacheConfig, LoraConfig, ModelConfig
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.model.architectures import merge_of
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel

pytestmark = pytest.mark.family("training")

CPU = torch.device("cpu")
TASKS = ("vqa", "counting", "captioning")


def image(height, width):
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return KeptImage(Image.fromarray(pixels.astype(np.uint8)))


def example(*images, answer="two zebras"):
    turns = (Turn("user", "<image>\n" * len(images) + "What is it?"), Turn("assistant", answer))
    return Example(f"{len(images)}-{answer}", images, turns)


EXAMPLES = [
    example(image(28, 28)),
    example(image(20, 61), image(90, 40), answer="one giraffe"),
    example(answer="in the image"),
    example(image(64, 30)),
]


class Kit:
    """A model of a family whose every adapter does something, and what its training needs."""

    def __init__(self, path):
        self.path = path
        self.processor = load_processor(path)
        self.collator = make_collator(ModelConfig(path=path), self.processor, max_length=2048)
        self.cache = FeatureCache(FeatureCacheConfig(where="off"))

    def model(self, stage, **config):
        config = ModelConfig(path=self.path, lora=LoraConfig(rank=2), **config)
        model = PilotModel(load_base(config, CPU), config)
        model.enter_stage1("vqa")
        if stage == 2:
            model.enter_stage2(TASKS, torch.Generator().manual_seed(0))
        return perturb(model)

    def visual(self, model, examples=EXAMPLES):
        return self.cache.encode(model, self.processor, examples)

    def output(self, model, examples=EXAMPLES):
        return model(self.collator.train_batch(examples), self.visual(model, examples))

    def train(self, model, examples=EXAMPLES, **config):
        return train(
            model,
            examples,
            collator=self.collator,
            encode=lambda parts: (self.visual(model, part) for part in parts),
            config=TrainConfig(epochs=1, batch_size=len(examples), **config),
            generator=torch.Generator().manual_seed(0),
            progress=lambda line: None,
        )


@pytest.fixture(scope="module", params=list(WRITERS))
def kit(request, tmp_path_factory):
    return Kit(WRITERS[request.param](tmp_path_factory.mktemp("base")))


def states(model):
    return {group: model.state(group) for group in model.groups()}


@pytest.mark.parametrize("stage", [1, 2])
def test_one_step_changes_exactly_what_the_stage_trains(kit, stage):
    model = kit.model(stage)
    before = states(model)
    result = kit.train(model)
    after = states(model)
    assert result.steps == 1 and all(map(math.isfinite, result.losses.values()))
    for group, tensors in before.items():
        trained = stage in GROUPS[group].stages
        assert bool(tensors) or not trained, group
        same = {name for name, tensor in tensors.items() if torch.equal(tensor, after[group][name])}
        assert same == (set() if trained else set(tensors)), group


def alone(kit, model):
    """H_v of every image as if there were no other: rows (N, D) of one tower's image, or one."""
    for one in EXAMPLES:
        if one.images:
            visual = kit.visual(model, [one])
            parts = visual.features
            yield from parts if parts.dim() == 3 else torch.split(parts, visual.images)


def tokens_of(adapter, features, packed):
    """An adapter's tokens (S, C) for one image's features (N, D)."""
    return adapter(features if packed else features[None]).flatten(0, -2)


def test_the_difference_loss_is_a_mean_over_images(kit):
    """``‖x_tᵀ x_s‖²_F / (‖x_t‖² ‖x_s‖²)`` of each image, entry by entry of the C × C product."""
    model = kit.model(1)
    packed = kit.visual(model).features.dim() == 2
    losses = []
    for features in alone(kit, model):
        task, client = (
            tokens_of(adapter, features, packed).detach().double()
            for adapter in (model.connector.task_adapter, model.connector.client_adapter)
        )
        energy = sum(float(t @ c) ** 2 for t in task.T for c in client.T)
        losses.append(energy / float(task.square().sum() * client.square().sum()))
    got = kit.output(model).connector.difference
    assert got.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("reduction", ["pooled", "per_image"])
def test_the_routers_losses_are_those_of_a_loop_over_tokens(kit, reduction):
    """``T Σ_i f_i P̄_i`` and the mean of ``(log Σ_i exp g_i)²``."""
    model = kit.model(2)
    model.connector.reduction = reduction
    weight, merge = model.connector.router.weight.detach(), merge_of(model.base.config)
    images = []
    for features in alone(kit, model):
        logits = [[float(w @ token) for w in weight] for token in merge(features)]
        images.append(logits)
    every = [token for image in images for token in image]
    squares = [math.log(sum(map(math.exp, g))) ** 2 for g in every]
    parts = [every] if reduction == "pooled" else images
    got = kit.output(model).connector
    assert got.balance.item() == pytest.approx(sum(map(balance, parts)) / len(parts), rel=1e-4)
    assert got.z.item() == pytest.approx(sum(squares) / len(squares), rel=1e-4)


def balance(logits):
    share, mean = [0.0] * len(TASKS), [0.0] * len(TASKS)
    for token in logits:
        whole = sum(map(math.exp, token))
        share[max(range(len(token)), key=token.__getitem__)] += 1 / len(logits)
        for expert, logit in enumerate(token):
            mean[expert] += math.exp(logit) / whole / len(logits)
    return len(TASKS) * sum(f * p for f, p in zip(share, mean, strict=True))


@torch.no_grad()
def test_a_token_is_routed_by_the_features_that_it_merges(kit):
    """A changed feature changes the routing of exactly the tokens that the projector changes."""
    model = kit.model(2)
    visual = kit.visual(model, EXAMPLES[:1])
    features, projector = visual.features, model.slot.projector.float()
    route = model.connector.router_logits
    before, routed = projector(features).flatten(0, -2), route(features).flatten(0, -2)
    for place in range(features.shape[-2]):
        changed = features.clone()
        changed[..., place, :] += torch.linspace(-1, 1, features.shape[-1])
        made = (projector(changed).flatten(0, -2) - before).abs().amax(-1) > 1e-7
        seen = (route(changed).flatten(0, -2) - routed).abs().amax(-1) > 1e-7
        assert made.any() and torch.equal(made, seen), place


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpointing_changes_no_gradient(kit, stage):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # peft draws the LoRA's A
        model = kit.model(stage, gradient_checkpointing=checkpointing).train()
        runs = []
        model.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_, r=runs: r.append(1))
        output = kit.output(model)
        output.logits.sum().backward()
        assert len(runs) == 1 + checkpointing  # again in the backward pass
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": output.logits.detach()} | gradients)
    plain, light = found
    assert plain.keys() == light.keys() and len(plain) > 3
    assert all(torch.equal(tensor, light[name]) for name, tensor in plain.items())


def test_a_client_switches_and_resumes_bit_by_bit(kit, tmp_path):
    """Stage 2 keeps ψ_s of stage 1, and a file of the private state restores either stage."""
    model, fresh = kit.model(1), kit.model(1)
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    foreign = {task: model.state("own_task_adapter") for task in TASKS}
    before = {}
    for stage in (1, 2):
        if stage == 2:
            received = share(model, foreign)
            generator = torch.Generator().manual_seed(1)
            personalize(model, store.load(), received, stage=2, generator=generator)
            assert same(model.state("client_adapter"), before["client_adapter"])
            assert same(model.state("own_task_adapter"), before["own_task_adapter"])
            assert len(model.state("foreign_task_adapters")) == 2 * len(foreign["vqa"])
        kit.train(model)
        before = states(model)
        store.save(extract_private_state(model, WHOLE), server_round=stage)
        personalize_as_trained(fresh, store.load(), share(model, foreign))
        assert fresh.stage == stage and store.load().tasks == (TASKS if stage == 2 else ())
        assert all(same(fresh.state(group), tensors) for group, tensors in before.items())
        with torch.no_grad():
            assert torch.equal(kit.output(fresh.eval()).logits, kit.output(model.eval()).logits)


def share(model, foreign):
    """What a server sends that has this client's upload and the others' task adapters."""
    adapters = foreign | {"vqa": model.state("own_task_adapter")}
    return Received("vqa", TASKS, adapters, model.state("lora"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
