"""Ditto: the shared model as without it, and a personal one that is drawn to what was sent."""

import pytest
import torch
from inprocess import SMALL, finish
from visuals import encoder

from pilot_flwr.client.node import Site
from pilot_flwr.client.session import run_session, session_generator
from pilot_flwr.client.training import Proximal, accumulate, train
from pilot_flwr.config.loading import load_config
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import ConfigError, StateError
from pilot_flwr.inference.runs import client_model, load_model, open_run, select_consensus
from pilot_flwr.model.loading import initial_state
from pilot_flwr.protocol import Instruction

CPU = torch.device("cpu")
WEIGHT = 3.0
PLAIN = (
    f"{SMALL} data.train_examples=4 data.test_examples=1 data.tasks=[vqa] data.clients_per_task=2 "
    "strategy.rounds=1 model.client_adapter=false strategy.stages=1 strategy.lora=global"
)
GROUPS = ("lora", "own_task_adapter")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two epochs with Ditto, and one of one epoch without."""
    folder = tmp_path_factory.mktemp("ditto")
    ditto = f"{PLAIN} train.epochs=2 train.personal={{model:whole,pull:{WEIGHT}}}"
    return finish(folder / "ditto", ditto), finish(folder / "plain", f"{PLAIN} train.epochs=1")


def test_the_shared_part_is_that_of_half_the_epochs_without_ditto(runs):
    ditto, plain = (run.strategy.state for run in runs)
    assert runs[0].events("failure") == []
    for client in ("vqa-0", "vqa-1"):
        for name, tensor in plain.loras[client].items():
            assert torch.equal(tensor, ditto.loras[client][name])
    for name, tensor in plain.adapters["vqa"].items():
        assert torch.equal(tensor, ditto.adapters["vqa"][name])
    steps = [[e["steps"] for e in run.events("train")] for run in runs]
    assert steps[0] == [2 * n for n in steps[1]]


def test_the_personal_model_is_trained_from_itself_and_drawn_to_what_was_sent(
    runs, processor, make_model
):
    """A second loop, over both exchanges: w as it is sent, v from v, one generator a turn."""
    config, client = runs[1].config, federation_clients(runs[1].config.data)[1]
    examples = client_examples(config.data, client, "train", seed=0)
    model = make_model(client_adapter=False)
    initial = initial_state(model.config, seed=0)
    # What was sent in the second exchange: the means of the first.
    first = open_run(runs[1].folder.path, server_round=1).checkpoint
    sent = [
        {"lora": initial.lora, "own_task_adapter": initial.adapter},
        {"lora": first.lora(client.id), "own_task_adapter": first.adapter("vqa")},
    ]

    def fit(generator, proximal=None):
        train(
            model,
            examples,
            collator=Collator(processor, max_length=256),
            encode=encoder(model, processor),
            config=config.train,
            generator=generator,
            progress=lambda line: None,
            proximal=proximal,
        )

    personal = sent[0]
    for exchange, start in enumerate(sent, start=1):
        for group in GROUPS:
            model.load(group, start[group])
        generator = session_generator(0, client.id, exchange)
        fit(generator)  # of w; of it the generator alone matters here
        for group in GROUPS:
            model.load(group, start[group])
        groups = model.groups()
        pull = Proximal([p for group in GROUPS for p in groups[group].values()], WEIGHT)
        for group in GROUPS:
            model.load(group, personal[group])
        fit(generator, pull)
        personal = {group: model.state(group) for group in GROUPS}
    kept = runs[0].private(client.id).personal
    for group in GROUPS:
        assert kept[group].keys() == personal[group].keys()
        for name, tensor in personal[group].items():
            assert torch.equal(tensor, kept[group][name]), name


def test_the_personal_objectives_gradient(make_model, processor, runs):
    """Of F_k(v) + λ/2 ‖v − w‖² by autograd on the whole sum, λ (v − w) + that of F_k alone."""
    config, client = runs[0].config, federation_clients(runs[0].config.data)[0]
    examples = client_examples(config.data, client, "train", seed=0)[:2]
    model = make_model(client_adapter=False)
    model.load("lora", initial_state(model.config, seed=0).lora)
    named = {f"{g}/{n}": p for g in GROUPS for n, p in model.groups()[g].items()}
    pull = Proximal(named.values(), WEIGHT)
    sent = {name: p.detach().clone() for name, p in named.items()}
    generator = torch.Generator().manual_seed(0)
    for parameter in named.values():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    collator = Collator(processor, max_length=256)

    def own_gradient():
        for parameter in named.values():
            parameter.grad = None
        visuals = encoder(model, processor)([examples])
        accumulate(model, [collator.train_batch(examples)], visuals, config.train)

    own_gradient()
    alone = {name: p.grad.clone() for name, p in named.items()}
    own_gradient()
    pull.backpropagate()
    for name, parameter in named.items():
        expected = alone[name] + WEIGHT * (parameter.detach() - sent[name])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)


def test_the_client_is_evaluated_by_its_personal_model(runs):
    ditto = runs[0]
    run = open_run(ditto.folder.path)
    kept = ditto.private("vqa-0")
    model = client_model(run, "vqa-0", device=CPU)
    for group in GROUPS:
        for name, tensor in model.state(group).items():
            assert torch.equal(tensor, kept.personal[group][name])
    assert not kept.empty and kept.groups == {
        "client_adapter": {}, "cross_task_adapters": {}, "router": {}
    }  # fmt: skip
    shared = load_model(run, select_consensus(run, "vqa"), device=CPU)
    for name, tensor in shared.state("own_task_adapter").items():
        assert torch.equal(tensor, ditto.strategy.state.adapters["vqa"][name])
    assert not torch.equal(
        kept.personal["own_task_adapter"]["linear_2.weight"],
        ditto.strategy.state.adapters["vqa"]["linear_2.weight"],
    )


def test_two_models_have_no_schedule_over_the_run():
    with pytest.raises(ConfigError, match="`train.schedule` is run but must be exchange with"):
        load_config("strategy=ditto train.schedule=run")


def test_a_client_that_has_trained_without_ditto_has_no_personal_model(runs, tmp_path):
    ditto, plain = runs
    site = Site(federation_clients(ditto.config.data)[0], tmp_path, "cpu")
    site.private_store.save(plain.private("vqa-0"), server_round=1)
    initial = initial_state(ditto.config.model, seed=0)
    instruction = Instruction(
        2, 1, ("vqa",), {"vqa": initial.adapter}, initial.lora, evaluate=False
    )
    with pytest.raises(StateError, match="no personal model but .*`train.personal.model=whole`"):
        run_session(site, ditto.config, instruction, progress=print)
    assert site.private_store.rounds() == [1]
