"""Updates that are well formed and yet hostile: old ones, huge ones, those of a liar."""

import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MessageType
from inprocess import TWO_TASKS, Federation, edit
from quick_training import quick_training

from pilot_flwr.errors import RunError
from pilot_flwr.flower.codec import decode_state, encode_state
from pilot_flwr.run.checkpoint import load_checkpoint
from pilot_flwr.strategy import PilotStrategy

OVERRIDES = f"{TWO_TASKS} evaluation.enabled=false data.train_examples=4"
WRONG = "vqa-0"


@pytest.fixture(autouse=True, scope="module")
def quickly():
    """Training itself is not what is tested here."""
    with quick_training():
        yield


def federation(folder, change, *, exchange, overrides=OVERRIDES):
    """Run to the end; `change(message, reply)` has the last word on vqa-0's reply of one exchange.

    Then the server's state and all that was sent and received by it.
    """
    run = Federation(folder, overrides)

    def hook(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            order = message.content["instruction"]
            if order["client"] == WRONG and order["round"] == exchange:
                return change(message, reply)
        return reply

    run.grid.on_reply = hook
    return run.run()


def lost(message, reply):
    return Message(Error(0, "gone"), reply_to=message)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """State of the server after a run without vqa-0's reply, by the exchange it is missing in."""
    return {
        exchange: federation(
            tmp_path_factory.mktemp("lost"), lost, exchange=exchange
        ).strategy.state
        for exchange in (1, 2)
    }


def same(state, other):
    for mine, theirs in ((state.adapters, other.adapters), (state.loras, other.loras)):
        assert mine.keys() == theirs.keys()
        for name, tensors in mine.items():
            assert all(torch.equal(t, theirs[name][key]) for key, t in tensors.items())


def scaled(state, start, factor):
    """Replace tensors by start + factor (tensor - start)."""
    for name, before in decode_state(start).items():
        state[name] = before + factor * (state[name] - before)


def grown(factor, parts=("lora", "task-adapter.vqa")):
    def change(message, reply):
        for part in parts:
            edit(reply.content, part, partial(scaled, start=message.content[part], factor=factor))
        return reply

    return change


def failures(run):
    return [(f["round"], f["phase"], f["client"], f["reason"]) for f in run.events("failure")]


def test_the_reply_of_an_old_exchange_is_refused(tmp_path, without):
    old = {}

    def remember(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            order = message.content["instruction"]
            if order["client"] == WRONG and order["round"] == 1:
                old["content"] = copy.deepcopy(reply.content)
            elif order["client"] == WRONG:
                return Message(old["content"], reply_to=message)
        return reply

    run = Federation(tmp_path, OVERRIDES)
    run.grid.on_reply = remember
    run.run()
    assert failures(run) == [(2, "train", WRONG, "Rejected: it is for exchange 1, not 2.")]
    same(run.strategy.state, without[2])


def test_another_clients_reply_is_refused(tmp_path, without):
    others = {}

    def steal(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            order = message.content["instruction"]
            if order["client"] == WRONG and order["round"] == 2:
                return Message(others["content"], reply_to=message)
            others["content"] = copy.deepcopy(reply.content)
        return reply

    run = Federation(tmp_path, OVERRIDES)
    run.grid.on_reply = steal
    run.run()
    ((number, phase, client, reason),) = failures(run)
    assert (number, phase, client) == (2, "train", WRONG)
    assert "it claims to be from 'counting-1'" in reason
    same(run.strategy.state, without[2])


def mean_losses(monkeypatch):
    """What aggregation tells Flower as each exchange's loss, filled while a run goes on."""
    told, aggregate = {}, PilotStrategy.aggregate_train

    def listen(self, server_round, replies):
        arrays, metrics = aggregate(self, server_round, replies)
        told[server_round] = metrics["loss"]
        return arrays, metrics

    monkeypatch.setattr(PilotStrategy, "aggregate_train", listen)
    return told


@pytest.mark.parametrize("exchange", [1, 2])
def test_a_huge_update_is_rejected(tmp_path, without, exchange, monkeypatch):
    told = mean_losses(monkeypatch)
    overrides = f"{OVERRIDES} strategy.update_norm.action=reject"

    def change(message, reply):
        reply.content["training"]["loss.total"] = 8.0  # the others' are lower
        return grown(1000)(message, reply)

    run = federation(tmp_path, change, exchange=exchange, overrides=overrides)
    ((number, phase, client, reason),) = failures(run)
    assert (number, phase, client) == (exchange, "train", WRONG)
    assert reason.startswith(
        "Rejected: the norm of its update is above the exchange's bound: task adapter "
    )
    assert ", LoRA " in reason
    same(run.strategy.state, without[exchange])
    rows = {e["client"]: e for e in run.events("update_norm", round=exchange)}
    assert {c: e["action"] for c, e in rows.items()} == {
        "counting-0": "accepted",
        "counting-1": "accepted",
        WRONG: "rejected",
        "vqa-1": "accepted",
    }
    assert rows[WRONG]["norms"]["lora"] > 100 * rows[WRONG]["bounds"]["lora"]
    losses = {e["client"]: e["loss"] for e in run.events("train", round=exchange)}
    assert losses.pop(WRONG) == 8.0 > max(losses.values()) and len(losses) == 3
    assert told[exchange] == pytest.approx(np.mean(list(losses.values())), rel=1e-12)


def test_one_part_alone_is_enough(tmp_path):
    overrides = f"{OVERRIDES} strategy.update_norm.action=reject strategy.rounds=1"
    run = federation(tmp_path, grown(1000, ["lora"]), exchange=1, overrides=overrides)
    ((_, _, _, reason),) = failures(run)
    assert "LoRA" in reason and "task adapter" not in reason


def test_a_huge_update_is_clipped(tmp_path):
    """As if the client had sent the update that a naive loop shortens to the bound."""
    overrides = f"{OVERRIDES} strategy.update_norm.action=clip"
    clipped = federation(tmp_path / "clip", grown(1000), exchange=1, overrides=overrides)
    (row,) = clipped.events("update_norm", round=1, client=WRONG)
    assert row["action"] == "clipped" and not failures(clipped)
    parts = {"lora": "lora", "task-adapter.vqa": "adapter"}

    def shorten(message, reply):
        reply = grown(1000)(message, reply)
        for part, name in parts.items():
            record, start = decode_state(reply.content[part]), decode_state(message.content[part])
            change = {k: t.double().numpy() - start[k].double().numpy() for k, t in record.items()}
            norm = np.sqrt(sum((c**2).sum() for c in change.values()))
            np.testing.assert_allclose(norm, row["norms"][name], rtol=1e-9)
            for key, values in change.items():
                shorter = start[key].double().numpy() + values * (row["bounds"][name] / norm)
                record[key] = torch.from_numpy(shorter).float()
            reply.content[part] = encode_state(record)
        return reply

    by_hand = federation(tmp_path / "hand", shorten, exchange=1)
    mine, theirs = (
        load_checkpoint(run.folder.checkpoints / "round-0001") for run in (clipped, by_hand)
    )
    for client in mine.task_of:
        other = theirs.lora(client)
        for name, tensor in mine.lora(client).items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-7)
    other = theirs.adapter("vqa")
    for name, tensor in mine.adapter("vqa").items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-7)


def test_by_default_a_huge_update_is_only_told(tmp_path, caplog):
    change = grown(1000)
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger="flwr"):
            warned = federation(tmp_path / "warn", change, exchange=2)
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    off = f"{OVERRIDES} strategy.update_norm.action=off"
    plain = federation(tmp_path / "off", change, exchange=2, overrides=off)
    same(warned.strategy.state, plain.strategy.state)  # the paper's algorithm, untouched
    assert not failures(warned) and not plain.events("update_norm")
    (row,) = [e for e in warned.events("update_norm") if e["action"] != "accepted"]
    assert (row["round"], row["client"], row["action"]) == (2, WRONG, "warned")
    assert f"Exchange 2, train, {WRONG}: the norm of its update is above" in caplog.text


