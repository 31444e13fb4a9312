"""Mutual distillation of a shared and a personal model (FedDAT), against a plain loop."""

import math

import pytest
import torch
from inprocess import SMALL, assert_same_state, finish, resumed
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from visuals import visual

from pilot_flwr.algorithm.losses import distillation_loss
from pilot_flwr.client.batching import optimizer_steps
from pilot_flwr.client.node import Site
from pilot_flwr.client.session import SHARED, run_session, session_generator
from pilot_flwr.config.loading import load_config
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.inference.runs import client_model, open_run
from pilot_flwr.model.loading import initial_state
from pilot_flwr.model.resource_plan import make_plan
from pilot_flwr.protocol import Instruction

SHARE, WEIGHT, TEMPERATURE = 0.4, 0.7, 2.0
SETTINGS = (
    f"{SMALL} data.train_examples=6 data.tasks=[vqa] data.clients_per_task=2 strategy.rounds=1 "
    "strategy=feddat train.epochs=2 train.lr_scale=1 model.sent_dtype=float32 "
    f"train.personal={{share:{SHARE},distillation:{WEIGHT},temperature:{TEMPERATURE}}}"
)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_divergence_written_out(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, targets = (3 * torch.randn(4, 6, generator=generator) for _ in range(2))
    expected = 0.0
    for row, other in zip(logits.tolist(), targets.tolist(), strict=True):
        p = [math.exp(value / temperature) for value in row]
        q = [math.exp(value / temperature) for value in other]
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        expected += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    learned, other = logits.clone().requires_grad_(), targets.clone().requires_grad_()
    loss = distillation_loss(learned, other, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * expected, rel=1e-5)
    loss.backward()
    assert other.grad is None
    pulled = (logits / temperature).softmax(-1) - (targets / temperature).softmax(-1)
    torch.testing.assert_close(learned.grad, temperature * pulled)
    assert float(distillation_loss(logits, logits, temperature=temperature)) == 0


def kl(learned, other):
    """``T² Σ q (log q - log p)`` over tokens and vocabulary, by logarithms of probabilities.

    Where both models agree, the gradient is a difference of equal numbers. Its rounding error would
    move parameters by AdamW, so the order of operations is that of `distillation_loss`.
    """
    p, q = (functional.log_softmax(x / TEMPERATURE, dim=-1) for x in (learned, other.detach()))
    return TEMPERATURE**2 * (q.exp() * (q - p)).sum()


class Model:
    """One of the two models in the plain loop, with its optimizer."""

    def __init__(self, model, config, lora, connector):
        rates = config.train.stage1
        self.model, self.trained = model, [*lora, *connector]
        self.peaks = [rates.lora_lr, rates.connector_lr]
        groups = [{"params": part, "lr": 0.0} for part in (lora, connector)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def answer(self, batch, seen):
        output = self.model(batch, seen)
        return output.logits, output.labels

    def step(self, batch, seen, other, progress):
        logits, labels = self.answer(batch, seen)
        loss = functional.cross_entropy(logits, labels) + WEIGHT * kl(logits, other) / len(labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * (1 + math.cos(math.pi * progress)) / 2
        self.optimizer.step()
        self.optimizer.zero_grad()
        return logits.detach()


def shared_model(model, config, lora, adapter):
    model.load("lora", lora)
    model.load("own_task_adapter", adapter)
    groups = model.groups()
    return Model(
        model, config, list(groups["lora"].values()), list(groups["own_task_adapter"].values())
    )


def teacher_model(model, config, own, lora, adapter):
    """Return the dual-adapter teacher: ``W x + s (a B_v A_v + (1 - a) B A) x`` in every layer."""
    model.load("own_task_adapter", adapter)
    for name, layer in model.decoder.named_modules():
        if isinstance(layer, LoraLayer):

            def forward(x, name=name, layer=layer):
                a, b = own[f"{name}.lora_A"], own[f"{name}.lora_B"]
                c, d = lora[f"{name}.lora_A"], lora[f"{name}.lora_B"]
                mixed = SHARE * (x @ a.T @ b.T) + (1 - SHARE) * (x @ c.T @ d.T)
                return layer.base_layer(x) + 16 / 8 * mixed

            layer.forward = forward
    return Model(model, config, list(own.values()), [])


def test_both_models_learn_from_each_other_in_every_step(tmp_path, processor, make_model):
    config = load_config(SETTINGS)
    client = federation_clients(config.data)[1]
    site = Site(client, tmp_path, "cpu")
    examples = client_examples(config.data, client, "train", seed=0)
    collator = Collator(processor, max_length=256)
    initial = initial_state(config.model, seed=0)
    lora, adapter = initial.lora, initial.adapter
    own = {name: tensor.clone().requires_grad_() for name, tensor in lora.items()}
    for exchange in (1, 2):
        instruction = Instruction(exchange, 1, ("vqa",), {"vqa": adapter}, lora, evaluate=False)
        result = run_session(site, config, instruction, progress=print)
        shared = shared_model(make_model(client_adapter=False), config, lora, adapter)
        teacher = teacher_model(make_model(client_adapter=False), config, own, lora, adapter)
        generator = session_generator(0, client.id, exchange)
        torch.randint(2**62, (), generator=generator)  # of dropout
        half = load_config(f"{SMALL} train.epochs=1").train
        steps = optimizer_steps(examples, half, generator)
        assert result.training.steps == 2 * len(steps) > 4
        for number, (part,) in enumerate(steps):
            batch = collator.train_batch([examples[i] for i in part])
            seen = visual(shared.model, processor, [examples[i] for i in part])
            with torch.no_grad():
                taught, _ = teacher.answer(batch, seen)
            learned = shared.step(batch, seen, taught, number / len(steps))
            teacher.step(batch, seen, learned, number / len(steps))
        kept = site.private_store.load().personal
        assert kept.keys() == {"lora"}
        pairs = [
            (own, kept["lora"], initial.lora),
            (shared.model.state("lora"), result.lora, lora),
            (shared.model.state("own_task_adapter"), result.adapter, adapter),
        ]
        for expected, found, before in pairs:
            assert expected.keys() == found.keys()
            distance, moved = (
                sum((t.detach() - other[n]).square().sum() for n, t in expected.items()).sqrt()
                for other in (found, before)
            )
            assert 0 < moved and distance <= 1e-3 * moved
        assert result.training.losses["distillation"] > 0
        assert result.training.losses["total"] == pytest.approx(
            result.training.losses["ce"] + result.training.losses["distillation"], rel=1e-5
        )
        lora, adapter = result.lora, result.adapter


def test_a_resumed_run_is_bit_by_bit_the_uninterrupted_one(tmp_path):
    whole = finish(tmp_path / "whole", SETTINGS)
    second = resumed(tmp_path / "run", SETTINGS, exchange=2)
    assert_same_state(second.strategy.state, whole.strategy.state)
    for client in ("vqa-0", "vqa-1"):
        mine, theirs = (run.private(client).personal["lora"] for run in (second, whole))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    # The client's model is the teacher, with a fixed weight.
    model = client_model(open_run(whole.folder.path), "vqa-0", device=torch.device("cpu"))
    assert model.share == SHARE
    scales = {(s["default"], s["residual"]) for s in (x.scaling for x in model._lora_layers)}
    assert scales == {(SHARE * 2, (1 - SHARE) * 2)}


@pytest.mark.parametrize(("model", "groups"), [("none", set()), ("whole", set(SHARED))])
def test_other_personal_models_are_not_distilled(model, groups, tmp_path):
    """As the command line says, which refuses the setting."""
    settings = SETTINGS.replace("share:", f"model:{model},share:")
    run = finish(tmp_path, settings)
    assert run.private("vqa-0").personal.keys() == groups
    assert run.events("failure") == []


def test_a_pull_beside_the_distillation_is_refused():
    message = "`train.personal.pull` is 0.1 but must be 0 with `train.personal.distillation=0.7`"
    with pytest.raises(ConfigError, match=message):
        load_config(f"{SETTINGS} train.personal.pull=0.1")


def test_the_plan_counts_both_models_and_the_received_lora():
    plain, together, accumulated = (
        make_plan(load_config(f"model=tiny strategy={method} train.epochs=2"), micro_batch=1)
        for method in ("fedit", "feddat", "feddat train.accumulation_steps=3")
    )
    (shared,), (both,) = plain.stages.values(), together.stages.values()
    (three,) = accumulated.stages.values()
    # In bytes per float32 logit: 16 without distillation; 16 more with it, measured by the storages
    # alive in `distillation_loss` and its backward pass; 8 of each micro-batch, of both models.
    assert both.memory.logits == shared.memory.logits * (16 + 16 + 8) / 16
    assert three.memory.logits == shared.memory.logits * (16 + 16 + 3 * 8) / 16
    lora, adapter = (shared.parameters[group] for group in ("lora", "own_task_adapter"))
    assert both.private == lora
    assert both.memory.adapters == shared.memory.adapters + 4 * (2 * lora + adapter)
    assert both.memory.optimizer == shared.memory.optimizer + 2 * 4 * lora
