"""Whole runs in this process: every message goes through Flower's types, no Ray."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Array, Error, Message, MessageType
from inprocess import InProcessGrid

from pilot_flwr.aggregation import adaptive_weights, pairwise_distances, weighted_average
from pilot_flwr.checkpoint import PrivateStore, load_tensors
from pilot_flwr.client_app import app
from pilot_flwr.config import load_config
from pilot_flwr.errors import RunError
from pilot_flwr.parameters import GROUPS
from pilot_flwr.run_folder import RunFolder
from pilot_flwr.server_app import federate
from pilot_flwr.wire import decode_state, decode_update

# Two steps at least: the first layer of an adapter that ends in zero moves at the second.
SMALL = (
    "data.train_examples=8 data.test_examples=2 train.epochs=1 train.batch_size=2 "
    "evaluation.max_new_tokens=2"
)
TWO_TASKS = f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=2 strategy.rounds=1"


class Federation:
    """A run of the demo's app over an in-process grid, and what it left behind."""

    def __init__(self, folder, overrides=TWO_TASKS, **grid_options):
        self.config = load_config(overrides)
        self.grid = InProcessGrid(
            app,
            num_nodes=grid_options.pop("num_nodes", self.config.num_clients),
            overrides=overrides,
            **grid_options,
        )
        self.folder = RunFolder(folder)

    def run(self):
        self.strategy = federate(self.grid, self.config, self.folder, run_name="test-1")
        return self

    def events(self, kind, **match):
        return [e for e in self.folder.select(kind) if all(e[k] == v for k, v in match.items())]

    def replies(self, message_type):
        """Successful replies of one type, in order."""
        return [
            m
            for m in self.grid.messages
            if m.metadata.reply_to_message_id
            and m.metadata.message_type == message_type
            and not m.has_error()
        ]

    def private(self, client):
        return PrivateStore(self.folder.path / "clients" / client).load()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run: two tasks × two clients, two exchanges."""
    return Federation(tmp_path_factory.mktemp("run")).run()


def test_stages_follow_the_time_line(finished):
    assert [e["stage"] for e in finished.events("train", round=1)] == [1] * 4
    assert [e["stage"] for e in finished.events("train", round=2)] == [2] * 4
    assert finished.folder.select("failure") == []


def test_gradients_were_exactly_where_the_stage_trains(finished):
    for event in finished.folder.select("train"):
        trained = {group for group, count in event["gradients"].items() if count}
        expected = {g for g, row in GROUPS.items() if event["stage"] in row.stages}
        assert trained == expected


def test_evaluations_run_from_zero_shot_to_the_last_exchange(finished):
    clients = {"vqa-0", "vqa-1", "counting-0", "counting-1"}
    for number in (0, 1, 2):
        assert {e["client"] for e in finished.events("evaluate", round=number)} == clients


def test_what_goes_down_is_the_last_aggregate_and_comes_up_own_task_only(finished):
    for event in finished.folder.select("train"):
        adapters_down = event["down"]["task_adapters"] / event["up"]["task_adapters"]
        assert adapters_down == (1 if event["stage"] == 1 else 2)
        assert event["down"]["lora"] == event["up"]["lora"] > 0
        assert event["bytes_up"] == sum(event["up"].values())
    for reply in finished.replies(MessageType.TRAIN):
        assert len([n for n in reply.content.array_records if n != "lora"]) == 1


def test_measured_bytes_are_the_parameters_plus_numpy_headers(finished):
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
    distances = pairwise_distances([u.lora for u in updates])
    weights = adaptive_weights(distances, [u.num_examples for u in updates], 2)
    for k, update in enumerate(updates):
        for name, tensor in finished.strategy.state.loras[update.client].items():
            expected = sum(
                w * u.lora[name].double() for w, u in zip(weights[k], updates, strict=True)
            )
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


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
            for name, array in record.items():
                num_arrays += 1
                value = array.numpy()
                assert not any(word in name for word in ("client_adapter", "cross", "router"))
                for key, secret in private.items():
                    if secret.shape == value.shape:
                        assert not np.array_equal(secret, value), (key, name)
    assert num_arrays > 1000


def test_examples_do_not_travel(finished):
    """Strings and bytes in messages are the few that the wire format names."""
    words = set()
    for message in finished.grid.messages:
        for record in message.content.config_records.values():
            for value in record.values():
                words.update(value if isinstance(value, list) else [value])
    words = {w for w in words if isinstance(w, (str, bytes))} - {str(finished.folder.path)}
    tasks, clients = {"vqa", "counting"}, {"vqa-0", "vqa-1", "counting-0", "counting-1"}
    assert words == tasks | clients | {"test-1", "exact_match"}


def test_private_state_is_kept_and_frozen_parts_stay_bit_identical(tmp_path):
    federation = Federation(tmp_path)
    kept = {}

    def look(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "1":
            client = message.content["order"]["client"]
            kept[client] = federation.private(client)
        return reply

    federation.grid.on_reply = look
    federation.run()
    for client, after_stage1 in kept.items():
        after_stage2 = federation.private(client)
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
    again = Federation(tmp_path).run()
    for client, state in finished.strategy.state.loras.items():
        assert all(torch.equal(t, again.strategy.state.loras[client][n]) for n, t in state.items())


def test_a_late_joiner_gets_stage_1_while_the_others_are_in_stage_2(tmp_path):
    federation = Federation(tmp_path, f"{TWO_TASKS} strategy.rounds=2 strategy.wait_seconds=0.5")
    all_nodes = federation.grid.nodes
    federation.grid.nodes = all_nodes[:3]  # counting-1 is not there yet

    def join(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            federation.grid.nodes = all_nodes
        return reply

    federation.grid.on_reply = join
    federation.run()
    stages = {(e["client"], e["round"]): e["stage"] for e in federation.folder.select("train")}
    assert ("counting-1", 1) not in stages
    assert stages["counting-1", 2] == 1
    assert stages["counting-0", 2] == 2
    assert stages["counting-1", 3] == 2


def test_a_late_joiner_begins_with_its_tasks_mean_lora(tmp_path):
    federation = Federation(tmp_path, f"{TWO_TASKS} strategy.wait_seconds=0.5")
    all_nodes = federation.grid.nodes
    federation.grid.nodes = all_nodes[:3]
    received, means = {}, {}

    def join(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            federation.grid.nodes = all_nodes
            order = message.content["order"]
            if order["round"] == 2:
                received[order["client"]] = decode_state(message.content["lora"])
                if not means:
                    loras = federation.strategy_state.loras
                    means["counting"] = loras["counting-0"]  # the task's only client so far
        return reply

    federation.grid.on_reply = join
    # The strategy's state is needed while it runs, so it is built by hand here.
    from pilot_flwr import server_app

    original = server_app.ServerState

    def capture(*args, **kwargs):
        federation.strategy_state = original(*args, **kwargs)
        return federation.strategy_state

    server_app.ServerState = capture
    try:
        federation.run()
    finally:
        server_app.ServerState = original
    for name, tensor in received["counting-1"].items():
        torch.testing.assert_close(tensor, means["counting"][name])


def test_a_client_that_lost_its_state_gets_stage_1_again(tmp_path):
    federation = Federation(tmp_path)

    def lose(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            path = federation.folder.path / "clients/vqa-1/private.safetensors"
            path.unlink(missing_ok=True)
        return reply

    federation.grid.on_reply = lose
    federation.run()
    stages = {e["client"]: e["stage"] for e in federation.events("train", round=2)}
    assert stages == {"vqa-0": 2, "vqa-1": 1, "counting-0": 2, "counting-1": 2}


def test_a_client_that_misses_a_round_keeps_its_lora_and_its_tasks_adapter(tmp_path):
    federation = Federation(tmp_path, f"{SMALL} data.tasks=[vqa,counting] "
                            "data.clients_per_task=1 strategy.rounds=1")  # fmt: skip
    down = {}

    def drop(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            order = message.content["order"]
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
    failure = federation.folder.select("failure")
    assert [(f["round"], f["client"], f["reason"]) for f in failure] == [
        (2, "counting-0", "ValueError: boom")
    ]
    assert federation.folder.finish(error=None)["failures"]


def corrupt_nan(content):
    array = content["lora"]
    name = next(iter(array))
    value = array[name].numpy().copy()
    value.flat[0] = np.nan
    array[name] = Array(value)


def corrupt_inf(content):
    array = content["task-adapter.vqa"]
    array["linear_2.bias"] = Array(np.full_like(array["linear_2.bias"].numpy(), np.inf))


def corrupt_shape(content):
    array = content["lora"]
    name = next(iter(array))
    array[name] = Array(array[name].numpy()[:1])


def corrupt_dtype(content):
    array = content["lora"]
    name = next(iter(array))
    array[name] = Array(array[name].numpy().astype(np.float64))


def corrupt_missing(content):
    del content["lora"][next(iter(content["lora"]))]


def corrupt_extra(content):
    content["lora"]["router.weight"] = Array(np.zeros(3, np.float32))


def corrupt_task(content):
    content["result"]["task"] = "captioning"
    content["task-adapter.captioning"] = content["task-adapter.vqa"]


def corrupt_zero_examples(content):
    content["training"]["examples"] = 0


def corrupt_too_many_examples(content):
    content["training"]["examples"] = 10**9


def corrupt_round(content):
    content["result"]["round"] = 7


def corrupt_client(content):
    content["result"]["client"] = "counting-0"


def corrupt_metrics(content):
    del content["training"]["loss.total"]


def corrupt_bytes(content):
    array = content["lora"]
    name = next(iter(array))
    old = array[name]
    array[name] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=old.data[:50])


def corrupt_result(content):
    del content["result"]


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (corrupt_nan, "its LoRA has values that are not finite"),
        (corrupt_inf, "its task adapter has values that are not finite"),
        (corrupt_shape, "of its LoRA is float32 (1, "),
        (corrupt_dtype, "of its LoRA is float64"),
        (corrupt_missing, "(1 and 0 in all)"),
        (corrupt_extra, "unexpected ones ['router.weight']"),
        (corrupt_task, "its task is 'captioning' but the client's is 'vqa'"),
        (corrupt_zero_examples, "counts 0 examples but must count 1 to"),
        (corrupt_too_many_examples, "counts 1000000000 examples"),
        (corrupt_round, "it is for round 7, not 1"),
        (corrupt_client, "it says that it is from 'counting-0'"),
        (corrupt_metrics, "metric `loss.total` is None"),
        (corrupt_bytes, "cannot be read"),
        (corrupt_result, "the message has no record `result`"),
    ],
)
def test_a_bad_update_is_rejected_and_the_others_go_on(finished, tmp_path, corrupt, reason):
    federation = Federation(tmp_path, f"{TWO_TASKS} evaluation.enabled=false")

    def spoil(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "1":
            if message.content["order"]["client"] == "vqa-0":
                corrupt(reply.content)
        return reply

    federation.grid.on_reply = spoil
    federation.run()
    failures = federation.folder.select("failure")
    assert [(f["round"], f["phase"], f["client"]) for f in failures] == [(1, "train", "vqa-0")]
    assert reason in failures[0]["reason"]
    # The others' result of the exchange is what it would have been without that client.
    done = federation.events("aggregate", round=1)[0]
    assert done["tasks"] == {"vqa": ["vqa-1"], "counting": ["counting-0", "counting-1"]}


def test_a_rejected_client_does_not_touch_the_others(tmp_path):
    results = []
    for name, spoil in (("nan", corrupt_nan), ("silent", None)):
        federation = Federation(tmp_path / name, f"{TWO_TASKS} evaluation.enabled=false")

        def change(message, reply, spoil=spoil):
            if message.metadata.message_type == MessageType.TRAIN:
                if message.content["order"]["client"] == "vqa-0":
                    if spoil is None:
                        return Message(Error(0, "gone"), reply_to=message)
                    spoil(reply.content)
            return reply

        federation.grid.on_reply = change
        results.append(federation.run().strategy.state)
    assert results[0].loras.keys() == results[1].loras.keys()
    for client, state in results[0].loras.items():
        assert all(torch.equal(t, results[1].loras[client][n]) for n, t in state.items())


def test_the_run_fails_when_no_usable_update_is_left(tmp_path):
    federation = Federation(tmp_path)

    def spoil(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            corrupt_nan(reply.content)
        return reply

    federation.grid.on_reply = spoil
    with pytest.raises(RunError, match="0 of 4 clients delivered a usable update.*not finite"):
        federation.run()
    assert len(federation.folder.select("failure")) == 4


def test_fewer_replies_than_asked_for_fail_the_run(tmp_path):
    federation = Federation(tmp_path, f"{TWO_TASKS} strategy.min_replies=4")

    def drop(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == 1:
            return Message(Error(0, "ValueError: boom"), reply_to=message)
        return reply

    federation.grid.on_reply = drop
    with pytest.raises(RunError, match="3 of 4 clients .*`strategy.min_replies` is 4.*boom"):
        federation.run()


def test_a_dead_ray_worker_stops_the_run_at_once(tmp_path):
    federation = Federation(tmp_path)

    def die(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == 2:
            text = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly.'>"
            return Message(Error(0, text), reply_to=message)
        return reply

    federation.grid.on_reply = die
    with pytest.raises(RunError, match="A Ray worker process died.*The actor died unexpectedly"):
        federation.run()
    assert federation.folder.select("failure")[0]["client"] == "vqa-1"


def test_another_number_of_nodes_than_clients_stops_with_the_command_to_use(tmp_path):
    federation = Federation(tmp_path, "experiment=demo", num_nodes=2)
    with pytest.raises(RunError) as caught:
        federation.run()
    assert "2 SuperNodes but the configuration has 9 clients" in str(caught.value)
    assert 'flwr run . --federation-config "num-supernodes=9 ' in str(caught.value)


def test_two_nodes_with_one_client_id_are_refused(tmp_path):
    sites = [{"client-id": "vqa-0", "state-folder": str(tmp_path / "s")}] * 2
    federation = Federation(tmp_path / "run", num_nodes=2, node_configs=sites)
    with pytest.raises(RunError, match="are both client 'vqa-0'"):
        federation.run()


def test_real_sites_keep_their_state_in_their_own_folder(tmp_path):
    sites = [
        {"client-id": client, "state-folder": str(tmp_path / client)}
        for client in ("vqa-0", "vqa-1", "counting-0", "counting-1")
    ]
    federation = Federation(tmp_path / "run", node_configs=sites).run()
    assert federation.folder.select("failure") == []
    assert not (federation.folder.path / "clients").exists()
    for client in ("vqa-0", "counting-1"):
        assert PrivateStore(tmp_path / client / "test-1").stage() == 2


def test_a_site_without_a_state_folder_is_told_so(tmp_path):
    overrides = f"{SMALL} data.tasks=[vqa] data.clients_per_task=1"
    federation = Federation(tmp_path, overrides, node_configs=[{"client-id": "vqa-0"}])
    with pytest.raises(RunError, match="`state-folder` is missing in the node config"):
        federation.run()


def test_bfloat16_travels_as_bfloat16(tmp_path):
    federation = Federation(
        tmp_path, f"{SMALL} data.tasks=[vqa] data.clients_per_task=2 strategy.rounds=1 "
        "model.adapter_dtype=bfloat16"
    ).run()  # fmt: skip
    assert federation.folder.select("failure") == []
    for message in federation.replies(MessageType.TRAIN):
        for record in message.content.array_records.values():
            for array in record.values():
                assert array.dtype == "int16"
        update = decode_update(message.content)
        assert {t.dtype for t in update.lora.values()} == {torch.bfloat16}
    event = federation.events("train", round=2)[0]
    trained = sum(event["gradients"][g] for g in ("lora", "own_task_adapter"))
    assert 2 * trained < event["bytes_up"] < 2 * trained + 200 * 128


def test_the_papers_variants_run(tmp_path):
    federation = Federation(
        tmp_path,
        f"{TWO_TASKS} model.initialisation=official model.stage2_client_adapter=off "
        "train.difference_loss.reduction=official model.feature_cache.where=disk",
    ).run()
    assert federation.folder.select("failure") == []
    assert list((federation.folder.path / "clients/vqa-0/features").glob("*.safetensors"))


def test_zero_shot_is_the_base_model_whatever_the_initialisation(finished, tmp_path):
    official = Federation(tmp_path, f"{TWO_TASKS} model.initialisation=official").run()
    scores = [
        {e["client"]: e["score"] for e in run.events("evaluate", round=0)}
        for run in (finished, official)
    ]
    assert scores[0] == scores[1]


def test_one_task_alone(tmp_path):
    federation = Federation(
        tmp_path, f"{SMALL} data.tasks=[vqa] data.clients_per_task=2 strategy.rounds=1"
    ).run()
    assert [e["stage"] for e in federation.events("train", round=2)] == [2, 2]
    expected = weighted_average(
        [u.adapter for u in map(lambda m: decode_update(m.content), federation.replies("train"))][
            -2:
        ],
        [e["examples"] for e in federation.events("train", round=2)],
    )
    for name, tensor in federation.strategy.state.adapters["vqa"].items():
        torch.testing.assert_close(tensor, expected[name])
