"""A warm site's results equal those of a site without a service, bit for bit."""

import signal
import threading
import time

import pytest
from flwr.app import Error, Message
from inprocess import SMALL, Federation, assert_same_state
from serving import serving, worker_of

from pilot_flwr.site import service

TWO_CLIENTS = f"{SMALL} data.tasks=[vqa] data.clients_per_task=2 strategy.rounds=1"
CLIENTS = ("vqa-0", "vqa-1")


def nodes(folder):
    return [{"client-id": c, "state-folder": str(folder / c), "device": "cpu"} for c in CLIENTS]


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """The federation without any service, to compare with."""
    folder = tmp_path_factory.mktemp("cold")
    return Federation(folder / "run", TWO_CLIENTS, node_configs=nodes(folder)).run()


def test_a_warm_sites_results_are_the_same_bit_for_bit(cold, tmp_path):
    """One of the two clients is warm; the mixtures that it receives depend on both."""
    sites = nodes(tmp_path)
    with serving(sites[0], tmp_path / "log"):
        warm = Federation(tmp_path / "run", TWO_CLIENTS, node_configs=sites).run()
        while (found := service.status(sites[0]["state-folder"])).busy:
            time.sleep(0.1)
    assert found.warm and found.messages == 3  # two exchanges and the closing evaluation
    assert_same_state(cold.strategy.state, warm.strategy.state)
    assert warm.events("failure") == []


@pytest.mark.slow
def test_a_warm_sites_processes_stay_between_messages_and_end_with_it(tmp_path):
    """Results are those of two processes without a service, bit for bit; killed, none is left."""
    sites = [nodes(tmp_path / name) for name in ("cold", "warm")]
    for pair in sites:
        pair[0]["processes"] = "2"
    more = f"{TWO_CLIENTS} train.accumulation_steps=2"
    cold = Federation(tmp_path / "a", more, node_configs=sites[0]).run()
    with serving(sites[1][0], tmp_path / "log") as process:
        warm = Federation(tmp_path / "b", more, node_configs=sites[1]).run()
        worker = worker_of(process)
        (rank,) = worker.children()
        assert (tmp_path / "log").read_text().count("Process 2 of") == 0
        process.kill()
        for gone in (worker, rank):
            gone.wait(10)
    assert_same_state(cold.strategy.state, warm.strategy.state)
    assert warm.events("failure") == []


LONG = (
    f"{TWO_CLIENTS} data.train_examples=48 train.epochs=3 train.log_every_seconds=0.01 "
    "strategy.num_neighbors=1"
)


def stop_in_second_turn(node, worker):
    """Wait until the node's worker trains for its second message; stop it there."""
    deadline = time.monotonic() + 120
    while not (
        (found := service.status(node["state-folder"]))
        and found.messages == 1
        and ": step " in found.busy
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.suspend()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["worker", "service"])
def test_a_session_that_is_killed_is_one_lost_reply(tmp_path, end):
    """The server's state equals one after a lost reply; the private state is that of exchange 1."""
    lost = Federation(tmp_path / "lost", LONG, node_configs=nodes(tmp_path / "c"))
    lost.grid.on_reply = lambda message, reply: (
        Message(Error(0, "lost"), reply_to=message) if is_second(message) else reply
    )
    lost.run()

    sites = nodes(tmp_path / "w")
    states = []
    with serving(sites[0], tmp_path / "log") as process:

        def kill():
            worker = worker_of(process)
            stop_in_second_turn(sites[0], worker)  # so that it cannot have ended when it is killed
            if end == "worker":
                worker.kill()
            else:
                process.send_signal(signal.SIGTERM)

        killer = threading.Thread(target=kill)
        killer.start()
        warm = Federation(tmp_path / "warm", LONG, node_configs=sites)

        def look(message, reply):
            if is_second(message):
                killer.join()
                states.extend(sorted((tmp_path / "w/vqa-0/test-1").glob("private-*")))
            return reply

        warm.grid.on_reply = look
        warm.run()
    (failure,) = (e for e in warm.events("failure") if e["round"] == 2 and e["phase"] == "train")
    assert failure["client"] == "vqa-0" and "No private state is lost" in failure["reason"]
    assert [path.name for path in states] == ["private-0001.safetensors"]
    assert_same_state(lost.strategy.state, warm.strategy.state)


def is_second(message):
    """Return whether a message asks the first node to train in exchange 2."""
    metadata = message.metadata
    return (metadata.message_type, metadata.group_id, metadata.dst_node_id) == ("train", "2", 1)
