"""Run the processes of one launch so that none outlives it.

Flower's simulation is a tree of about ten processes (SuperLink, SuperExec, simulation, Ray's
servers and actors), some of which detach or outlive their parent. Each inherits an environment
variable that identifies the launch and works in the launch's scratch folder; `end_marked` ends
every process with either. A watchdog does the same if the launcher itself is killed.

This file is also the watchdog's script, so it imports only the standard library and psutil:
``python -P processes.py MARK FOLDER`` waits until its standard input is closed.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil  # type: ignore[import-untyped, unused-ignore]
from psutil import Process

MARK_VARIABLE = "PILOT_FLWR_LAUNCH"
GRACE_SECONDS = 5.0

# Ray puts sockets about 76 characters below its folder; a socket's path has at most 107.
LONGEST_SCRATCH_BASE = 18


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP stopped the work; like KeyboardInterrupt, not an `Exception`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class StopSignals:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted` while the block runs.

    By default a signal is recorded and `check` raises at a safe point, so that starting and ending
    processes is not interrupted. With `at_once` the handler raises immediately, for work that may
    stop anywhere; a second signal then acts as outside the block. An ignored signal (``nohup``)
    stays ignored. Outside the main thread, where Python allows no handlers, this does nothing.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.received: int | None = None
        self._at_once = at_once
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
        if self._at_once:
            self._restore()
            raise Interrupted(signum)

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


class ProcessSandbox:
    """A scratch folder, a mark and a watchdog; on exit all processes end and the folder is deleted.

    `folder` is the working directory of every process spawned here, short enough for Ray's
    sockets; `mark` is the value of `MARK_VARIABLE` in their environment.
    """

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="pf-", dir=_scratch_base())).resolve()
        self._children: list[subprocess.Popen[bytes]] = []
        self._watchdog = subprocess.Popen(  # nosec B603  # no shell, this very file
            [sys.executable, "-P", __file__, self.mark, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def __enter__(self) -> "ProcessSandbox":
        return self

    def __exit__(self, *exc_info: object) -> None:
        end_marked(self.mark, self.folder)
        deadline = time.monotonic() + 4 * GRACE_SECONDS
        for child in self._children:  # killed above; give up on one stuck in the kernel
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
        shutil.rmtree(self.folder, ignore_errors=True)
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(timeout=4 * GRACE_SECONDS)

    def spawn(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: IO[bytes] | int,
        stderr: IO[bytes] | int,
    ) -> subprocess.Popen[bytes]:
        """Start `command` in the scratch folder, marked.

        It gets its own session, so that Ctrl-C in a terminal reaches only the launcher.
        """
        child = subprocess.Popen(  # nosec B603  # no shell; commands of this package and Flower
            command,
            env={**environment, MARK_VARIABLE: self.mark},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        self._children.append(child)
        return child

    def find(self, name: str) -> Process | None:
        """Return a marked process that runs the program `name`, if any."""
        for process in marked_processes(self.mark, self.folder):
            with contextlib.suppress(psutil.Error):
                if any(Path(part).name == name for part in process.cmdline()[:2]):
                    return process
        return None


def marked_processes(mark: str, folder: Path) -> list[Process]:
    """Return the processes of a launch, other than this one.

    Ray overwrites the environment of some agents when it renames them: an agent whose environment
    reads as empty is recognised by its working directory.
    """
    found = []
    inside = (str(folder), f"{folder} (deleted)")
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            environment = process.environ()
            belongs = environment.get(MARK_VARIABLE) == mark
            if not environment:
                cwd = process.cwd()
                belongs = cwd in inside or cwd.startswith(f"{folder}/")
        except (psutil.Error, OSError):  # gone, a zombie, or another user's
            continue
        if belongs:
            found.append(process)
    return found


def end_marked(mark: str, folder: Path) -> None:
    """Terminate the processes of a launch; kill those left after `GRACE_SECONDS`."""
    for attempt in range(10):
        processes = marked_processes(mark, folder)
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(psutil.Error):
                if attempt == 0:
                    process.terminate()
                else:
                    process.kill()
        deadline = time.monotonic() + (GRACE_SECONDS if attempt == 0 else 1.0)
        while any(is_alive(process) for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)


def is_alive(process: Process) -> bool:
    """Return whether a process still runs; a zombie does not."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def listens(pid: int, port: int) -> bool:
    """Return whether process `pid` itself accepts connections on `port`."""
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in connections
    )


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scratch_base() -> str:
    candidates = [os.environ.get("RAY_TMPDIR", ""), tempfile.gettempdir()]
    for base in candidates:
        if base and len(base) <= LONGEST_SCRATCH_BASE and os.access(base, os.W_OK | os.X_OK):
            return base
    return "/tmp"  # nosec B108  # mkdtemp creates a private folder in it


def _watch(mark: str, folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the launcher exits, however it ends
    end_marked(mark, folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(sys.argv[1], Path(sys.argv[2]))
