"""The shell commands of ``docs/how-to/deployment.md`` and ``operations.md``, to be executed.

A block of a page that is preceded by ``<!-- block: NAME -->`` has a name. The blocks called
``….settings`` hold the variables that a reader changes: the tests give those values of their own.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / "docs" / "how-to" / f"{name}.md" for name in ("deployment", "operations")]

_BLOCK = re.compile(r"<!-- block: (\S+) -->\n```bash\n(.*?)\n```", re.DOTALL)
_VARIABLE = re.compile(r"^(?:export )?([A-Z_]+)=", re.MULTILINE)


def blocks() -> dict[str, str]:
    """Return the pages' blocks by name."""
    return dict(_BLOCK.findall(text()))


def text() -> str:
    """Return the text of both pages."""
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def free_port() -> int:
    """Return a TCP port of this machine that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machine:
    """One machine of the page: a folder, the values of its settings, and its processes.

    Parameters
    ----------
    kind : str
        ``server`` or ``site``; the blocks of that name are this machine's.
    folder : Path
        For its logs.
    values : mapping
        A value for every variable of the block ``KIND.settings``, and of no other.
    """

    def __init__(self, kind: str, folder: Path, values: Mapping[str, object]) -> None:
        self.kind, self.folder = kind, folder
        self.values = {key: str(value) for key, value in values.items()}
        folder.mkdir(parents=True, exist_ok=True)
        self.code: int | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._settings = _with_values(blocks()[f"{kind}.settings"], self.values)

    def script(self, block: str) -> str:
        """Return the text of a block behind this machine's settings."""
        return self.own_script(blocks()[f"{self.kind}.{block}"])

    def own_script(self, text: str) -> str:
        """Return a text of the test's own behind this machine's settings."""
        return "\n".join(["set -euo pipefail", *self._settings, text])

    def run(self, block: str, *, timeout: float = 300, check: bool = True, add: str = "") -> str:
        """Execute a block to its end and return what it printed; `code` has its exit code.

        `add` is appended to its last command.
        """
        script = self.script(block)
        return self.run_script(f"{script} {add}" if add else script, timeout=timeout, check=check)

    def run_script(self, script: str, *, timeout: float = 300, check: bool = True) -> str:
        """Execute a script to its end and return what it printed; `code` has its exit code."""
        done = subprocess.run(
            ["bash", "-c", script],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        self.code = done.returncode
        output = done.stdout + done.stderr
        assert not check or done.returncode == 0, f"{script}:\n{output}"
        return output

    def start(self, block: str, *, script: str = "") -> Path:
        """Start a block, or a script of the test's own, in the background; return its log."""
        log = self.folder / f"{block}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                ["bash", "-c", script or self.script(block)],
                env=environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._running.append(process)
        return log

    def is_running(self) -> bool:
        """Return whether the block started last still runs."""
        return self._running[-1].poll() is None

    def ended(self, *, seconds: float = 180) -> int:
        """Wait until the block started last has ended; return its exit code."""
        return self._running[-1].wait(timeout=seconds)

    def roots(self) -> list[int]:
        """Return the ids of the processes that were started here, from which all others come."""
        return [child.pid for child in self._running]

    def processes(self) -> list[psutil.Process]:
        """Return the processes started here that still run, with their descendants."""
        found = []
        for child in self._running:
            with suppress(psutil.Error):
                process = psutil.Process(child.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def kill(self) -> None:
        """End everything at once, as a power failure does."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        for child in self._running:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # children of one that has ended
            child.wait()
        self._running.clear()


def _with_values(settings: str, values: Mapping[str, str]) -> list[str]:
    """Return the settings' lines in which every plain assignment has the test's value."""
    named = [n for n in _VARIABLE.findall(settings) if not n.startswith("FLWR_")]
    assert sorted(named) == sorted(values), f"the page's settings are {named}"
    lines = []
    for line in settings.splitlines():
        name = line.split("=")[0]
        lines.append(f"{name}={shlex.quote(values[name])}" if name in values else line)
    return lines


def environment() -> dict[str, str]:
    """Return the tests' environment, without Flower's variables and with its programs first."""
    others = ("FLWR_", "PYTHONDONTWRITEBYTECODE")  # no site compiles the app for every message
    plain = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    local = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    quiet = {"FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return plain | local | quiet | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def wait_for(log: Path, words: str, machine: Machine, *, seconds: float = 180) -> None:
    """Wait until `words` are in a log, or fail with the log."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if words in log.read_text(errors="replace"):
            return
        if not machine.is_running():
            break
        time.sleep(0.3)
    raise AssertionError(f"{words!r} is not in {log.name}:\n{log.read_text(errors='replace')}")


def wait_for_either(log: Path, words: str, machine: Machine, *, seconds: float = 180) -> bool:
    """Wait until new lines have `words` (return True) or the writer has ended (return False)."""
    before = log.read_text(errors="replace").count(words)
    wait_until(
        lambda: log.read_text(errors="replace").count(words) > before or not machine.is_running(),
        seconds=seconds,
    )
    return machine.is_running()


def wait_until(condition: Callable[[], object], *, seconds: float) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)


def wait_for_port(port: int, machine: Machine, *, seconds: float = 60) -> None:
    """Wait until something listens on a port of this machine."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert machine.is_running()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.3)
    raise AssertionError(f"nothing listens on port {port}")


def has_nginx() -> bool:
    """Return whether the gateway of the page can be started here."""
    return shutil.which("nginx") is not None
