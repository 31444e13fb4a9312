"""Clients that are missing, late, silent or gone: who waits for whom, and what is made of it."""

import shutil

import pytest
import torch
from flwr.app import Error, Message, MessageType
from inprocess import TWO_TASKS, Federation
from quick_training import quick_training

from pilot_flwr import strategy
from pilot_flwr.errors import BelowMinimum
from pilot_flwr.run.directory import read_events

QUICK = f"{TWO_TASKS} evaluation.enabled=false"
PATIENT = f"{QUICK} strategy.min_replies=4 strategy.below_minimum=wait strategy.wait_seconds=3"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(strategy, "LONGEST_PAUSE_SECONDS", 0.01)
    with quick_training():
        yield


def same_state(one, two):
    for mine, theirs in ((one.adapters, two.adapters), (one.loras, two.loras)):
        assert mine.keys() == theirs.keys()
        for name, tensors in mine.items():
            assert all(torch.equal(t, theirs[name][key]) for key, t in tensors.items())


def on_train(federation, exchange, act):
    """Let `act` change the replies to an exchange's orders."""

    def on_reply(message, reply):
        train = message.metadata.message_type == MessageType.TRAIN
        if train and message.metadata.group_id == str(exchange):
            return act(message, reply)
        return reply

    federation.grid.on_reply = on_reply


def trained(federation, exchange):
    return [e["client"] for e in federation.events("train", round=exchange)]


@pytest.mark.parametrize("exchange", [1, 2])
def test_an_exchange_below_the_minimum_is_repeated_as_if_it_had_not_been(tmp_path, exchange):
    """Twice: a client is out of memory after the others have trained and saved."""
    undisturbed = Federation(tmp_path / "one", QUICK).run()
    federation = Federation(tmp_path / "two", PATIENT)
    failing = iter(range(2))

    def fail(message, reply):
        if message.content["instruction"]["client"] == "vqa-1" and next(failing, None) is not None:
            return Message(Error(0, "MemoryError: no"), reply_to=message)
        return reply

    on_train(federation, exchange, fail)
    federation.run()
    same_state(undisturbed.strategy.state, federation.strategy.state)
    for client in ("vqa-0", "vqa-1", "counting-0"):
        states = [run.private(client) for run in (undisturbed, federation)]
        for group, tensors in states[0].groups.items():
            assert all(torch.equal(t, states[1].groups[group][n]) for n, t in tensors.items())
    repeats = federation.events("repeat")
    assert [e["round"] for e in repeats] == [exchange] * 2
    assert "3 of 4 clients delivered a usable update" in repeats[0]["reason"]
    # What was repeated is in the file, but neither in the tables nor in the verdict.
    assert sorted(trained(federation, exchange)) == sorted(trained(undisturbed, exchange))
    assert federation.folder.finish(error=None)["failures"] == []
    written = (federation.folder.path / "metrics.jsonl").read_text()
    assert written.count("MemoryError") >= 2
    assert read_events(federation.folder.path) == federation.folder.events


def test_a_roster_below_the_minimum_waits_as_long_as_it_takes(tmp_path):
    federation = Federation(tmp_path, PATIENT.replace("wait_seconds=3", "wait_seconds=0.3"))
    everyone = federation.grid.nodes

    def nodes():
        return everyone if len(federation.events("repeat")) > 1 else everyone[:3]

    federation.grid.get_node_ids = nodes
    federation.run()
    reasons = [e["reason"] for e in federation.events("repeat")]
    assert len(reasons) > 1
    assert all("3 of 4 clients can take part" in reason for reason in reasons)
    assert len(trained(federation, 1)) == len(trained(federation, 2)) == 4
    assert federation.folder.finish(error=None)["failures"] == []


def test_stop_stops(tmp_path):
    federation = Federation(tmp_path, PATIENT.replace("below_minimum=wait", "below_minimum=stop"))
    on_train(federation, 2, lambda message, reply: Message(Error(0, "boom"), reply_to=message))
    with pytest.raises(BelowMinimum, match="Exchange 2: 0 of 4 clients delivered"):
        federation.run()
    assert federation.events("repeat") == []


def test_a_silent_client_is_given_up_after_the_timeout_and_the_round_closes(tmp_path):
    federation = Federation(tmp_path, f"{QUICK} strategy.round_timeout_seconds=0.5")
    on_train(
        federation,
        1,
        lambda m, reply: None if m.content["instruction"]["client"] == "vqa-0" else reply,
    )
    federation.run()
    (failure,) = federation.events("failure")
    assert (failure["client"], failure["round"]) == ("vqa-0", 1)
    assert failure["reason"] == "No reply within 0.5 s."
    stages = {e["client"]: e["stage"] for e in federation.events("train", round=2)}
    assert stages == {"vqa-0": 2, "vqa-1": 2, "counting-0": 2, "counting-1": 2}


