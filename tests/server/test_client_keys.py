"""A client id belongs to a key: real sites in this process, with an impostor among them."""

import shlex

import pytest
from flwr.app import MessageType
from inprocess import Federation
from llava_files import write_federation
from quick_training import quick_training

from pilot_flwr import server_app
from pilot_flwr.cli.main import main
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.errors import RunError
from pilot_flwr.flower.client_key import client_key, fingerprint, public_key, read_client_keys
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import ClientFailed, select
from pilot_flwr.strategy import CLIENT_KEYS

WORDS = (
    "train.epochs=1 train.batch_size=2 evaluation.enabled=false strategy.rounds=2 "
    "model.feature_cache.where=off strategy.clients=2 strategy.wait_seconds=0.2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_federation(folder, train=4, test=2, clients=1).parent


@pytest.fixture(autouse=True, scope="module")
def quickly():
    with quick_training():
        yield


@pytest.fixture
def sites(data, tmp_path):
    """Node configs of the owner of an id, of another site, and of one that claims the id."""

    def site(client, state):
        return {
            "client-id": client,
            "task": "vqa",
            "state-folder": str(tmp_path / state),
            "train-file": str(data / "vqa" / "train.json"),
            "image-folder": str(data / "vqa" / "images"),
        }

    return {1: site("a", "owner"), 2: site("b", "other"), 3: site("a", "impostor")}


@pytest.fixture
def words(data):
    path = data / "federation.yaml"
    return shlex.join(expand([f"data={path}", *shlex.split(WORDS)]))


@pytest.fixture
def federation(words, sites, tmp_path):
    """Make a federation whose nodes 4 and 5 are the owner and the impostor, restarted."""

    def make(more=""):
        nodes = [sites[1], sites[2], sites[3], sites[1], sites[3]]
        everything = f"{words} {more}"
        return Federation(tmp_path / "run", everything, num_nodes=5, node_configs=nodes)

    return make


def scheduled(grid, nodes_of):
    """Let the nodes of an exchange be connected until its instructions are answered."""
    grid.nodes = nodes_of[1]

    def next_exchange(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            number = message.content["instruction"]["round"]
            grid.nodes = nodes_of.get(number + 1, grid.nodes)
        return reply

    grid.on_reply = next_exchange


def instructed(grid):
    """Return exchange, node and client of every message with a client's LoRA."""
    found = [(m.metadata.dst_node_id, m.content["instruction"]) for m in grid.messages
             if not m.metadata.reply_to_message_id and "instruction" in m.content]  # fmt: skip
    return {(values["round"], node, values["client"]) for node, values in found}


def test_an_impostor_never_gets_a_clients_lora_nor_keeps_it_out(federation):
    run = federation()
    scheduled(run.grid, {1: [1, 2], 2: [2, 3], 3: [2, 3, 4]})
    run.run()
    assert instructed(run.grid) == {
        *((1, 1, "a"), (1, 2, "b")),
        (2, 2, "b"),  # the owner is away, the impostor is there
        *((3, 4, "a"), (3, 2, "b")),  # the owner is back under another node id
    }
    refusals = [f for f in run.events("failure") if f["client"] == "node 3"]
    assert [f["round"] for f in refusals] == [2, 3]
    assert all("claims to be client 'a', whose key is SHA256:" in f["reason"] for f in refusals)
    stages = {e["round"]: e["stage"] for e in run.events("train", client="a")}
    assert stages == {1: 1, 3: 2}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize("earlier_version", [False, True])
def test_the_keys_are_kept_over_a_resume(words, federation, tmp_path, exchange, earlier_version):
    """Also if the run was killed before its first checkpoint."""

    def start(place, nodes, act=None):
        grid = federation().grid
        scheduled(grid, nodes)
        grid.on_reply = act or grid.on_reply
        overrides = f"{words} {place}"
        server_app.run(grid, load_config(overrides), overrides, flower_run="7")
        return grid

    def die(message, reply):
        train = message.metadata.message_type == MessageType.TRAIN
        if train and message.metadata.group_id == str(exchange):
            raise Killed
        return reply

    folder = tmp_path / "r"
    with pytest.raises(Killed):
        start(f"run.folder={folder}", {1: [1, 2]}, act=die)
    keys = read_client_keys(folder / CLIENT_KEYS)
    owner = client_key(tmp_path / "owner" / "a.key", create=False)
    assert keys["a"] == fingerprint(public_key(owner)) and keys.keys() == {"a", "b"}
    if earlier_version:  # it recorded no keys: the first one to return is bound
        (folder / CLIENT_KEYS).unlink()
        start(f"resume={folder}", dict.fromkeys((1, 2, 3), [1, 2]))
        assert read_client_keys(folder / CLIENT_KEYS) == keys
        return
    nodes = {number: [2, 5] for number in range(1, 4)} | {exchange + 1: [2, 4, 5]}
    grid = start(f"resume={folder}", {1: [2, 5]} | nodes)
    assert {node for _, node, client in instructed(grid) if client == "a"} == {4}
    assert any("whose key is" in e.reason for e in select(read_events(folder), ClientFailed))


def test_the_operators_file_decides_from_the_first_exchange(federation, sites, tmp_path):
    owner = client_key(tmp_path / "owner" / "a.key", create=True)
    listed = tmp_path / "client-keys"
    listed.write_text(f"a {public_key(owner)} a's own\n")
    run = federation(f"strategy.client_keys={listed}")
    scheduled(run.grid, {1: [2, 3], 2: [2, 3, 4]})
    with pytest.raises(RunError, match="does not list client 'b'"):
        run.run()  # nobody is left in the first exchange
    other = client_key(tmp_path / "other" / "b.key", create=False)
    listed.write_text(listed.read_text() + f"b {fingerprint(public_key(other))}\n")
    run = federation(f"strategy.client_keys={listed}")
    scheduled(run.grid, {1: [2, 3], 2: [2, 3, 4], 3: [2, 3, 4]})
    run.run()
    assert {node for _, node, client in instructed(run.grid) if client == "a"} == {4}


def without_proof(reply):
    del reply.content["proof"]


def of_another_node(reply, seen=[]):  # noqa: B006  # the proof of the first reply
    seen.append(reply.content["proof"])
    reply.content["proof"] = seen[0]


def tampered(reply):
    proof = reply.content["proof"]
    proof["signature"] = proof["signature"][:-1] + bytes([proof["signature"][-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_proof, "`proof`"),
        (tampered, "for another query or forged"),
        (of_another_node, "for another query or forged"),
    ],
)
def test_a_reply_without_its_own_proof_is_refused(federation, change, reason):
    run = federation("strategy.rounds=1")
    run.grid.nodes = [1, 2]

    def change_reply(message, reply):
        if message.metadata.message_type == MessageType.QUERY and message.metadata.group_id == "1":
            if change is of_another_node or message.metadata.dst_node_id == 2:
                change(reply)
        return reply

    run.grid.on_reply = change_reply
    run.run()
    assert {node for number, node, _ in instructed(run.grid) if number == 1} == {1}
    reasons = {f["client"]: f["reason"] for f in run.events("failure", round=1)}
    assert reason in reasons["node 2"]


def test_a_simulation_has_no_keys(tmp_path):
    run = Federation(
        tmp_path / "run",
        f"{WORDS} strategy.clients=0 data.tasks=[vqa] data.clients_per_task=1 "
        "data.train_examples=4 data.test_examples=2",
    ).run()
    assert not any("proof" in message.content for message in run.grid.messages)
    assert not (run.folder.path / CLIENT_KEYS).exists()


def test_a_file_of_keys_in_a_simulation_is_refused(capsys):
    assert main(["run", "strategy.client_keys=/x"]) == 2
    assert "`strategy.client_keys`" in capsys.readouterr().err


def test_a_key_that_cannot_be_read_is_the_sites_error(federation, sites, tmp_path):
    sites[2]["identity-key"] = str(tmp_path / "missing")
    run = federation("strategy.rounds=1")
    run.grid.nodes = [1, 2]
    run.run()
    reasons = {f["client"]: f["reason"] for f in run.events("failure", round=1)}
    assert reasons["node 2"] == (
        "The client's key '<identity-key>' (`identity-key`) cannot be read: No such file or "
        "directory."
    )
