"""The processes of one launch: marked, found again by their mark, ended by process id.

Flower's simulation is a tree of about ten processes (SuperLink, SuperExec, simulation, Ray's
servers and actors), some of which detach or outlive their parent. Every one inherits an
environment variable with the launch's own value, and works in the launch's scratch folder;
`end_marked` ends what shows either. A watchdog does the same if the launcher itself is killed.

This file is also the watchdog's script and so imports nothing but the standard library and
psutil: ``python -P processes.py MARK FOLDER`` waits until its standard input is closed.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

import psutil  # type: ignore[import-untyped, unused-ignore]
from psutil import Process

MARK_VARIABLE = "PILOT_FLWR_LAUNCH"
GRACE_SECONDS = 5.0

# Ray puts sockets about 76 characters below its folder; a socket's path has at most 107.
LONGEST_SCRATCH_BASE = 18


class Interrupted(Exception):
    """The launcher was told to stop.

    Parameters
    ----------
    signum : int
        The signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying; `check` raises at a safe point.

    A signal that the launcher was started to ignore (``nohup``) stays ignored. Outside the main
    thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)


class Stopped(BaseException):
    """A signal said stop, inside `stoppable`; no handler of errors takes it for one of them.

    Parameters
    ----------
    signum : int
        The signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted`, wherever the block is at work.

    For work of this process itself, of which any point is safe to stop at. A second signal acts
    as if this were not here. Signals that were ignored stay ignored; outside the main thread,
    where Python allows no handlers, nothing is changed.
    """

    def stop(signum: int, _frame: FrameType | None) -> None:
        restore()
        raise Stopped(signum)

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        raise Interrupted(stopped.signum) from None
    finally:
        restore()


class ProcessSandbox:
    """A scratch folder, a mark and a watchdog; on exit no process and no file is left.

    Attributes
    ----------
    folder : Path
        Working directory of everything spawned here, short enough for Ray's sockets.
    mark : str
        Value of `MARK_VARIABLE` in the environment of everything spawned here.
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

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        end_marked(self.mark, self.folder)
        deadline = time.monotonic() + 4 * GRACE_SECONDS
        for child in self._children:  # killed above; one that hangs in the kernel is left to it
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
        """Start `command` in the scratch folder, marked, in a session of its own.

        The session of its own keeps a terminal's Ctrl-C from reaching it before the launcher
        has decided what to do.
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
        """Return the marked process that runs the program `name`, if there is one."""
        for process in marked_processes(self.mark, self.folder):
            with contextlib.suppress(psutil.Error):
                if any(Path(part).name == name for part in process.cmdline()[:2]):
                    return process
        return None


def marked_processes(mark: str, folder: Path) -> list[Process]:
    """Return the processes, other than this one, that belong to a launch.

    Ray overwrites the environment of some of its agents when it renames them. Those show an
    empty one, and are known by their working directory instead.
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
    """Terminate what belongs to a launch, then kill what is left after `GRACE_SECONDS`."""
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
    """Tell whether a process still runs; a zombie does not."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def listens(pid: int, port: int) -> bool:
    """Tell whether process `pid` itself accepts connections on `port`."""
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in connections
    )


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scratch_base() -> str:
    candidates = [os.environ.get("RAY_TMPDIR", ""), tempfile.gettempdir()]
    for base in candidates:
        if base and len(base) <= LONGEST_SCRATCH_BASE and os.access(base, os.W_OK | os.X_OK):
            return base
    return "/tmp"  # nosec B108  # mkdtemp makes a folder of its own in it


def _watch(mark: str, folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the launcher has ended, in whatever way
    end_marked(mark, folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(sys.argv[1], Path(sys.argv[2]))
