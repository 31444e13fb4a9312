"""A site's service: one worker, one session at a time, and every way in which either ends."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from serving import command, serving, worker_of

from pilot_flwr.client_app import app
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.flower.grid import InProcessGrid
from pilot_flwr.flower.messages import OWN_ERROR, PRIVATE_ERROR
from pilot_flwr.run import provenance
from pilot_flwr.site import service
from pilot_flwr.site.door import find_service
from pilot_flwr.site.transport import (
    SOCKET,
    HungUp,
    Memory,
    connect,
    listen,
    receive,
    send,
    send_message,
)

PRIVATE = "experiment=demo privacy.enabled=true privacy.noise_multiplier=16"
STUB = Path(__file__).with_name("stub_worker.py")


class Stop(Exception):
    """Stops the service of a test."""


class Served:
    """A site whose service runs in a thread, with a worker that needs no torch."""

    def __init__(self, folder, idle_release=0.0):
        self.node = {"client-id": "vqa-0", "state-folder": str(folder), "device": "cpu"}
        self.folder, self.idle_release = folder, idle_release
        self.server = service._Server(self.node, idle_release)
        self.listener = listen(folder)
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        accept = self.listener.accept

        def stoppable():
            if self._stop.is_set():
                raise Stop
            return accept()

        class Listener:
            settimeout = self.listener.settimeout
            accept = staticmethod(stoppable)

        try:
            self.server.run(Listener())
        except (Stop, RunError) as error:
            self.ended = error

    def stop(self):
        self._stop.set()
        self.thread.join(60)
        self.listener.close()
        assert not self.thread.is_alive()

    def context(self, what="", **changes):
        return Context(
            run_id=1,
            node_id=2,
            node_config=self.node | changes,
            state=RecordDict(),
            run_config={"overrides": what},
        )

    def turn(self, what="", kind="train"):
        """Let the service answer as a ClientApp does; return the reply's content or error."""
        content = RecordDict({"lora": ArrayRecord({"w": Array(np.zeros(3))})})
        with find_service(self.node) as found:
            return found.run(kind, content, self.context(what))

    def worker(self):
        return self.server._worker._process.pid

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    monkeypatch.setattr(service, "_WORKER", [sys.executable, str(STUB)])
    monkeypatch.setattr(service, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(service, "_RESTART_SECONDS", 0.0)
    served = []

    def start(**options):
        served.append(Served(tmp_path, **options))
        return served[-1]

    yield start
    for site in served:
        site.stop()


@contextmanager
def background(function, *arguments):
    """Run a function in a thread; yield the list that receives its result or exception."""
    outcome = []

    def run():
        try:
            outcome.append(function(*arguments))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield outcome
    thread.join(60)
    assert not thread.is_alive()


def test_one_worker_answers_all_messages_and_its_log_is_the_clientapps(serve, caplog):
    site = serve()
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO):
            first, second = site.turn(), site.turn(kind="evaluate")
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert first["echo"]["lora"] == ["w"]
    assert first["echo"]["pid"] == second["echo"]["pid"] == site.worker()
    assert len({id(r) for r in caplog.records if r.message == "at work"}) == 2
    site.until(lambda: service.status(site.folder).messages == 2)
    found = service.status(site.folder)
    assert (found.pid, found.warm, found.busy) == (os.getpid(), True, "")
    assert abs(found.started - time.time()) < 60


def test_an_error_of_the_worker_is_the_reply(serve):
    error = serve().turn("fail")
    assert (error.code, error.reason) == (1001, "no")


def test_a_worker_that_dies_fails_its_session_alone(serve):
    site = serve()
    pid = site.worker()
    with pytest.raises(RunError, match="ended with code 3 .*No private state is lost"):
        site.turn("die")
    assert site.turn()["echo"]["pid"] != pid


def test_a_worker_that_does_not_start_in_time_is_reported_as_such(serve, monkeypatch):
    site = serve()
    assert site.turn()["echo"]["pid"] == site.worker()
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(service, "_WORKER", slow)
    monkeypatch.setattr(service, "START_SECONDS", 0.2)
    with pytest.raises(RunError, match="ended with code 3"):
        site.turn("die")
    with pytest.raises(RunError, match="did not start within 0.2 s"):
        site.turn()


def test_a_killed_worker_is_replaced_also_when_idle(serve):
    site = serve()
    pid = site.worker()
    os.kill(pid, signal.SIGKILL)
    site.until(lambda: site.worker() != pid)
    assert site.turn()["echo"]["pid"] == site.worker()


