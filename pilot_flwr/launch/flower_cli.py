"""Drive Flower's command line: submit the app, stream its log, query its status.

``flwr run --stream`` returns 0 even when the run failed, so the app is submitted with
``--format json`` and its status is queried with ``flwr list``.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from pilot_flwr.config.overrides import toml_string
from pilot_flwr.errors import RunError
from pilot_flwr.launch.processes import ProcessSandbox, StopSignals
from pilot_flwr.run.outcome import RunStatus

TICK_SECONDS = 0.3
ANSWER_SECONDS = 300.0


@dataclass(frozen=True)
class FlowerCLI:
    """Run Flower's programs in a sandbox, against one connection of its ``config.toml``.

    Every wait raises `pilot_flwr.launch.processes.Interrupted` on a signal.
    """

    sandbox: ProcessSandbox
    signals: StopSignals
    environment: Mapping[str, str]
    connection: str

    def submit(self, app: Path, overrides: str, *options: str) -> str:
        """Submit the app in a folder and return Flower's run ID."""
        config = f"overrides={toml_string(overrides)}"
        answer = self._ask("run", str(app), self.connection, "--run-config", config, *options)
        if not answer.get("success") or not answer.get("run-id"):
            reason = answer.get("error-message") or answer.get("error") or "no reason given"
            raise RunError(f"Flower did not accept the run: {str(reason).strip()}")
        return str(answer["run-id"])

    def status(self, run: str) -> RunStatus:
        """Query a run's status; empty if the SuperLink does not answer."""
        runs = self._ask("list", self.connection, "--run-id", run).get("runs")
        row = runs[0] if isinstance(runs, list) and runs else {}
        return RunStatus(str(row.get("status", "")), str(row.get("status-details", "")))

    def stream_log(self, run: str, path: Path) -> subprocess.Popen[bytes]:
        """Stream a run's log, from its beginning, into a file."""
        arguments = ("log", run, self.connection, "--stream")
        with path.open("wb") as stdout:
            return self.spawn("flwr", *arguments, stdout=stdout, stderr=subprocess.DEVNULL)

    def spawn(
        self, program: str, *arguments: str, stdout: Any, stderr: Any
    ) -> subprocess.Popen[bytes]:
        """Start one of Flower's programs; `stdout` and `stderr` as for `subprocess.Popen`."""
        command = [str(flower_program(program)), *arguments]
        return self.sandbox.spawn(command, self.environment, stdout=stdout, stderr=stderr)

    def wait(self, child: "subprocess.Popen[bytes]") -> int | None:
        """Return a child's exit code, or None if it still runs after `ANSWER_SECONDS`."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            self.pause()
        return child.poll()

    def pause(self, seconds: float = TICK_SECONDS) -> None:
        """Sleep, or raise `Interrupted` on a signal."""
        deadline = time.monotonic() + seconds
        while True:
            self.signals.check()
            if (rest := deadline - time.monotonic()) <= 0:
                return
            time.sleep(min(rest, TICK_SECONDS))

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command and return its JSON answer."""
        output, errors = (self.sandbox.folder / name for name in ("output", "errors"))
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            command = (*arguments, "--format", "json")
            self.wait(self.spawn("flwr", *command, stdout=stdout, stderr=stderr))
        texts = [p.read_text(encoding="utf-8", errors="replace").strip() for p in (output, errors)]
        with contextlib.suppress(ValueError):
            if isinstance(answer := json.loads(texts[0]), dict):
                return answer
        printed = "\n".join(filter(None, reversed(texts)))
        return {
            "error": f"`flwr {arguments[0]}` returned no JSON{f': {printed}' if printed else '.'}"
        }


def flower_environment(base: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of Flower's programs, with their configuration in `home`."""
    programs = str(flower_program("flwr").parent)  # first: Flower starts its helpers by name
    return {
        **base,
        "PATH": os.pathsep.join([programs, base.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def flower_program(name: str) -> Path:
    """Locate one of Flower's programs beside the running Python, ignoring ``PATH``."""
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if (folder / name).is_file():
            return folder / name
    raise RunError(f"`{name}` is not installed beside {sys.executable}: `pip install flwr`.")


def is_healthy(port: int) -> bool:
    """Return whether the SuperLink on a local port reports that it is healthy."""
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=2)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False


def check_installation() -> None:
    """Raise `RunError` unless Flower's programs and the app's pyproject.toml are installed."""
    for name in ("flwr", "flower-superlink"):
        flower_program(name)
    _app_source()


def app_folder(scratch: Path) -> Path:
    """Return the folder of the Flower app: the checkout, or one assembled from the package.

    An installed package has no checkout, so its files, ``conf/`` and pyproject.toml are copied
    to `scratch` in a checkout's layout, so that `pilot_flwr.run.provenance.code_hash` is
    the same.
    """
    package = Path(__file__).resolve().parents[1]
    if _app_source() != package:
        return package.parent
    app = scratch / "pilot-flwr"  # Flower checks this name
    ignored = shutil.ignore_patterns("__pycache__", "conf", "pyproject.toml")
    shutil.copytree(package, app / package.name, ignore=ignored)
    shutil.copytree(package / "conf", app / "conf")
    project = (package / "pyproject.toml").read_text(encoding="utf-8")
    # Flower rejects a pattern without matches, and the package lacks the excluded files.
    project = re.sub(r"^fab-exclude = \[[^]]*\]\n", "", project, flags=re.MULTILINE)
    (app / "pyproject.toml").write_text(project, encoding="utf-8")
    return app


def _app_source() -> Path:
    """Return the checkout or the installed package, whichever has the app's pyproject.toml."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent, package):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
            components = project["tool"]["flwr"]["app"]["components"]
            if components["serverapp"].startswith("pilot_flwr."):
                return folder
    raise RunError(
        f"Neither {package.parent} nor {package} contains a Flower app's pyproject.toml: "
        "reinstall pilot-flwr, or clone its repository and run `pip install -e .` there."
    )
