"""Runs in which somebody fails, lies or sends garbage: the others go on."""

import math

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from inprocess import SMALL, TWO_TASKS, Federation, InProcessGrid, edit
from quick_training import quick_training

from pilot_flwr.errors import RunError
from pilot_flwr.flower.grid import PollingGrid, in_simulation
from pilot_flwr.flower.messages import OWN_ERROR


@pytest.fixture(autouse=True, scope="module")
def quickly():
    """Training itself is not what is tested here."""
    with quick_training():
        yield


def corrupt_first(change):
    """Return what replaces the first tensor of the LoRA by `change` of it."""

    def spoil(lora):
        name = next(iter(lora))
        lora[name] = change(lora[name])

    return lambda content: edit(content, "lora", spoil)


corrupt_nan = corrupt_first(lambda tensor: tensor.index_fill(0, torch.tensor([0]), math.nan))
corrupt_shape = corrupt_first(lambda tensor: tensor[:1])
corrupt_dtype = corrupt_first(lambda tensor: tensor.double())
corrupt_huge = corrupt_first(lambda tensor: torch.zeros(3_000_000))


def corrupt_inf(content):
    edit(content, "task-adapter.vqa", lambda adapter: adapter["linear_2.bias"].fill_(math.inf))


def corrupt_missing(content):
    edit(content, "lora", lambda lora: lora.pop(next(iter(lora))))


def corrupt_extra(content):
    edit(content, "lora", lambda lora: lora.update({"router.weight": torch.zeros(3)}))


def corrupt_task(content):
    content["result"]["task"] = "captioning"
    content["task-adapter.captioning"] = content["task-adapter.vqa"]


def corrupt_examples_negative(content):
    content["training"]["examples"] = -5


def corrupt_examples_fraction(content):
    content["training"]["examples"] = 2.5


def corrupt_many(content):
    more = {f"more.{number}": torch.zeros(1) for number in range(20_000)}
    edit(content, "lora", lambda lora: lora.update(more))


def corrupt_zero_examples(content):
    content["training"]["examples"] = 0


def corrupt_too_many_examples(content):
    content["training"]["examples"] = 10**9


def corrupt_round(content):
    content["result"]["round"] = 7


def corrupt_client(content):
    content["result"]["client"] = "vqa-26"


def corrupt_metrics(content):
    del content["training"]["loss.total"]


def corrupt_examples_nan(content):
    content["training"]["examples"] = float("nan")


def corrupt_gradients_nan(content):
    content["training"]["gradients.lora"] = float("nan")


def corrupt_extra_metric(content):
    content["session"]["round"] = 3
    content["session"]["started"] = float("inf")


def corrupt_zip(content):
    content["lora"]["tensors"].data = b"PK\x03\x04 and so on"


def corrupt_score(content):
    content["evaluation"] = MetricRecord({"score": 1e9, "examples": 2, "seconds": 0.1})
    content["evaluation-metric"] = ConfigRecord({"metric": "exact_match", "approximate": False})


def corrupt_metric(content):
    content["evaluation"] = MetricRecord({"score": 0.5, "examples": 2, "seconds": 0.1})
    content["evaluation-metric"] = ConfigRecord({"metric": "mine", "approximate": False})


def corrupt_no_test_examples(content):
    content["evaluation"] = MetricRecord({"score": 0.5, "examples": 0, "seconds": 0.1})
    content["evaluation-metric"] = ConfigRecord({"metric": "exact_match", "approximate": False})