def test_the_end_of_a_clientapp_ends_its_session(serve):
    site = serve()
    pid = site.worker()
    with (
        find_service(site.node) as found,
        background(found.run, "train", RecordDict(), site.context("sleep")) as outcome,
    ):
        site.until(lambda: service.status(site.folder).busy == "train, exchange 3")
        found.connection.shutdown(2)
    assert isinstance(outcome[0], RunError)
    site.until(lambda: site.worker() != pid)
    assert not psutil.pid_exists(pid)
    assert site.turn()["echo"]["pid"] == site.worker()
    site.until(lambda: service.status(site.folder).messages == 1)


def test_a_clientapp_may_end_before_its_session_is_reported_as_done(serve):
    """The worker is slow to report, and is kept all the same."""
    site = serve()
    pid = site.worker()
    for _ in range(3):
        site.turn("slow")
        site.until(lambda: not service.status(site.folder).busy)
    assert site.worker() == pid
    assert service.status(site.folder).messages == 3


def test_a_second_clientapp_waits_until_the_worker_is_free(serve):
    site = serve()
    with (
        find_service(site.node) as first,
        background(first.run, "train", RecordDict(), site.context("sleep")),
    ):
        site.until(lambda: service.status(site.folder).busy)
        with background(site.turn) as second:
            time.sleep(0.3)
            assert not second
            first.connection.shutdown(2)
    assert second[0]["echo"]["pid"] == site.worker()


def test_a_clientapp_that_ends_while_it_waits_is_forgotten(serve, caplog):
    site = serve()
    with (
        find_service(site.node) as first,
        background(first.run, "train", RecordDict(), site.context("wait")) as outcome,
    ):
        site.until(lambda: service.status(site.folder).busy == "train, exchange 3")
        pid = site.worker()
        with find_service(site.node) as second, Memory() as memory:
            send_message(second.connection, {}, RecordDict(), memory)
            packet, _ = receive(second.connection)
            assert "busy; this message waits for: train, exchange 3" in packet["text"]
        (site.folder / "end").touch()
    assert outcome[0]["echo"]["pid"] == pid
    assert site.turn()["echo"]["pid"] == pid == site.worker()
    site.until(lambda: service.status(site.folder).messages == 2)


def test_another_users_process_gets_no_answer(serve, monkeypatch):
    site = serve()
    with connect(site.folder) as stranger:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        send(stranger, {"status": True})
        with pytest.raises(HungUp):
            receive(stranger)


def test_the_end_of_the_service_is_an_error_of_the_session(serve):
    site = serve()
    with background(site.turn, "sleep") as outcome:
        site.until(lambda: service.status(site.folder).busy)
        site.stop()
    assert "was stopped during the session. No private state is lost" in str(outcome[0])


def test_an_idle_worker_gives_its_memory_back(serve):
    site = serve(idle_release=0.4)
    pid = site.worker()
    time.sleep(0.6)
    assert site.worker() == pid  # it has loaded nothing
    site.turn()
    site.until(lambda: service.status(site.folder).warm)
    site.until(lambda: site.worker() != pid)
    assert not service.status(site.folder).warm


def test_other_code_is_refused_by_its_name(serve, monkeypatch):
    site = serve()
    monkeypatch.setattr("pilot_flwr.site.door.code_hash", lambda: "another")
    with (
        pytest.raises(ConfigError, match="has code another: install the run's version .* restart"),
        find_service(site.node),
    ):
        pass


@pytest.mark.parametrize("when", ["while the worker runs", "before it starts"])
def test_code_that_changed_on_disk_is_not_run(serve, monkeypatch, when):
    """The service ends, so that its supervisor starts one with the new code."""
    if when == "before it starts":
        monkeypatch.setenv("STUB_CODE", "newer")
    site = serve()
    if when == "while the worker runs":
        site.turn()
        newer = SimpleNamespace(__wrapped__=lambda: "newer")
        monkeypatch.setattr(service, "code_hash", newer)
    with pytest.raises((ConfigError, RunError), match="has changed since .* restart"):
        site.turn()
    site.thread.join(10)
    assert "has changed" in str(site.ended)


def test_other_libraries_are_refused_by_their_names(serve, monkeypatch):
    site = serve()
    other = provenance.versions() | {"torch": "1.0"}
    monkeypatch.setattr("pilot_flwr.site.door.versions", lambda: other)
    with pytest.raises(ConfigError, match="different versions of `torch`: start both from one"):
        with find_service(site.node):
            pass


def test_another_node_config_is_refused_with_its_keys(serve):
    site = serve()
    other = site.node | {"device": "auto", "task": "vqa"}
    with pytest.raises(ConfigError, match="differ in `device`, `task`: restart both"):
        with find_service(other):
            pass
    with find_service(site.node | {"partition-id": 0, "num-partitions": 1}) as found:
        assert found is not None  # Flower's own keys


def test_a_socket_without_a_service_is_reported_and_not_used(tmp_path, caplog):
    listen(tmp_path).close()
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        with find_service({"client-id": "a", "state-folder": str(tmp_path)}) as found:
            assert found is None
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert "has left its socket" in caplog.text and str(tmp_path) in caplog.text
    assert service.status(tmp_path) is None