def test_two_updates_are_too_few_for_a_bound(tmp_path, caplog):
    overrides = f"{OVERRIDES} data.tasks=[vqa] strategy.update_norm.action=reject"
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger="flwr"):
            run = federation(tmp_path, grown(1000), exchange=1, overrides=overrides)
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert not failures(run)
    assert {e["action"] for e in run.events("update_norm")} == {"unchecked"}
    assert "2 updates are too few to bound their norms; at least 3 are needed." in caplog.text


def declares(examples, *, exchanges):
    def lie(message, reply):
        mine = message.metadata.dst_node_id == 1 and message.metadata.group_id in exchanges
        if message.metadata.message_type == MessageType.QUERY and mine:
            reply.content["member"]["examples"] = examples
        return reply

    return lie


def test_a_client_that_declares_too_many_examples_is_refused(tmp_path):
    run = Federation(tmp_path, f"{OVERRIDES} strategy.max_examples=1000 strategy.rounds=1")
    run.grid.on_reply = declares(1001, exchanges="12")
    run.run()
    assert {e["client"] for e in run.events("train")} == {"vqa-1", "counting-0", "counting-1"}
    reasons = {reason for _, _, client, reason in failures(run) if client == "node 1"}
    (reason,) = reasons
    assert "`examples` is 1001 but `strategy.max_examples` is 1000" in reason


def test_a_change_of_the_declared_examples_is_told(tmp_path):
    """A client is asked again after a failure alone: an attacker would fail on purpose."""
    run = Federation(tmp_path, OVERRIDES)
    lie = declares(4000, exchanges="2")

    def fail_first(message, reply):
        kind, number = message.metadata.message_type, message.metadata.group_id
        if (kind, number, message.metadata.dst_node_id) == (MessageType.TRAIN, "1", 1):
            return Message(Error(0, "on purpose"), reply_to=message)
        return lie(message, reply)

    run.grid.on_reply = fail_first
    run.run()
    (warning,) = run.events("warning")
    assert (warning["round"], warning["client"]) == (2, WRONG)
    assert warning["text"] == "declares 4000 training examples, and declared 2 before."


def test_a_rejected_update_does_not_count_for_the_minimum(tmp_path):
    overrides = f"{OVERRIDES} strategy.update_norm.action=reject strategy.min_replies=4"
    with pytest.raises(
        RunError, match="3 of 4 clients delivered a usable update.*above the exchange's bound"
    ):
        federation(tmp_path, grown(1000), exchange=1, overrides=overrides)
