"""One model trained on all data, and one that nobody trains: what a federation is held against."""

import re

import pytest
import torch
from flwr.app import MessageType
from inprocess import SMALL, Federation, finish
from visuals import encoder

from pilot_flwr.client.session import session_generator
from pilot_flwr.client.training import train
from pilot_flwr.config.loading import load_config
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.federation import PooledExamples, client_examples, federation_clients
from pilot_flwr.errors import BelowMinimum, ConfigError
from pilot_flwr.inference.runs import client_model, open_run
from pilot_flwr.model.loading import initial_state
from pilot_flwr.run.history import read_run
from pilot_flwr.run.tables import summary, timeline

TWO_TASKS = (
    f"{SMALL} data.train_examples=3 data.test_examples=1 data.tasks=[vqa,counting] "
    "data.clients_per_task=1 strategy.rounds=1 model.client_adapter=false strategy.stages=1"
)
POOLED = f"{TWO_TASKS} strategy.trained_by=pooled strategy.adapters=global strategy.lora=global"


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("pooled") / "run", POOLED)


def test_pooled_training_is_a_plain_loop_over_all_examples(pooled, processor, make_model):
    assert pooled.events("failure") == []
    config = pooled.config
    examples = []  # one client after the other, in the federation's order
    for client in federation_clients(config.data):
        examples += client_examples(config.data, client, "train", seed=0)
    model = make_model(client_adapter=False)
    model.load("lora", initial_state(model.config, seed=0).lora)
    for exchange in (1, 2):
        train(
            model,
            examples,
            collator=Collator(processor, max_length=256),
            encode=encoder(model, processor),
            config=config.train,
            generator=session_generator(0, "vqa-0", exchange),
            progress=lambda line: None,
        )
    # Every client has that model, of whichever task it is.
    run = open_run(pooled.folder.path)
    for client in ("vqa-0", "counting-0"):
        got = client_model(run, client, device=torch.device("cpu"))
        for group in ("lora", "own_task_adapter"):
            for name, tensor in model.state(group).items():
                assert torch.equal(got.state(group)[name], tensor), (client, name)


def test_one_client_trains_on_pooled_data_and_all_evaluate(pooled):
    trained = pooled.events("train")
    assert [(e["client"], e["round"], e["examples"]) for e in trained] == [
        ("vqa-0", 1, 6),
        ("vqa-0", 2, 6),
    ]
    evaluated = {(e["client"], e["round"]) for e in pooled.events("evaluate")}
    assert evaluated == {(c, r) for c in ("vqa-0", "counting-0") for r in (0, 1, 2)}
    assert [e["clients"] for e in pooled.events("aggregate")] == [1, 1]
    last = timeline(pooled.folder.events).splitlines()[-1]
    assert re.match(r"\| evaluation +\| 2 clients ", last)  # not those of the exchanges before


def test_the_report_counts_what_is_sent_to_clients_that_only_evaluate(pooled):
    for exchange in read_run(pooled.folder.path).exchanges:
        orders = pooled.events("order", round=exchange.number)
        assert {e["client"] for e in orders} == {"vqa-0", "counting-0"}
        assert sum(exchange.down.values()) == sum(sum(e["down"].values()) for e in orders)


def test_examples_are_pooled_in_order_and_told_apart():
    data = load_config(TWO_TASKS).data
    parts = {c.id: client_examples(data, c, "train", seed=0) for c in federation_clients(data)}
    pooled = PooledExamples(parts)
    expected = [(c, e) for c, examples in parts.items() for e in examples]
    assert len(pooled) == len(expected) == 6
    for example, (client, own) in zip(pooled, expected, strict=True):
        assert example.id == f"{client}/{own.id}"
        assert (example.images, example.turns) == (own.images, own.turns)
    assert pooled[-1] == pooled[5]
    assert [example.id for example in pooled[1:6:2]] == [pooled[i].id for i in (1, 3, 5)]
    with pytest.raises(IndexError):
        pooled[6]


def test_without_the_client_that_trains_a_pooled_run_stops(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr("pilot_flwr.client.rank.train", fail)
    with pytest.raises(BelowMinimum, match="'vqa-0', which trains on the pooled data, deliv.*no r"):
        finish(tmp_path / "run", POOLED)


def test_nobody_trains_and_every_exchange_evaluates_the_base_model(tmp_path, make_model):
    federation = finish(tmp_path / "run", f"{TWO_TASKS} strategy.trained_by=nobody")
    assert federation.events("failure") == federation.events("train") == []
    kinds = {m.metadata.message_type for m in federation.grid.messages}
    assert kinds == {MessageType.QUERY, MessageType.EVALUATE}
    scores = {(e["client"], e["round"]): e["score"] for e in federation.events("evaluate")}
    assert len(scores) == 6
    assert "| exchange 2 |" in summary(federation.folder.events)
    assert all(score == scores[client, 0] for (client, _), score in scores.items())
    got = client_model(open_run(tmp_path / "run"), "vqa-0", device=torch.device("cpu"))
    base = make_model(client_adapter=False)
    base.load("lora", initial_state(base.config, seed=0).lora)
    for group in ("lora", "own_task_adapter"):
        for name, tensor in base.state(group).items():
            assert torch.equal(got.state(group)[name], tensor)


def test_a_real_site_takes_no_part_in_pooled_training(tmp_path):
    sites = [
        {"client-id": client, "state-folder": str(tmp_path / client)}
        for client in ("vqa-0", "counting-0")
    ]
    with pytest.raises(BelowMinimum, match="`strategy.trained_by` is 'pooled'.*only a simulation"):
        words = f"{POOLED} strategy.wait_seconds=0.2"
        Federation(tmp_path / "run", words, node_configs=sites).run()


NOTHING = "strategy.stages=1 strategy.sharing.adapter=false strategy.sharing.lora=none"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "strategy.trained_by=pooled model.client_adapter=false",
            "`strategy.stages` is 2 but must be 1 with `strategy.trained_by=pooled`",
        ),
        (f"{POOLED} model.client_adapter=true", "`model.client_adapter` is true but must be false"),
        (f"{POOLED} strategy.adapters=task", "`strategy.adapters` is task but must be global"),
        (f"{POOLED} strategy.sharing.lora=B", "`strategy.sharing.lora` is B but must be AB"),
        (
            f"{NOTHING} train.proximal_weight=0.1",
            "`train.proximal_weight` is 0.1 but must be 0 with "
            "`strategy.sharing.adapter=false strategy.sharing.lora=none`",
        ),
        (
            f"{NOTHING} privacy.enabled=true privacy.clip_norm=1 privacy.noise_multiplier=1",
            "`privacy.enabled` is true but must be false",
        ),
        (
            "train.personal.model=beside train.epochs=2",
            "`strategy.stages` is 2 but must be 1 with `train.personal.model=beside`",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides)
