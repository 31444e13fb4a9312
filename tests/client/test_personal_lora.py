"""A personal LoRA beside the received one (FedDPA): training, weights, answers, files, commands."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import WRITERS
from inprocess import SMALL, assert_same_state, finish, resumed
from peft.tuners.lora import LoraLayer
from perturbed import perturb
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from visuals import visual

from pilot_flwr.cli import main as cli
from pilot_flwr.client import client_data
from pilot_flwr.client.batching import optimizer_steps
from pilot_flwr.client.client_data import ClientData
from pilot_flwr.client.evaluation import instance_weights
from pilot_flwr.client.node import Site
from pilot_flwr.client.session import run_session, session_generator
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.model import FeatureCacheConfig, LoraConfig, ModelConfig
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import DataError, StateError
from pilot_flwr.inference.export import export_lora
from pilot_flwr.inference.generate import open_answerer
from pilot_flwr.inference.runs import (
    client_model,
    load_model,
    open_run,
    select_client,
    select_consensus,
)
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import initial_state, load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.resource_plan import make_plan
from pilot_flwr.protocol import Instruction

CPU = torch.device("cpu")
SHARE = 0.3
PLAIN = (
    f"{SMALL} data.train_examples=6 data.test_examples=3 data.tasks=[vqa] data.clients_per_task=2 "
    "strategy.rounds=1 model.client_adapter=false strategy.stages=1 strategy.lora=global "
    "train.clipping=global train.lr_scale=4 evaluation.max_new_tokens=4"
)
FEDDPA = (
    f"{PLAIN} train.epochs=2 "
    f"train.personal={{model:beside,share:{SHARE},weighting:similarity,instances:2}}"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two epochs with a personal LoRA, and one of one epoch without."""
    folder = tmp_path_factory.mktemp("feddpa")
    return finish(folder / "feddpa", FEDDPA), finish(folder / "plain", f"{PLAIN} train.epochs=1")


def test_the_shared_part_is_that_of_half_the_epochs_without_it(runs):
    feddpa, plain = (run.strategy.state for run in runs)
    assert runs[0].events("failure") == []
    assert_same_state(feddpa, plain)
    steps = [[e["steps"] for e in run.events("train")] for run in runs]
    assert steps[0] == [2 * n for n in steps[1]]


def write_out(model, own, received, weight):
    """Let every LoRA layer compute ``W x + s (a B_v A_v + (1 - a) B A) x`` literally."""
    for name, layer in model.decoder.named_modules():
        if isinstance(layer, LoraLayer):

            def forward(x, name=name, layer=layer):
                a, b = own[f"{name}.lora_A"], own[f"{name}.lora_B"]
                c, d = received[f"{name}.lora_A"], received[f"{name}.lora_B"]
                mixed = weight[0] * (x @ a.T @ b.T) + (1 - weight[0]) * (x @ c.T @ d.T)
                return layer.base_layer(x) + 16 / 8 * mixed

            layer.forward = forward


def test_the_personal_lora_is_trained_beside_the_frozen_received_one(runs, processor, make_model):
    """A plain loop over both exchanges: AdamW on A_v and B_v alone, a cosine, one clipped norm."""
    config, client = runs[1].config, federation_clients(runs[1].config.data)[1]
    examples = client_examples(config.data, client, "train", seed=0)
    collator = Collator(processor, max_length=256)
    model = make_model(client_adapter=False)
    initial = initial_state(model.config, seed=0)
    first = open_run(runs[1].folder.path, server_round=1).checkpoint
    sent = [(initial.lora, initial.adapter), (first.lora(client.id), first.adapter("vqa"))]
    own = {name: t.float().clone().requires_grad_() for name, t in initial.lora.items()}
    for exchange, (lora, adapter) in enumerate(sent, start=1):
        model.load("own_task_adapter", adapter)
        write_out(model, own, {name: t.float() for name, t in lora.items()}, [SHARE])
        generator = session_generator(0, client.id, exchange)
        for _ in ("shared", "personal"):  # each draws a seed for dropout, then the order
            torch.randint(2**62, (), generator=generator)
            steps = optimizer_steps(examples, config.train, generator)
        optimizer = torch.optim.AdamW(own.values(), weight_decay=0.0)
        for number, (part,) in enumerate(steps):
            batch = [examples[i] for i in part]
            decay = (1 + math.cos(math.pi * number / len(steps))) / 2
            optimizer.param_groups[0]["lr"] = 4 * config.train.stage1.lora_lr * decay
            output = model(collator.train_batch(batch), visual(model, processor, batch))
            functional.cross_entropy(output.logits, output.labels).backward()
            torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    kept = runs[0].private(client.id)
    assert kept.personal.keys() == {"lora"} and not any(kept.groups.values())
    assert kept.personal["lora"].keys() == own.keys()
    for name, tensor in own.items():
        moved = (tensor.detach() - initial.lora[name]).norm()
        assert moved > 0
        assert (tensor.detach() - kept.personal["lora"][name]).norm() <= 1e-3 * moved, name