def test_a_service_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("pilot_flwr.site.door.PATIENCE_SECONDS", 0.1)
    with listen(tmp_path), pytest.raises(RunError, match="does not answer. Restart"):
        with find_service({"client-id": "a", "state-folder": str(tmp_path)}):
            pass


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"code": 1}', b'{"node_config": 3}'])
def test_a_bad_greeting_disturbs_nobody(serve, data):
    site = serve()
    with connect(site.folder) as stranger:
        if data:
            stranger.send(data)
        assert site.turn()["echo"]["pid"] == site.worker()


def test_half_a_message_fails_its_own_session_alone(serve):
    site = serve()
    with find_service(site.node) as found:
        found.connection.send(b"[0, 99")
        with pytest.raises(RunError, match="A packet on the site's socket cannot be read"):
            found.run("train", RecordDict(), site.context())
    assert site.turn()["echo"]["pid"] == site.worker()


def reply_of(node, overrides, kind="train"):
    """Return the ClientApp's reply to a message of the server."""
    grid = InProcessGrid(app, node_configs=[node], overrides=overrides)
    run = ConfigRecord({"name": "run-1", "folder": "/nowhere", "token": "x"})
    (answer,) = grid.send_and_receive([Message(RecordDict({"run": run}), 1, kind, group_id="1")])
    return answer


def test_the_server_learns_of_a_dead_worker_and_in_a_private_run_nothing(serve, monkeypatch):
    site = serve()
    monkeypatch.setattr(service._Worker, "run", dies)
    error = reply_of(site.node, "experiment=demo").error
    assert error.code == OWN_ERROR and error.reason == "It died."
    assert reply_of(site.node, PRIVATE).error.reason == PRIVATE_ERROR


def dies(self, *_):
    raise RunError("It died.")


def test_a_value_that_cannot_travel_is_an_error_without_its_text(serve):
    """Flower's records may hold bytes, which no message of this app does."""
    site = serve()
    secret = ConfigRecord({"x": b"secret", "name": "run-1", "folder": "/", "token": "x"})
    grid = InProcessGrid(app, node_configs=[site.node], overrides="experiment=demo")
    message = Message(RecordDict({"run": secret}), 1, "train", group_id="1")
    (answer,) = grid.send_and_receive([message])
    assert answer.error.code == OWN_ERROR and answer.error.reason.startswith("TypeError; see the")
    grid.overrides = PRIVATE
    (answer,) = grid.send_and_receive([Message(message.content, 1, "train", group_id="1")])
    assert (answer.error.code, answer.error.reason) == (OWN_ERROR, PRIVATE_ERROR)


def test_while_the_run_may_be_private_an_error_quotes_the_servers_own_input(tmp_path):
    """Unreadable settings do not say whether the run is private; the node config is wrong, too."""
    node = {"client-id": "a", "state-folder": str(tmp_path), "train-file": "patients of ward 7"}
    reason = reply_of(node, f"{PRIVATE} nonsense=1").error.reason
    assert "nonsense" in reason and "ward" not in reason
    assert reply_of(node, PRIVATE).error.reason == PRIVATE_ERROR


def test_a_query_is_answered_here_once_the_service_agrees(serve, monkeypatch):
    site = serve()
    assert "query" in reply_of(site.node, "experiment=demo", "query").error.reason  # without one
    monkeypatch.setattr("pilot_flwr.site.door.code_hash", lambda: "another")
    assert "has code another" in reply_of(site.node, "experiment=demo", "query").error.reason
    assert service.status(site.folder).messages == 0


def test_the_command_serves_until_it_is_stopped(tmp_path):
    """A second service is refused; SIGTERM ends the first one, its worker and its socket."""
    node = {"client-id": "vqa-0", "state-folder": tmp_path}
    with serving(node, tmp_path / "log") as process:
        found = service.status(tmp_path)
        second = subprocess.run(command(node), capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"The service of {tmp_path} is in use by another process." in second.stderr
        assert service.status(tmp_path) == found
        worker = worker_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not worker.is_running()
        assert not (tmp_path / SOCKET).exists()


def test_a_node_config_without_a_state_folder_is_refused():
    with pytest.raises(ConfigError, match="`state-folder` is missing"):
        service.serve({"client-id": "a"})
    with pytest.raises(ConfigError, match="`client-id` is missing"):
        service.serve({"state-folder": "/nowhere"})


def test_the_service_dies_and_its_worker_with_it(tmp_path):
    node = {"client-id": "vqa-0", "state-folder": tmp_path}
    with serving(node, tmp_path / "log") as process:
        worker = worker_of(process)
    gone, alive = psutil.wait_procs([worker], 30)
    assert gone and not alive
    with pytest.raises(ConnectionRefusedError):
        connect(tmp_path)