def corrupt_bytes(content):
    array = content["lora"]["tensors"]
    array.data = bytes(array.data[: len(array.data) // 2])


def corrupt_result(content):
    del content["result"]


BAD_UPDATES = [
    (corrupt_nan, "its LoRA has values that are not finite"),
    (corrupt_inf, "its task adapter has values that are not finite"),
    (corrupt_shape, "the rank of its LoRA is 1 in "),
    (corrupt_dtype, "is torch float64"),
    (corrupt_missing, "(1 and 0 in all)"),
    (corrupt_extra, "unexpected ones ['router.weight']"),
    (corrupt_task, "its task is 'captioning' but the client's is 'vqa'"),
    (corrupt_zero_examples, "metric `examples` is 0 but must be from 1"),
    (corrupt_too_many_examples, "counts 1000000000 examples"),
    (corrupt_round, "it is for exchange 7, not 1"),
    (corrupt_client, "it claims to be from 'vqa-26'"),
    (corrupt_metrics, "metric `loss.total` is None"),
    (corrupt_bytes, "cannot be read"),
    (corrupt_examples_nan, "metric `examples` is nan but must be a finite number"),
    (corrupt_gradients_nan, "metric `gradients.lora` is nan"),
    (corrupt_extra_metric, "metric `started` is inf"),
    (corrupt_zip, "cannot be read"),
    (corrupt_score, "metric `score` is 1000000000.0 but must be from 0 to 1"),
    (corrupt_metric, "`metric` is 'mine' but must be one of exact_match, gqa, "),
    (corrupt_no_test_examples, "metric `examples` is 0 but must be from 1"),
    (corrupt_result, "the message has no record `result`"),
    (corrupt_examples_negative, "metric `examples` is -5 but must be from 1"),
    (corrupt_examples_fraction, "metric `examples` is 2.5 but must be a whole number"),
    (corrupt_huge, "is torch float32 (3000000,) but must be torch float32 ("),
    (corrupt_many, "(0 and 20000 in all)"),
]
"""How an update is spoiled, and the reason for which the server rejects it."""

ONE_TASK = f"{SMALL} data.tasks=[vqa] strategy.rounds=1 evaluation.enabled=false"
CLIENTS = len(BAD_UPDATES) + 2


def run_with_replies(folder, spoil):
    """Run a federation in which `spoil(number, message, reply)` replaces replies of exchange 1.

    The first clients are those of `BAD_UPDATES`, one each; the last two are honest.
    """
    federation = Federation(folder, f"{ONE_TASK} data.clients_per_task={CLIENTS}")

    def on_reply(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "1":
            number = int(message.content["instruction"]["client"].removeprefix("vqa-"))
            if number < len(BAD_UPDATES):
                return spoil(number, message, reply)
        return reply

    federation.grid.on_reply = on_reply
    return federation.run()


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A run in which every bad update comes, each from its own client."""

    def spoil(number, message, reply):
        BAD_UPDATES[number][0](reply.content)
        return reply

    return run_with_replies(tmp_path_factory.mktemp("spoiled"), spoil)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(number, reason) for number, (_, reason) in enumerate(BAD_UPDATES)],
    ids=[corrupt.__name__ for corrupt, _ in BAD_UPDATES],
)
def test_a_bad_update_is_rejected_with_its_reason(spoiled, number, reason):
    client = f"vqa-{number}"
    (failure,) = [f for f in spoiled.events("failure") if f["client"] == client]
    assert (failure["round"], failure["phase"]) == (1, "train")
    assert reason in failure["reason"]
    # Nothing of a rejected reply is in the results, not even its score.
    assert not [e for e in spoiled.events("evaluate") if e["client"] == client]


def test_bad_updates_change_nothing_for_the_others(spoiled, tmp_path):
    """The result of the run is what it would have been without those clients in exchange 1."""
    done = spoiled.events("aggregate", round=1)[0]
    honest = [f"vqa-{number}" for number in range(len(BAD_UPDATES), CLIENTS)]
    assert {task: list(clients) for task, clients in done["tasks"].items()} == {"vqa": honest}
    assert len(spoiled.events("train", round=2)) == CLIENTS
    silent = run_with_replies(
        tmp_path, lambda number, message, reply: Message(Error(0, "gone"), reply_to=message)
    )
    same_state(spoiled.strategy.state, silent.strategy.state)


def same_state(state, other):
    """Bit for bit: all task adapters and everyone's LoRA."""
    for mine, theirs in ((state.adapters, other.adapters), (state.loras, other.loras)):
        assert mine.keys() == theirs.keys()
        for name, tensors in mine.items():
            assert all(torch.equal(t, theirs[name][key]) for key, t in tensors.items())


def test_the_run_fails_when_no_usable_update_is_left(tmp_path):
    federation = Federation(tmp_path)

    def spoil(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            corrupt_nan(reply.content)
        return reply

    federation.grid.on_reply = spoil
    with pytest.raises(RunError, match="0 of 4 clients delivered a usable update.*not finite"):
        federation.run()
    assert len(federation.events("failure")) == 4


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
    assert federation.events("failure")[0]["client"] == "vqa-1"


def test_another_number_of_nodes_than_clients_stops_with_the_command_to_use(tmp_path):
    federation = Federation(tmp_path, "experiment=demo", num_nodes=2)
    with pytest.raises(RunError) as caught:
        federation.run()
    assert "2 SuperNodes but the configuration has 9 clients" in str(caught.value)
    assert 'flwr run . --federation-config "num-supernodes=9 ' in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client": "../../../../evil"}, "client '../../../../evil' with task 'vqa' is not one of"),
        ({"client": "vqa-7"}, "client 'vqa-7' with task 'vqa' is not one of vqa-0 (vqa), vqa-1"),
        ({"task": "ocr"}, "client 'vqa-0' with task 'ocr' is not one of"),
        ({"task": "counting"}, "client 'vqa-0' with task 'counting' is not one of"),
        ({"examples": 0}, "`examples` is 0 but must be at least 1"),
        ({"stage-trained": 7}, "`stage-trained` is 7 but must be 0, 1 or 2"),
        ({"examples": 1.5}, "`examples` is 1.5 but must be of type int"),
    ],
)
def test_a_node_that_says_odd_things_of_itself_is_refused(tmp_path, change, reason):
    federation = Federation(tmp_path / "run", f"{TWO_TASKS} evaluation.enabled=false")

    def lie(message, reply):
        if message.metadata.message_type == MessageType.QUERY and message.metadata.dst_node_id == 1:
            reply.content["member"].update(change)
        return reply

    federation.grid.on_reply = lie
    federation.run()
    failures = federation.events("failure")
    refused = [f for f in failures if f["client"] == "node 1"]
    assert len(refused) == 2  # once an exchange
    assert reason in refused[0]["reason"]
    assert [f["client"] for f in failures if f not in refused] == ["vqa-0"] * 2  # it is missing
    assert {e["client"] for e in federation.events("train", round=2)} == {
        "vqa-1",
        "counting-0",
        "counting-1",
    }
    assert not list(tmp_path.glob("**/*evil*"))


def test_a_client_that_never_comes_is_a_failure_of_the_run(tmp_path):
    federation = Federation(tmp_path, f"{TWO_TASKS} strategy.wait_seconds=0.3")
    federation.grid.nodes = federation.grid.nodes[:3]
    federation.run()
    failures = federation.folder.finish(error=None)["failures"]
    assert {(f["round"], f["client"]) for f in failures} == {(1, "counting-1"), (2, "counting-1")}


def test_a_client_cannot_stop_the_run_by_quoting_ray(tmp_path):
    federation = Federation(tmp_path, f"{TWO_TASKS} evaluation.enabled=false")
    text = "<class 'ray.exceptions.ActorDiedError'>:<'so I say'>"

    def quote(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == 2:
            return Message(Error(OWN_ERROR, text), reply_to=message)
        return reply

    federation.grid.on_reply = quote
    federation.run()
    assert {f["client"] for f in federation.events("failure")} == {"vqa-1"}


@pytest.mark.parametrize("phase", [MessageType.QUERY, MessageType.TRAIN])
def test_a_site_cannot_stop_the_run_by_quoting_ray_with_flowers_own_error_code(tmp_path, phase):
    """A site chooses code and text of its errors: there is no Ray at one, whatever it says."""
    names = [f"{task}-{number}" for task in ("vqa", "counting") for number in (0, 1)]
    sites = [{"client-id": n, "state-folder": str(tmp_path / n)} for n in names]
    overrides = f"{TWO_TASKS} evaluation.enabled=false strategy.wait_seconds=0.2"
    federation = Federation(tmp_path / "run", overrides, node_configs=sites)
    text = "<class 'ray.exceptions.ActorDiedError'>:<'so I say'>"

    def quote(message, reply):
        if message.metadata.message_type == phase and message.metadata.dst_node_id == 2:
            return Message(Error(0, text), reply_to=message)
        return reply

    federation.grid.on_reply = quote
    federation.run()
    failures = federation.events("failure")
    assert {f["client"] for f in failures} <= {"vqa-1", "node 2"}
    assert "so I say" in {f["reason"] for f in failures}
    honest = {"vqa-0", "counting-0", "counting-1"}
    assert {e["client"] for e in federation.events("train", round=2)} == honest


def test_only_an_engine_makes_a_simulation():
    engine = {"partition-id": 0, "num-partitions": 1}
    assert in_simulation(InProcessGrid(None, num_nodes=1, overrides="", node_configs=[engine]))
    site = {"client-id": "vqa-0"}
    assert not in_simulation(InProcessGrid(None, num_nodes=1, overrides="", node_configs=[site]))
    assert in_simulation(InMemoryGrid.__new__(InMemoryGrid))
    assert not in_simulation(HttpGrid.__new__(HttpGrid))
    assert not in_simulation(PollingGrid(InMemoryGrid.__new__(InMemoryGrid)))


def test_a_wrong_node_does_not_stand_for_a_site_that_is_still_to_come(tmp_path):
    """Sites of the configured names: the wrong one was first, the third a moment later."""
    names = ["vqa-0", "vqa-1", "vqa-2", "vqa-3"]  # the last one is none of the run's
    sites = [{"client-id": n, "state-folder": str(tmp_path / n)} for n in names]
    overrides = f"{SMALL} data.tasks=[vqa] data.clients_per_task=3 strategy.rounds=1"
    overrides += " evaluation.enabled=false strategy.wait_seconds=20"
    federation = Federation(tmp_path / "run", overrides, num_nodes=4, node_configs=sites)
    appearing = iter([[1, 2, 4]] * 2)
    federation.grid.get_node_ids = lambda: next(appearing, [1, 2, 3, 4])
    federation.run()
    trained = {e["client"] for e in federation.events("train", round=1)}
    assert trained == {"vqa-0", "vqa-1", "vqa-2"}
    assert {e["client"] for e in federation.events("failure")} == {"node 4"}


def test_two_nodes_with_one_client_id_are_refused(tmp_path):
    sites = [{"client-id": "vqa-0", "state-folder": str(tmp_path / "s")}] * 2
    overrides = f"{TWO_TASKS} strategy.wait_seconds=0.2"
    federation = Federation(tmp_path / "run", overrides, num_nodes=2, node_configs=sites)
    with pytest.raises(RunError, match="are both client 'vqa-0'"):
        federation.run()


def test_a_site_without_a_state_folder_is_told_so(tmp_path):
    overrides = f"{SMALL} data.tasks=[vqa] data.clients_per_task=1 strategy.wait_seconds=0.2"
    federation = Federation(tmp_path, overrides, node_configs=[{"client-id": "vqa-0"}])
    with pytest.raises(RunError, match="`state-folder` is missing in the node config"):
        federation.run()
