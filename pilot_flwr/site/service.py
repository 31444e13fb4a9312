"""A warm site: keep the base model ready between Flower's messages.

A site's service (``pilot-flwr site serve``) listens on a socket in the state folder and runs one
worker process at a time (`pilot_flwr.site.worker`), which imports torch, loads the base model with
its first message and keeps it. The ClientApp of each message connects and sends its code hash and
node config; the service then passes the connection to the worker.

The service itself computes nothing, so a crash of the worker does not affect it. It kills the
worker when the ClientApp ends before the reply, when the worker has been idle for long, and when
the service stops. Killing it is as safe as killing a ClientApp: a private state is replaced
atomically, and a session starts from the state of an earlier exchange. Unless the service stops,
it starts the next worker at once.
"""

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot_flwr.client.node_config import NodeConfig, read_node_config
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.formatting import human_seconds
from pilot_flwr.run.atomic import hold
from pilot_flwr.run.provenance import code_hash
from pilot_flwr.site.door import NOTHING_LOST, greeting
from pilot_flwr.site.transport import SOCKET, HungUp, check_peer, connect, listen, receive, send

LOCK = ".worker.lock"
"""Lock file in a ``state-folder``, held by its service."""

GREETING_SECONDS = 10.0
"""Limit for a greeting, for the answer to a status request, and for a session's end on stopping."""

START_SECONDS = 300.0
"""Limit for a worker's imports, which take long from a slow disk."""

_WORKER = [sys.executable, "-P", "-m", "pilot_flwr.site.worker"]
_TICK_SECONDS = 1.0
_LONGEST_STATUS = 200
_RESTART_SECONDS = 10.0
_HUNG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR
logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Status:
    """Status of a service: `started` is in seconds since 1970, `busy` the last line of progress.

    `warm` is true if the base model is loaded; `messages` counts those answered so far.
    """

    pid: int
    started: float
    warm: bool
    busy: str
    messages: int


def status(state_folder: Path) -> Status | None:
    """Return the status of the service of a state folder; None if none listens there."""
    try:
        connection = connect(state_folder)
    except ConnectionRefusedError:
        return None
    if connection is None:
        return None
    with connection:
        connection.settimeout(GREETING_SECONDS)
        try:
            send(connection, {"status": True})
            packet, _ = receive(connection)
            return Status(**packet)
        except (HungUp, TimeoutError, TypeError):  # TypeError: a service of another version
            raise RunError(
                f"The service of {state_folder} does not answer: restart `pilot-flwr site serve`."
            ) from None


def serve(node_config: NodeConfig, *, idle_release: float = 0.0) -> None:
    """Serve a site until an exception, such as that of a signal, stops the service.

    A worker with a model is replaced by one without after `idle_release` idle seconds; 0 means
    never. Raises `ConfigError` for a wrong node config, and `RunError` if the state folder already
    has a service or the installed code changes.
    """
    settings = read_node_config(node_config)
    folder = settings.state_folder
    if folder is None or not settings.client_id:
        key = "client-id" if folder is not None else "state-folder"
        raise ConfigError(f"`{key}` is missing in the node config but a service needs it.")
    with hold(folder / LOCK, f"The service of {folder}"), listen(folder) as listener:
        try:
            logger.info("Serving client %s; the first message loads its model.", settings.client_id)
            _Server(node_config, idle_release).run(listener)
        finally:
            (folder / SOCKET).unlink(missing_ok=True)


class _Outdated(RunError):
    """The code on disk differs from that of the running service."""

    def __init__(self) -> None:
        super().__init__(
            "The installed pilot-flwr has changed since the site's service started. The service "
            "stops: restart `pilot-flwr site serve`."
        )


