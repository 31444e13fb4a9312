"""Real sites of any names, in this process: who may take part, and who is told why not."""

import logging
import re
import shlex

import pytest
import torch
from flwr.app import MessageType
from inprocess import Federation
from llava_files import write_federation
from quick_training import quick_training

from pilot_flwr import server_app
from pilot_flwr.cli.main import main
from pilot_flwr.config.loading import load_config, to_yaml
from pilot_flwr.config.overrides import expand
from pilot_flwr.data.federation import count_examples
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.inference.runs import open_run
from pilot_flwr.run.checkpoint import latest_checkpoint
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import ClientFailed, Trained, select
from pilot_flwr.server import roster as roster_module

WORDS = (
    "train.epochs=1 train.batch_size=2 evaluation.enabled=false strategy.rounds=1 "
    "model.feature_cache.where=off strategy.clients=3 strategy.wait_seconds=0.2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_federation(folder, train=4, test=2, clients=1).parent


@pytest.fixture(autouse=True, scope="module")
def quickly():
    """Training itself is not what is tested here."""
    with quick_training():
        yield


@pytest.fixture
def sites(data, tmp_path):
    """Node configs of three sites with names of their own."""
    tasks = {"St_Mary": "vqa", "clinic-7": "counting", "vqa-0": "vqa"}
    return [
        {
            "client-id": client,
            "task": task,
            "state-folder": str(tmp_path / client),
            "train-file": str(data / task / "train.json"),
            "image-folder": str(data / task / "images"),
        }
        for client, task in tasks.items()
    ]


@pytest.fixture
def federation(data, tmp_path):
    """Make a federation of some sites; nothing of the run's configuration leads anywhere."""

    def make(sites, *more):
        nowhere = [f"data.files.{task}.train=[/no/where]" for task in ("vqa", "counting")]
        path = data / "federation.yaml"
        words = shlex.join(expand([f"data={path}", *shlex.split(WORDS), *nowhere, *more]))
        return Federation(tmp_path / "run", words, num_nodes=len(sites), node_configs=sites)

    return make


def trained(run, number):
    return {e["client"]: e["stage"] for e in run.events("train", round=number)}


def failures(run):
    return [(f["round"], f["client"], f["reason"]) for f in run.events("failure")]


def test_sites_of_any_names_train_through_both_stages(federation, sites, tmp_path):
    sites[1] |= {"partition-id": 5, "num-partitions": 8}  # Flower's own; they mean nothing here
    run = federation(sites).run()
    assert trained(run, 1) == dict.fromkeys(["St_Mary", "clinic-7", "vqa-0"], 1)
    assert trained(run, 2) == dict.fromkeys(["St_Mary", "clinic-7", "vqa-0"], 2)
    assert failures(run) == []
    assert set(run.strategy.state.loras) == {"St_Mary", "clinic-7", "vqa-0"}
    for client in ("St_Mary", "clinic-7"):
        assert list((tmp_path / client / "test-1").glob("private*.safetensors"))
    run.folder.write("config.yaml", to_yaml(run.config))
    opened = open_run(run.folder.path)
    assert [c.id for c in opened.clients()] == ["St_Mary", "clinic-7", "vqa-0"]
    assert opened.client("clinic-7").task == "counting"
    mine, state = opened.checkpoint.lora("St_Mary"), run.strategy.state.loras["St_Mary"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in mine.items())
    with pytest.raises(ConfigError, match="'clinic-7' is a site: its node config must name"):
        count_examples(opened.config.data, opened.client("clinic-7"), "test", seed=0)


def test_who_does_not_come_is_counted_first_and_named_later(federation, sites):
    run = federation(sites, "strategy.rounds=2")
    everyone = run.grid.nodes
    run.grid.nodes = everyone[:2]

    def come_and_go(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            number = message.content["instruction"]["round"]
            run.grid.nodes = {1: everyone, 2: everyone[1:]}.get(number, everyone)
        return reply

    run.grid.on_reply = come_and_go
    run.run()
    assert trained(run, 1) == {"St_Mary": 1, "clinic-7": 1}
    assert trained(run, 2) == {"St_Mary": 2, "clinic-7": 2, "vqa-0": 1}  # it joins late
    assert trained(run, 3) == {"clinic-7": 2, "vqa-0": 2}  # St_Mary left
    (first, second) = failures(run)
    assert first[:2] == (1, "1 client")
    assert first[2].startswith("2 of 3 clients connected within 0.2 s; others can join later")
    assert second == (3, "St_Mary", "No connected node identified itself as this client.")


def test_a_simulation_has_the_configured_clients(capsys):
    assert main(["run", "strategy.clients=2"]) == 2
    error = capsys.readouterr().err
    assert "`strategy.clients` is 2, a number of real sites" in error and "--superlink" in error


def test_more_sites_than_were_waited_for_may_join(federation, sites):
    run = federation(sites, "strategy.clients=1").run()
    assert len(trained(run, 1)) == 3 and failures(run) == []


def test_two_nodes_with_one_id_are_refused_and_the_others_train(federation, sites):
    copy = sites[0] | {"state-folder": sites[0]["state-folder"] + "-2"}
    run = federation([*sites, copy]).run()
    for number in (1, 2):
        assert set(trained(run, number)) == {"clinic-7", "vqa-0"}
    told = {who: why for number, who, why in failures(run) if number == 1}
    assert set(told) == {"node 1", "node 4", "1 client"}
    for node in ("node 1", "node 4"):
        assert told[node].startswith("Nodes 1 and 4 are both client 'St_Mary'; `client-id` must")


def test_two_of_them_alone_end_the_run_with_the_reason(federation, sites):
    copies = [sites[0], sites[0] | {"client-id": "st_mary"}]
    with pytest.raises(RunError, match="0 of 3 clients can take part.*\n.*differ only in case"):
        federation(copies).run()


def test_a_known_client_is_not_replaced_while_its_node_is_there(federation, sites):
    run = federation([*sites, sites[0]])
    everyone = run.grid.nodes
    run.grid.nodes = everyone[:3]
    orders = []

    def impostor_comes(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            orders.append((message.content["instruction"]["round"], message.metadata.dst_node_id))
            run.grid.nodes = everyone
        return reply

    run.grid.on_reply = impostor_comes
    run.run()
    assert trained(run, 2) == dict.fromkeys(["St_Mary", "clinic-7", "vqa-0"], 2)
    assert not [order for order in orders if order[1] == 4]
    ((number, who, why),) = failures(run)
    assert (number, who) == (2, "node 4")
    assert why.startswith("Client 'St_Mary' is at node 1, which is still connected")


def test_a_client_comes_back_at_another_node_with_what_it_had(federation, sites):
    run = federation([*sites, sites[0]])
    run.grid.nodes = [1, 2, 3]

    def restart(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            run.grid.nodes = [2, 3, 4]  # without authentication a SuperNode gets another id
        return reply

    run.grid.on_reply = restart
    run.run()
    assert trained(run, 2) == dict.fromkeys(["St_Mary", "clinic-7", "vqa-0"], 2)
    assert failures(run) == []


def test_a_site_that_is_mended_meanwhile_is_asked_again(federation, sites, data, monkeypatch):
    monkeypatch.setattr(roster_module, "RETRY_SECONDS", 0.5)
    late = data / "late.json"
    sites[0]["train-file"] = str(late)
    run = federation(sites, "strategy.wait_seconds=60")

    def mend(message, reply):
        late.write_text((data / "vqa" / "train.json").read_text())
        return reply

    run.grid.on_reply = mend
    run.run()
    late.unlink()
    assert len(trained(run, 1)) == 3
    assert failures(run) == [
        (
            1,
            "node 1",
            "`train-file` names '<train-file>', which is not a file or a data set's folder.",
        ),
    ]


def test_a_resumed_run_waits_for_its_sites_as_a_new_one_does(federation, sites, tmp_path):
    """The server's machine restarted: sites come back one by one, and end where they would have."""

    class Killed(BaseException):
        pass

    words = federation(sites, "strategy.wait_seconds=30").grid.overrides

    def start(place, flower_run, act=lambda message, reply: reply, appear=(3, 3)):
        grid = federation(sites).grid  # node ids from 1 again, as after a restart
        grid.overrides, grid.on_reply = words, act
        appearing = iter(appear)
        everyone = grid.nodes
        grid.get_node_ids = lambda: everyone[: next(appearing, 3)]
        overrides = f"{words} {place}"
        server_app.run(grid, load_config(overrides), overrides, flower_run=flower_run)

    def die(message, reply):
        if message.metadata.group_id == "2" and message.metadata.message_type == MessageType.TRAIN:
            raise Killed
        return reply

    start(f"run.folder={tmp_path}/whole", "7")
    with pytest.raises(Killed):
        start(f"run.folder={tmp_path}/killed", "8", act=die)
    start(f"resume={tmp_path}/killed", "9", appear=(1, 2, 2))
    events = read_events(tmp_path / "killed")
    stages = {(e.exchange, e.client): e.stage for e in select(events, Trained)}
    assert len(stages) == 6 and [s for (n, _), s in stages.items() if n > 1] == [2] * 3
    assert not select(events, ClientFailed)
    ends = [latest_checkpoint(tmp_path / name / "checkpoint")[0] for name in ("whole", "killed")]
    assert [end.server_round for end in ends] == [2, 2]
    for client in ends[0].task_of:
        mine, theirs = (end.lora(client) for end in ends)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


WRONG = {
    "no-task": ({"task": ""}, "`task` is missing in the node config of client 'St_Mary'"),
    "other-task": ({"task": "ocr"}, "`task` is 'ocr' but the run has vqa, counting"),
    "contradiction": (
        {"client-id": "counting-0", "task": "vqa"},
        "`task` is 'vqa' but client 'counting-0' of the run has task 'counting'",
    ),
    "unknown-key": ({"trainfile": "/x"}, "`trainfile` in the node config .* mean `train-file`"),
    "no-data": ({"train-file": ""}, "`train-file` is missing in the node config"),
    "no-images": ({"image-folder": "/no/images"}, "'<image-folder>', which is not a folder"),
    "micro-batch": ({"micro-batch": 3}, "`micro-batch` is 3 but must divide the 2 .*: 1, 2"),
    "device": ({"device": "cuda:99"}, "`device` is 'cuda:99' but this machine has"),
    "model": (
        {"model-path": "/no/model"},
        "`model-path` names '<model-path>', which is not a fold",
    ),
}


def test_sites_that_contradict_themselves_are_told_in_both_places(federation, sites, caplog):
    wrong = [sites[0] | change for change, _ in WRONG.values()]
    run = federation([*sites[1:], *wrong], "strategy.wait_seconds=0.1")
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        run.run()
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert set(trained(run, 2)) == {"clinic-7", "vqa-0"}
    server = {who: why for number, who, why in failures(run) if number == 1}
    own = [r for r in caplog.records if r.pathname.endswith("handlers.py") and r.levelno > 20]
    assert not [r for r in own if r.exc_info]  # lines, no traceback: an engineer is to read them
    logged = dict.fromkeys(r.getMessage() for r in own)
    for node, log, (change, message) in zip(range(3, 12), logged, WRONG.values(), strict=True):
        why = server[f"node {node}"]
        assert re.search(message, why), why
        for path in (v for v in change.values() if str(v).startswith("/no")):
            assert path in log and path not in why