def test_the_weights_are_scaled_mean_cosines():
    generator = torch.Generator().manual_seed(0)
    shown, known = torch.randn(4, 8, generator=generator), torch.randn(3, 8, generator=generator)
    shown[3] = -known.sum(0)  # opposed to all on average
    expected = []
    for h in shown.tolist():
        cosines = []
        for other in known.tolist():
            product = sum(a * b for a, b in zip(h, other, strict=True))
            cosines.append(product / math.hypot(*h) / math.hypot(*other))
        expected.append(0.7 * max(0.0, sum(cosines) / len(cosines)))
    assert expected[3] == 0 < max(expected)
    found = instance_weights(shown, known, largest=0.7)
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(
        instance_weights(shown[:1], shown[:1], largest=0.5), torch.tensor([0.5])
    )


def test_every_question_is_answered_with_its_own_weight(runs, processor, make_model, monkeypatch):
    """Against transformers' hidden states and a greedy loop of one example without a cache."""
    run = open_run(runs[0].folder.path)
    selected = select_client(run, "vqa-0")
    answerer = open_answerer(run, selected, device=CPU)
    examples = client_examples(run.config.data, selected.client, "test", seed=0)
    collator, instances = answerer.collator, answerer.instances
    train = client_examples(run.config.data, selected.client, "train", seed=0)
    assert len(instances) == 2 and {e.id for e in instances} <= {e.id for e in train}
    seen, weigh = [], answerer.model.weigh_lora

    def noting(weight):
        seen.append(weight)
        weigh(weight)

    monkeypatch.setattr(answerer.model, "weigh_lora", noting)
    texts = answerer(examples)
    found = torch.cat([weight for weight in seen if isinstance(weight, torch.Tensor)])
    assert len(set(found.tolist())) > 1

    model = make_model(client_adapter=False)
    received = run.received(selected)
    model.load("own_task_adapter", received.adapters["vqa"])
    weight = [1.0]
    mine = {n: t.float() for n, t in selected.private.personal["lora"].items()}
    write_out(model, mine, {n: t.float() for n, t in received.lora.items()}, weight)
    stop = model.end_tokens(collator.end_token_id())

    @torch.no_grad()
    def run_base(example, tokens):
        with model._reading(visual(model, processor, [example])) as images:
            return model.base(input_ids=tokens, output_hidden_states=True, **images)

    def represent(example):
        weight[0] = 1.0
        tokens = torch.tensor([collator.prompt(example)])
        return run_base(example, tokens).hidden_states[-1][0, -1]

    known = [represent(example) for example in instances]
    for number, example in enumerate(examples):
        h = represent(example)
        cosines = [float(functional.cosine_similarity(h, other, dim=0)) for other in known]
        a = SHARE * max(0.0, sum(cosines) / len(cosines))
        assert float(found[number]) == pytest.approx(a, rel=1e-4)
        weight[0] = a
        tokens, new = torch.tensor([collator.prompt(example)]), []
        while len(new) < 4 and (not new or new[-1] not in stop):
            new.append(int(run_base(example, tokens).logits[0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[new[-1]]])], 1)
        assert texts[number] == processor.tokenizer.decode(new, skip_special_tokens=True)


def test_the_training_examples_are_represented_once(runs, monkeypatch):
    run = open_run(runs[0].folder.path)
    answerer = open_answerer(run, selected := select_client(run, "vqa-0"), device=CPU)
    shown, represent = [], answerer.model.represent

    def noting(batch, visual):
        shown.append(len(batch.input_ids))
        return represent(batch, visual)

    monkeypatch.setattr(answerer.model, "represent", noting)
    examples = client_examples(run.config.data, selected.client, "test", seed=0)
    one_by_one = [text for example in examples for text in answerer([example])]
    assert shown == [2, 1, 1, 1]
    assert one_by_one == answerer(examples)


@pytest.mark.parametrize("long", [3, 4])
def test_a_prompt_that_is_cut_in_training_weights_no_question(long, tmp_path, monkeypatch):
    """With `train.over_long=cut` its first answer is trained on, and its last question is cut."""
    config = load_config(f"{FEDDPA} train.over_long=cut train.max_length=40")
    examples = [
        Example(str(number), (), (*ask("Is it?"), *ask("why? " * (60 if number < long else 1))))
        for number in range(4)
    ]
    monkeypatch.setattr(client_data, "client_examples", lambda *args, **more: examples)
    model = PilotModel(load_base(config.model, CPU), config.model)
    model.enter_stage1("vqa")
    model.set_residual(model.state("lora"), share=SHARE)
    client = federation_clients(config.data)[0]
    data = ClientData(client, config, model, folder=tmp_path, progress=print)
    assert len(data.examples("train")) == 4
    if long == 3:
        assert [example.id for example in data.instances()] == ["3"]
        return
    with pytest.raises(DataError, match="'vqa-0' has a prompt of at most `train.max_length=40`"):
        data.instances()