def test_a_client_that_comes_back_under_a_new_node_id_goes_on(tmp_path):
    partitions = [{"partition-id": i % 4, "num-partitions": 4} for i in range(5)]
    federation = Federation(tmp_path, QUICK, node_configs=partitions)
    federation.grid.nodes = [1, 2, 3, 4]

    def restart(message, reply):
        federation.grid.nodes = [2, 3, 4, 5]  # 5 is the client that 1 was
        return reply

    on_train(federation, 1, restart)
    federation.run()
    assert federation.events("failure") == []
    stages = {e["client"]: e["stage"] for e in federation.events("train", round=2)}
    assert stages == {"vqa-0": 2, "vqa-1": 2, "counting-0": 2, "counting-1": 2}


def test_a_client_that_leaves_for_good_is_missed_and_the_others_go_on(tmp_path):
    federation = Federation(tmp_path, f"{QUICK} strategy.rounds=2")

    def leave(message, reply):
        federation.grid.nodes = [2, 3, 4]
        return reply

    on_train(federation, 1, leave)
    federation.run()
    failures = federation.events("failure")
    assert {(f["round"], f["client"]) for f in failures} == {(2, "vqa-0"), (3, "vqa-0")}
    assert sorted(trained(federation, 3)) == ["counting-0", "counting-1", "vqa-1"]
    assert "vqa-0" in federation.strategy.state.loras  # kept, should it come back


def test_a_client_that_lost_its_state_folder_begins_again_with_stage_1(tmp_path):
    """It is not queried after its success, so it fails once and then says what it holds."""
    federation = Federation(tmp_path, f"{QUICK} strategy.rounds=3")

    def lose(message, reply):
        if message.content["instruction"]["client"] == "vqa-1":
            shutil.rmtree(federation.folder.path / "clients" / "vqa-1")
        return reply

    on_train(federation, 2, lose)
    federation.run()
    (failure,) = federation.events("failure")
    assert (failure["client"], failure["round"], failure["phase"]) == ("vqa-1", 3, "train")
    assert "holds no stage-1 state" in failure["reason"]
    stages = {e["client"]: e["stage"] for e in federation.events("train", round=4)}
    assert stages == {"vqa-0": 2, "vqa-1": 1, "counting-0": 2, "counting-1": 2}


def queries(federation, exchange):
    return [
        m.metadata.dst_node_id
        for m in federation.grid.messages
        if m.metadata.message_type == MessageType.QUERY
        and m.metadata.group_id == str(exchange)
        and not m.metadata.reply_to_message_id
    ]


def test_a_client_is_queried_again_only_after_a_failure(tmp_path):
    federation = Federation(tmp_path, f"{QUICK} strategy.rounds=3")
    on_train(
        federation,
        2,
        lambda m, reply: (
            Message(Error(0, "boom"), reply_to=m)
            if m.content["instruction"]["client"] == "vqa-0"
            else reply
        ),
    )
    federation.run()
    assert [len(queries(federation, number)) for number in (1, 2, 3, 4)] == [4, 0, 1, 0]
    assert len(trained(federation, 4)) == 4


def test_a_repeated_exchange_queries_all_that_took_part_again(tmp_path):
    """A late joiner's first exchange is repeated: it must train stage 1 again, not stage 2."""
    federation = Federation(tmp_path, PATIENT.replace("min_replies=4", "min_replies=3"))
    everyone, failed = federation.grid.nodes, []
    federation.grid.nodes = everyone[:3]

    def act(message, reply):
        if message.metadata.message_type != MessageType.TRAIN:
            return reply
        federation.grid.nodes = everyone
        if message.metadata.group_id == "2" and len(failed) < 2:
            if message.content["instruction"]["client"] != "counting-1":
                failed.append(message)
                return Message(Error(0, "boom"), reply_to=message)
        return reply

    federation.grid.on_reply = act
    federation.run()
    assert len(federation.events("repeat")) == 1
    joined = set(trained(federation, 2)) - set(trained(federation, 1))
    assert len(joined) == 1
    stages = {e["client"]: e["stage"] for e in federation.events("train", round=2)}
    assert stages == {c: 1 if c in joined else 2 for c in stages} and len(stages) == 4
    assert len(queries(federation, 2)) == 1 + 4
