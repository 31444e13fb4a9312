"""Whole runs in this process: every message goes through Flower's types, no Ray."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Error, Message, MessageType
from inprocess import SMALL, TWO_TASKS, Federation
from quick_training import quick_training

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.client.private_state import PrivateStore
from pilot_flwr.config.loading import config_folder
from pilot_flwr.flower.codec import decode_state
from pilot_flwr.flower.messages import decode_update
from pilot_flwr.metrics import METRICS
from pilot_flwr.run.atomic import load_tensors
from pilot_flwr.run.tables import summary

LONGER = f"{TWO_TASKS} data.train_examples=8"
"""Until every private tensor has moved."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of two exchanges, two tasks × two clients, and their stage-1 states."""
    federation = Federation(tmp_path_factory.mktemp("run"), LONGER)
    federation.after_stage1 = {}

    def look(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "1":
            client = message.content["instruction"]["client"]
            federation.after_stage1[client] = federation.private(client)
        return reply

    federation.grid.on_reply = look
    return federation.run()


@pytest.fixture
def quick():
    """Replace training, which is not what is tested, by random steps."""
    with quick_training():
        yield


def test_stages_follow_the_time_line(finished):
    assert [e["stage"] for e in finished.events("train", round=1)] == [1] * 4
    assert [e["stage"] for e in finished.events("train", round=2)] == [2] * 4
    assert finished.events("failure") == []


def test_gradients_were_exactly_where_the_stage_trains(finished):
    for event in finished.events("train"):
        trained = {group for group, count in event["gradients"].items() if count}
        expected = {g for g, row in GROUPS.items() if event["stage"] in row.stages}
        assert trained == expected


def test_evaluations_run_from_zero_shot_to_the_last_exchange(finished):
    clients = {"vqa-0", "vqa-1", "counting-0", "counting-1"}
    for number in (0, 1, 2):
        assert {e["client"] for e in finished.events("evaluate", round=number)} == clients


def test_what_goes_down_is_the_last_aggregate_and_comes_up_own_task_only(finished):
    for event in finished.events("train"):
        (order,) = finished.events("order", round=event["round"], client=event["client"])
        adapters_down = order["down"]["task_adapters"] / event["up"]["task_adapters"]
        assert adapters_down == (1 if event["stage"] == 1 else 2)
        assert order["down"]["lora"] == event["up"]["lora"] > 0
        assert event["bytes_up"] == sum(event["up"].values())
        assert event["bytes_down"] == sum(order["down"].values())
    for reply in finished.replies(MessageType.TRAIN):
        assert len([n for n in reply.content.array_records if n != "lora"]) == 1


def test_measured_bytes_are_the_parameters_plus_a_header(finished):
    event = finished.events("train", round=2)[0]
    trained = sum(event["gradients"][g] for g in ("lora", "own_task_adapter"))
    assert 4 * trained < event["bytes_up"] < 4 * trained + 200 * 128


def test_the_server_aggregates_as_the_design_says(finished):
    """Recompute the last exchange from the replies alone."""
    updates = [decode_update(m.content) for m in finished.replies(MessageType.TRAIN)][-4:]
    updates.sort(key=lambda update: update.client)
    for task in ("vqa", "counting"):
        mine = [u for u in updates if u.task == task]
        total = sum(u.num_examples for u in mine)
        for name, tensor in finished.strategy.state.adapters[task].items():
            expected = sum(u.num_examples / total * u.adapter[name].double() for u in mine)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    vectors = np.array(
        [np.concatenate([t.double().numpy().ravel() for t in u.lora.values()]) for u in updates]
    )
    for k, update in enumerate(updates):  # the design's equations, literally
        d = [float(np.sqrt(((vectors[k] - v) ** 2).sum())) for v in vectors]
        nearest = sorted((j for j in range(len(updates)) if j != k), key=lambda j: d[j])[:2]
        w = {j: (1 / d[j]) / sum(1 / d[m] for m in nearest) for j in nearest}
        total = update.num_examples + sum(updates[j].num_examples * w[j] for j in nearest)
        mixed = update.num_examples * vectors[k]
        mixed = mixed + sum(updates[j].num_examples * w[j] * vectors[j] for j in nearest)
        state = finished.strategy.state.loras[update.client]
        got = np.concatenate([state[name].double().numpy().ravel() for name in update.lora])
        np.testing.assert_allclose(got, mixed / total, rtol=1e-5, atol=1e-6)


def test_no_private_tensor_is_in_any_message(finished):
    """Neither by name, nor by value, nor by shape of the router."""
    private = {
        (client, group, name): tensor.numpy()
        for client in ("vqa-0", "vqa-1", "counting-0", "counting-1")
        for group, named in finished.private(client).groups.items()
        for name, tensor in named.items()
    }
    assert {group for _, group, _ in private} == {"client_adapter", "cross_task_adapters", "router"}
    num_arrays = 0
    for message in finished.grid.messages:
        if message.has_error():
            continue
        for record_name, record in message.content.array_records.items():
            assert record_name == "lora" or record_name.startswith("task-adapter.")
            for name, tensor in decode_state(record).items():
                num_arrays += 1
                value = tensor.numpy()
                assert not any(word in name for word in ("client_adapter", "cross", "router"))
                for key, secret in private.items():
                    if secret.shape == value.shape:
                        assert not np.array_equal(secret, value), (key, name)
    assert num_arrays > 1000


def test_moments_stay_at_the_client(tmp_path):
    """With a schedule over the whole run: neither by name nor by value in any message."""
    run = Federation(tmp_path, f"{TWO_TASKS} train.schedule=run evaluation.enabled=false").run()
    moments = run.private("vqa-0").moments
    assert {key.split("/")[0] for key in moments} >= {"lora", "own_task_adapter", "router"}
    # Two equal exchanges; ψ_c and φ were trained in the second alone.
    few, many = sorted({int(t) for key, t in moments.items() if key.endswith("/step")})
    assert many == 2 * few > 0
    secrets = [tensor.numpy() for key, tensor in moments.items() if tensor.ndim]
    for message in run.grid.messages:
        for record in message.content.array_records.values():
            for name, tensor in decode_state(record).items():
                value = tensor.numpy()
                assert "exp_avg" not in name
                assert not any(
                    np.array_equal(value, s) for s in secrets if s.shape == value.shape and s.any()
                )


def test_examples_do_not_travel(finished):
    """Strings and bytes in messages are the few that the wire format names."""
    words = set()
    for message in finished.grid.messages:
        for record in message.content.config_records.values():
            for value in record.values():
                words.update(value if isinstance(value, list) else [value])
    words = {w for w in words if isinstance(w, (str, bytes))} - {
        str(finished.folder.path),
        finished.folder.token,
    }
    tasks, clients = {"vqa", "counting"}, {"vqa-0", "vqa-1", "counting-0", "counting-1"}
    hashes = set(finished.strategy.roster.identity.values())
    queries = [m.content["query"] for m in finished.grid.messages if "query" in m.content]
    words -= {query["nonce"] for query in queries}
    assert words == tasks | clients | hashes | {"test-1", "exact_match"}


def test_private_state_is_kept_and_frozen_parts_stay_bit_identical(finished):
    assert len(finished.after_stage1) == 4
    for client, after_stage1 in finished.after_stage1.items():
        after_stage2 = finished.private(client)
        assert (after_stage1.stage, after_stage2.stage) == (1, 2)
        for name, tensor in after_stage1.groups["client_adapter"].items():
            assert torch.equal(tensor, after_stage2.groups["client_adapter"][name])  # ψ_s frozen
        assert after_stage2.groups["router"]["weight"].shape[0] == 2


def test_checkpoint_holds_the_aggregates(finished):
    folder = finished.folder.checkpoints / "round-0002"
    assert json.loads((folder / "state.json").read_text())["round"] == 2
    for task, state in finished.strategy.state.adapters.items():
        tensors, _ = load_tensors(folder / "task_adapters" / f"{task}.safetensors")
        assert all(torch.equal(t, state[n]) for n, t in tensors.items())
    assert len(list((folder / "lora").glob("*.safetensors"))) == 4


def test_two_runs_with_one_seed_are_bit_identical(finished, tmp_path):
    again = Federation(tmp_path, LONGER).run()
    for client, state in finished.strategy.state.loras.items():
        assert all(torch.equal(t, again.strategy.state.loras[client][n]) for n, t in state.items())


def test_a_late_joiner_gets_stage_1_and_its_tasks_mean_lora(quick, tmp_path):
    """The others are in stage 2 meanwhile; its task's only client so far is counting-0."""
    federation = Federation(
        tmp_path, f"{TWO_TASKS} strategy.rounds=2 strategy.wait_seconds=0.5 data.test_examples=1"
    )
    all_nodes = federation.grid.nodes
    federation.grid.nodes = all_nodes[:3]  # counting-1 is not there yet
    received = {}

    def join(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            federation.grid.nodes = all_nodes
            instruction = message.content["instruction"]
            if instruction["round"] == 2:
                received[instruction["client"]] = decode_state(message.content["lora"])
        return reply

    federation.grid.on_reply = join
    federation.run()
    stages = {(e["client"], e["round"]): e["stage"] for e in federation.events("train")}
    assert ("counting-1", 1) not in stages
    assert stages["counting-1", 2] == 1
    assert stages["counting-0", 2] == 2
    assert stages["counting-1", 3] == 2
    for name, tensor in received["counting-1"].items():
        torch.testing.assert_close(tensor, received["counting-0"][name])
    assert any(not torch.equal(t, received["vqa-0"][n]) for n, t in received["counting-1"].items())


def test_a_client_that_misses_a_round_keeps_its_lora_and_its_tasks_adapter(quick, tmp_path):
    federation = Federation(tmp_path, f"{SMALL} data.tasks=[vqa,counting] "
                            "data.clients_per_task=1 strategy.rounds=1")  # fmt: skip
    down = {}

    def drop(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            order = message.content["instruction"]
            if order["client"] == "counting-0" and order["round"] == 2:
                down["lora"] = decode_state(message.content["lora"])
                down["adapter"] = decode_state(message.content["task-adapter.counting"])
                return Message(
                    Error(0, 'Traceback:\n  File "x.py", line 1\nValueError: boom'),
                    reply_to=message,
                )
        return reply

    federation.grid.on_reply = drop
    federation.run()
    state = federation.strategy.state
    assert all(torch.equal(t, state.loras["counting-0"][n]) for n, t in down["lora"].items())
    assert all(torch.equal(t, state.adapters["counting"][n]) for n, t in down["adapter"].items())
    failure = federation.events("failure")
    assert [(f["round"], f["client"], f["reason"]) for f in failure] == [
        (2, "counting-0", "ValueError: boom")
    ]
    assert federation.folder.finish(error=None)["failures"]


def test_all_bytes_that_went_down_are_written_down(finished):
    """Orders of both exchanges and of the closing evaluation, against the messages themselves."""
    sent = [
        m.content
        for m in finished.grid.messages
        if not m.metadata.reply_to_message_id and m.metadata.message_type != MessageType.QUERY
    ]
    bytes_sent = sum(
        len(array.data) for c in sent for r in c.array_records.values() for array in r.values()
    )
    assert sum(sum(e["down"].values()) for e in finished.events("order")) == bytes_sent


def test_real_sites_keep_their_state_in_their_own_folder(quick, tmp_path):
    sites = [
        {"client-id": client, "state-folder": str(tmp_path / client)}
        for client in ("vqa-0", "vqa-1", "counting-0", "counting-1")
    ]
    words = f"{TWO_TASKS} evaluation.enabled=false"
    federation = Federation(tmp_path / "run", words, node_configs=sites).run()
    assert federation.events("failure") == []
    assert not (federation.folder.path / "clients").exists()
    for client in ("vqa-0", "counting-1"):
        assert PrivateStore(tmp_path / client / "test-1", client, client[:-2]).stage() == 2


def test_bfloat16_travels_as_bfloat16(tmp_path):
    federation = Federation(
        tmp_path, f"{SMALL} data.tasks=[vqa] data.clients_per_task=2 strategy.rounds=1 "
        "model.adapter_dtype=bfloat16 evaluation.enabled=false data.train_examples=4"
    ).run()  # fmt: skip
    assert federation.events("failure") == []
    for message in federation.replies(MessageType.TRAIN):
        for record in message.content.array_records.values():
            assert {t.dtype for t in decode_state(record).values()} == {torch.bfloat16}
        update = decode_update(message.content)
        assert {t.dtype for t in update.lora.values()} == {torch.bfloat16}
    event = federation.events("train", round=2)[0]
    trained = sum(event["gradients"][g] for g in ("lora", "own_task_adapter"))
    assert 2 * trained < event["bytes_up"] < 2 * trained + 200 * 128


def test_the_official_choices_run(tmp_path):
    """All of `experiment=paper-official` on the small model: both stages, step by step finite."""
    official = yaml.safe_load((config_folder() / "experiment/paper-official.yaml").read_text())
    words = []
    for section in ("model", "train"):
        for key, value in official[section].items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            words += [f"{section}.{key}{'.' * bool(k)}{k}={v}" for k, v in inner]
    assert len(words) == 11
    federation = Federation(
        tmp_path, f"{TWO_TASKS} train.accumulation_steps=2 {' '.join(words)}"
    ).run()
    assert federation.events("failure") == []
    events = federation.events("train")
    assert len(events) == 8
    names = ("loss", "loss_ce", "loss_difference", "loss_balance", "loss_z")
    assert all(math.isfinite(event[name]) for event in events for name in names)


def test_the_papers_variants_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    federation = Federation(
        tmp_path,
        f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=1 strategy.rounds=1 "
        "data.train_examples=4 evaluation.enabled=false "
        "model.initialisation=official model.stage2_client_adapter=off "
        "train.difference_loss.reduction=official model.feature_cache.where=disk",
    ).run()
    assert federation.events("failure") == []
    assert list((tmp_path / "cache/pilot-flwr/features").glob("*.safetensors"))


def test_zero_shot_is_the_base_model_whatever_the_initialisation(quick, finished, tmp_path):
    official = Federation(tmp_path, f"{TWO_TASKS} model.initialisation=official").run()
    scores = [
        {e["client"]: e["score"] for e in run.events("evaluate", round=0)}
        for run in (finished, official)
    ]
    assert scores[0] == scores[1]


def test_one_task_alone(quick, tmp_path):
    federation = Federation(
        tmp_path,
        f"{SMALL} data.tasks=[vqa] data.clients_per_task=2 strategy.rounds=1 "
        "evaluation.enabled=false",
    ).run()
    assert [e["stage"] for e in federation.events("train", round=2)] == [2, 2]
    updates = [decode_update(m.content) for m in federation.replies(MessageType.TRAIN)][-2:]
    total = sum(u.num_examples for u in updates)
    for name, tensor in federation.strategy.state.adapters["vqa"].items():
        expected = sum(u.num_examples / total * u.adapter[name].double() for u in updates)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_an_approximate_figure_is_called_so_from_client_to_table(quick, tmp_path, monkeypatch):
    approximate = replace(METRICS["exact_match"], approximate=lambda: "there is no Java")
    monkeypatch.setitem(METRICS, "exact_match", approximate)
    run = Federation(
        tmp_path, f"{TWO_TASKS} data.clients_per_task=1 evaluation.max_new_tokens=1"
    ).run()
    events = run.events("evaluate")
    assert events
    assert all(event["approximate"] for event in events)
    assert "exact_match (approximate)" in (run.folder.path / "summary.md").read_text()
    cut = sum(event["cut"] for event in events if event["round"] == 2)
    assert (
        f"{cut} answers of the last evaluation were cut off at `evaluation.max_new_tokens`"
        in summary(run.folder.events)
    )