class _Worker:
    """A worker process and the socket to control it."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # nosec B603  # no shell, this package
                [*_WORKER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.warm = False
        self.busy = ""
        self.born = time.monotonic()
        self._greeted = False

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def run(self, connection: socket.socket, node_config: dict[str, Any]) -> None:
        """Let the worker answer the message that waits in a connection, as the client of a site.

        Raises `HungUp` if the ClientApp ends first; the worker then still computes and must be
        killed. Raises `RunError` if the worker dies.
        """
        self._greet()
        self.busy = "at work"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `_hear` reports it
            socket.send_fds(
                self._control, [json.dumps(node_config).encode()], [connection.fileno()]
            )
        poller = select.poll()
        poller.register(self._control, select.POLLIN | _HUNG_UP)
        poller.register(connection, _HUNG_UP)
        while True:
            if self._control.fileno() not in dict(poller.poll()):
                raise HungUp
            packet = self._hear()
            if packet.get("done"):
                self.warm, self.busy = bool(packet["warm"]), ""
                return
            if packet.get("replying"):  # from here on, the ClientApp may end before `done` arrives
                poller.unregister(connection)
            self.busy = str(packet.get("busy", "replying"))[:_LONGEST_STATUS]

    def kill(self) -> int:
        """Kill the process; return its exit code."""
        self._process.kill()
        return self._process.wait()

    def close(self) -> None:
        """Kill the process and close its socket, which no other thread may be using."""
        self.kill()
        self._control.close()

    def _greet(self) -> None:
        """Wait until the worker has imported its libraries; check that it has the same code."""
        if self._greeted:
            return
        self._control.settimeout(START_SECONDS)
        code = self._hear()["code"]
        self._control.settimeout(None)
        if code != code_hash():
            raise _Outdated
        self._greeted = True

    def _hear(self) -> dict[str, Any]:
        try:
            return receive(self._control)[0]
        except TimeoutError:
            how = f"did not start within {human_seconds(START_SECONDS)}"
        except HungUp:
            code = self.kill()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            how += " (often out of memory)"
        raise RunError(
            f"The worker process of the site's service {how}; see the log of `pilot-flwr site "
            f"serve`. {NOTHING_LOST}"
        )


class _Server:
    """Accepts connections and passes them to the worker one at a time."""

    def __init__(self, node_config: NodeConfig, idle_release: float) -> None:
        self._own = greeting(node_config)
        self._idle_release = idle_release
        self._started, self._used = time.time(), time.monotonic()
        self._messages = 0
        self._turn = threading.Lock()
        self._stopping = False
        self._outdated: _Outdated | None = None
        self._worker = _Worker()

    def run(self, listener: socket.socket) -> None:
        """Accept connections until an exception, such as that of a signal, stops this thread."""
        listener.settimeout(_TICK_SECONDS)
        try:
            while True:
                if self._outdated is not None:
                    raise self._outdated
                self._release_if_idle()
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        finally:
            self._stopping = True
            self._worker.kill()
            if self._turn.acquire(timeout=GREETING_SECONDS):  # the ClientApp has read its error
                self._worker.close()

    def _serve(self, connection: socket.socket) -> None:
        """Answer one connection: a status request, a query's greeting, or a message."""
        with connection:
            try:
                check_peer(connection)
                connection.settimeout(GREETING_SECONDS)
                packet, _ = receive(connection)
                if "status" in packet:
                    send(connection, asdict(self._status()))
                    return
                if refusal := self._refusal(packet):
                    logger.warning("Refused a ClientApp: %s", refusal)
                    send(connection, {"refused": refusal})
                    return
                send(connection, {})
                if not _hung_up(connection, or_sends=True):  # a query only greets
                    self._answer(connection)
            except HungUp:
                pass
            except (RunError, TimeoutError, OSError) as error:
                logger.warning("Closed a connection to the site's socket: %s", error)

    def _answer(self, connection: socket.socket) -> None:
        with self._one_turn(connection):
            if not self._worker.alive:
                self._replace_worker()
            try:
                self._worker.run(connection, self._own["node_config"])
                self._messages += 1
            except HungUp:
                logger.warning(
                    "The ClientApp ended before its session; restarting the worker. %s",
                    NOTHING_LOST,
                )
                self._replace_worker()
            except RunError as error:
                _fail(connection, _STOPPED if self._stopping else str(error))
                if isinstance(error, _Outdated):
                    self._outdated = error
                elif not self._stopping:
                    logger.error("%s", error)
                    self._replace_worker()
            self._used = time.monotonic()

    @contextlib.contextmanager
    def _one_turn(self, connection: socket.socket) -> Iterator[None]:
        """Wait until the worker is free; raise `HungUp` if the ClientApp ends meanwhile."""
        if not self._turn.acquire(blocking=False):
            text = f"the site's worker is busy; this message waits for: {self._worker.busy}"
            send(connection, {"log": logging.INFO, "text": text})
            while not self._turn.acquire(timeout=_TICK_SECONDS):
                if _hung_up(connection):
                    raise HungUp
        try:
            if _hung_up(connection):
                raise HungUp
            yield
        finally:
            self._turn.release()

    def _release_if_idle(self) -> None:
        """Replace a worker that has died, or has kept a model idle for too long."""
        if not self._turn.acquire(blocking=False):
            return
        try:
            idle = time.monotonic() - self._used
            if not self._worker.alive:
                if time.monotonic() > self._worker.born + _RESTART_SECONDS:
                    logger.warning("The idle worker process has died; starting another.")
                    self._replace_worker()
            elif self._worker.warm and 0 < self._idle_release <= idle:
                logger.info("Idle for %s; releasing the base model.", human_seconds(idle))
                self._replace_worker()
        finally:
            self._turn.release()

    def _replace_worker(self) -> None:
        self._worker.close()
        if not self._stopping:
            self._worker = _Worker()

    def _status(self) -> Status:
        worker = self._worker
        return Status(os.getpid(), self._started, worker.warm, worker.busy, self._messages)

    def _refusal(self, packet: dict[str, Any]) -> str:
        """Return why to refuse a ClientApp: other code, other libraries, another node config."""
        own, other = self._own["code"], packet.get("code")
        if code_hash.__wrapped__() != own:  # uncached: the files may have changed
            self._outdated = _Outdated()
            return str(self._outdated)
        if own != other:
            return (
                f"The site's service runs pilot-flwr with code {own} but this run has code {other}:"
                " install the run's version at the site and restart `pilot-flwr site serve`."
            )
        if libraries := _differences(self._own["versions"], packet.get("versions")):
            return (
                f"The site's service and its SuperNode have different versions of {libraries}: "
                "start both from one environment."
            )
        if keys := _differences(self._own["node_config"], packet.get("node_config")):
            return (
                "The site's service and its SuperNode were started with different node configs, "
                f"which differ in {keys}: restart both with the same file."
            )
        return ""


_STOPPED = f"The site's service was stopped during the session. {NOTHING_LOST}"


def _fail(connection: socket.socket, text: str) -> None:
    """Report to a ClientApp why its session failed, and wait until it has read the report.

    Its message may still be unread here, and closing a socket with unread data discards what the
    other side has not read yet.
    """
    with contextlib.suppress(HungUp, OSError):
        send(connection, {"failed": text})
        while connection.recv(1):
            pass


def _hung_up(connection: socket.socket, *, or_sends: bool = False) -> bool:
    """Return whether the other side has hung up; with `or_sends`, wait until it does or sends."""
    poller = select.poll()
    poller.register(connection, _HUNG_UP | (select.POLLIN if or_sends else 0))
    events = dict(poller.poll(None if or_sends else 0))
    return bool(events.get(connection.fileno(), 0) & _HUNG_UP)


def _differences(ours: Any, theirs: Any) -> str:
    """Return the keys in which two mappings differ."""
    theirs = theirs if isinstance(theirs, dict) else {}
    keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    return ", ".join(f"`{key}`" for key in keys)