def test_the_share_can_be_overridden_in_use(runs, tmp_path, capsys):
    """With a fixed weight, the model of a run with weights by question can be exported."""
    folder, fixed = runs[0].folder.path, "train.personal={weighting:fixed,share:0.8}"
    run = open_run(folder, overrides=[fixed])
    answerer = open_answerer(run, select_client(run, "vqa-0"), device=CPU)
    assert answerer.model.share == 0.8 and not answerer.instances
    assert cli.main(["evaluate", str(folder), fixed]) == 0
    assert "The settings have changed" in capsys.readouterr().err
    assert cli.main(["export", str(folder), str(tmp_path / "x"), "--client", "vqa-0", fixed]) == 0


def test_a_clients_model_has_both_loras_and_the_consensus_model_one(runs):
    run, kept = open_run(runs[0].folder.path), runs[0].private("vqa-0")
    model = client_model(run, "vqa-0", device=CPU)
    assert model.share == SHARE
    for name, tensor in model.state("lora").items():
        assert torch.equal(tensor, kept.personal["lora"][name])
        assert torch.equal(
            model.state("residual")[name], run.checkpoint.lora("vqa-0")[name].float()
        )
    shared = load_model(run, select_consensus(run, "vqa"), device=CPU)
    assert shared.share is None and shared.state("residual") == {}
    scales = {s for layer in shared._lora_layers for s in layer.scaling.values()}
    assert scales == {16 / 8}


def ask(question):
    return Turn("user", question), Turn("assistant", "?")


def session_of(config, state, tmp_path, **asked):
    """Run a session of exchange 2 at a site that holds `state`."""
    site = Site(federation_clients(config.data)[0], tmp_path, "cpu")
    site.private_store.save(state, server_round=1)
    initial = initial_state(config.model, seed=0)
    instruction = Instruction(2, 1, ("vqa",), {"vqa": initial.adapter}, initial.lora, **asked)
    try:
        return run_session(site, config, instruction, progress=print)
    finally:
        assert site.private_store.rounds() == [1]


@pytest.mark.parametrize("asked", [{"evaluate": False}, {"train": False}], ids=["train", "answer"])
@pytest.mark.parametrize(
    ("model", "groups", "message"),
    [
        ("beside", (), "holds no personal model but .*`train.personal.model=beside`"),
        ("beside", ("lora", "own_task_adapter"), "of lora and own_task_adapter but"),
        ("whole", ("lora",), "of lora but .*`train.personal.model=whole`"),
        ("none", ("lora",), "of lora but .*`train.personal.model=none`"),
    ],
)
def test_a_private_state_of_another_kind_is_refused(runs, tmp_path, model, groups, message, asked):
    config = load_config(f"{PLAIN} train.epochs=2 train.personal.model={model}")
    whole = {
        "lora": runs[0].private("vqa-0").personal["lora"],
        "own_task_adapter": runs[0].strategy.state.adapters["vqa"],
    }
    state = runs[0].private("vqa-0")
    state = replace(state, personal={group: whole[group] for group in groups})
    with pytest.raises(StateError, match=message):
        session_of(config, state, tmp_path, **asked)


def test_a_resumed_run_is_bit_by_bit_the_uninterrupted_one(runs, tmp_path):
    second = resumed(tmp_path / "run", FEDDPA, exchange=2)
    assert_same_state(second.strategy.state, runs[0].strategy.state)
    for client in ("vqa-0", "vqa-1"):
        mine, theirs = (run.private(client).personal["lora"] for run in (second, runs[0]))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    for run in (second, runs[0]):  # the last event of a client: its evaluation after exchange 2
        assert {e["client"] for e in run.events("evaluate")} == {"vqa-0", "vqa-1"}
    last = [{e["client"]: e["score"] for e in r.events("evaluate")} for r in (second, runs[0])]
    assert last[0] == last[1]


def test_the_command_scores_as_the_run_did(runs, tmp_path):
    out = tmp_path / "scores.json"
    assert cli.main(["evaluate", str(runs[0].folder.path), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["clients"]
    assert [row["score"] for row in rows] == [row["recorded"] for row in rows]
    assert None not in [row["recorded"] for row in rows]
    chat = ["chat", str(runs[0].folder.path), "--client", "vqa-0", "--question", "What is it?"]
    assert cli.main(chat) == 0


def test_an_export_needs_a_fixed_weight(runs, tmp_path, capsys):
    folder = str(runs[0].folder.path)
    for options in (["--client", "vqa-0"], ["--client", "vqa-0", "--merge"]):
        assert cli.main(["export", folder, str(tmp_path / "own"), *options]) == 1
        message = capsys.readouterr().err
        assert "`train.personal.weighting=similarity`" in message and "`--task`" in message
    assert not (tmp_path / "own").exists()
    assert cli.main(["export", folder, str(tmp_path / "shared"), "--task", "vqa"]) == 0


def test_with_a_fixed_weight_both_loras_are_exported_as_one(runs, tmp_path):
    model = client_model(open_run(runs[0].folder.path), "vqa-0", device=CPU)
    export_lora(model, tmp_path, base="somewhere")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    own, received = model.state("lora"), model.state("residual")
    for name in (name.removesuffix(".lora_A") for name in own if name.endswith("lora_A")):
        prefix = f"base_model.model.model.language_model.{name}"
        found = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        expected = SHARE * own[f"{name}.lora_B"] @ own[f"{name}.lora_A"]
        expected += (1 - SHARE) * received[f"{name}.lora_B"] @ received[f"{name}.lora_A"]
        torch.testing.assert_close(found, expected)


def test_training_examples_that_cannot_be_read_are_named(runs, monkeypatch):
    def unreadable(self, split):
        raise DataError(f"The {split} split is not here.")

    monkeypatch.setattr(ClientData, "examples", unreadable)
    run = open_run(runs[0].folder.path)
    with pytest.raises(DataError, match="'vqa-0' weights .* train split is not here.*`--task`"):
        open_answerer(run, select_client(run, "vqa-0"), device=CPU)
    assert not open_answerer(run, select_consensus(run, "vqa"), device=CPU).instances


def test_the_plan_counts_the_received_lora_beside_the_personal_one():
    plain, beside = (
        make_plan(load_config(f"model=tiny strategy={method} train.epochs=2"), micro_batch=1)
        for method in ("fedit", "feddpa")
    )
    (shared,), (personal,) = plain.stages.values(), beside.stages.values()
    assert personal.private == shared.parameters["lora"] and shared.private == 0
    assert (personal.up_bytes, personal.down_bytes) == (shared.up_bytes, shared.down_bytes)
    assert personal.memory.total > shared.memory.total
    assert personal.memory.adapters == shared.memory.adapters + 4 * shared.parameters["lora"]
    assert personal.memory.optimizer == 2 * 4 * shared.parameters["lora"]  # the connector is frozen


@pytest.mark.parametrize("family", list(WRITERS))
def test_every_row_of_a_batch_has_its_own_weight_in_every_family(family, tmp_path):
    """Padded prompts with different weights, as each prompt alone with its own."""
    config = ModelConfig(path=WRITERS[family](tmp_path), lora=LoraConfig(rank=2))
    model = PilotModel(load_base(config, CPU), config)
    model.enter_stage1("vqa")
    perturb(model)
    received = {name: tensor.flip(0) for name, tensor in model.state("lora").items()}
    model.set_residual(received, share=0.5)
    processor = load_processor(config.path)
    collator = make_collator(config, processor, max_length=2048)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    examples = [
        Example("short", (KeptImage(Image.fromarray(pixels)),), ask("<image>\nWhat?")),
        Example("long", (KeptImage(Image.fromarray(255 - pixels)),), ask("<image>\nWhat is it?")),
        Example("text", (), ask("Is there an image in this question?")),
    ]
    cache = FeatureCache(FeatureCacheConfig(where="off"))

    def represent(part, weight):
        model.weigh_lora(weight)
        visual = cache.encode(model, processor, part)
        return model.represent(collator.prompt_batch(part), visual)

    weights = [0.0, 0.3, 1.0]
    found = represent(examples, torch.tensor(weights))
    for example, weight, row in zip(examples, weights, found, strict=True):
        (alone,) = represent([example], weight)
        torch.testing.assert_close(row, alone, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(row, represent([example], 1 - weight)[0], rtol=1e-3, atol=1e-4)
    model.set_residual({})
    alone = represent(examples[:1], 1.0)[0]
    hidden = []
    hook = model.base.lm_head.register_forward_pre_hook(lambda head, args: hidden.append(args[0]))
    batch = collator.prompt_batch(examples[:1])
    model.generate(batch, cache.encode(model, processor, examples[:1]), max_new_tokens=1)
    hook.remove()
    torch.testing.assert_close(alone, hidden[0][0, -1].float())
