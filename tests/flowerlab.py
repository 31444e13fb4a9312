"""Stand-ins for the launcher's tests: tiny Flower apps, and scripts in place of Flower's programs.

`write_app` writes a real app of thirty lines that keeps the run folder's contract and fails on
demand. `pretend_flower` replaces Flower's programs, so that the launcher's reaction to the death of
one of them is tested in a second and without Ray.
"""

import os
import shutil
import stat
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from pilot_flwr.launch import flower_cli

PYPROJECT = """
[project]
name = "lab"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lab"

[tool.flwr.app.components]
serverapp = "labapp.apps:server"
clientapp = "labapp.apps:client"

[tool.flwr.app.config]
overrides = ""
"""

APP = """
import json, os, shlex, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import ClientFailed, RosterCalled, RosterEntry, Trained

MODE = "{mode}"
server = ServerApp()
client = ClientApp()


@client.train()
def train(message, context):
    part = context.node_config["partition-id"]
    if MODE == "client raises" and part == 1:
        raise ValueError("the client is not amused")
    if MODE == "client exits" and part == 1:
        os._exit(3)
    if MODE == "slow":
        time.sleep(300)
    return Message(RecordDict({{"c": ConfigRecord({{"part": part}})}}), reply_to=message)


@server.main()
def main(grid, context):
    words = shlex.split(context.run_config["overrides"])
    folder = Path(dict(word.split("=", 1) for word in words)["run.folder"])
    run = RunFolder(folder)
    if MODE == "server raises":
        raise RuntimeError("the server gave up")
    if MODE == "server exits":
        os._exit(9)
    while len(ids := sorted(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    entries = tuple(RosterEntry(name, "vqa", examples=4, stage=1) for name in ("c0", "c1"))
    run.record(RosterCalled(exchange=1, clients=entries))
    messages = [Message(RecordDict(), i, "train", group_id="1") for i in ids]
    failures = []
    for reply in grid.send_and_receive(messages, timeout=280):
        if reply.has_error():
            reason = reply.error.reason
            failures.append(dict(round=1, phase="train", client="c1", reason=reason))
            run.record(ClientFailed(exchange=1, phase="train", client="c1", reason=reason))
        else:
            name = "c" + str(reply.content["c"]["part"])
            run.record(
                Trained(
                    exchange=1, stage=1, client=name, task="vqa", losses={{"total": 1.0}},
                    examples=4, steps=1, seconds=0.1,
                    gradients={{}}, bytes_down=0, bytes_up=0, up={{}},
                )
            )
    status = "failed" if failures else "completed"
    result = dict(status=status, error=None, failures=failures, scores={{}})
    (folder / "summary.md").write_text("| task | score |\\n|---|---|\\n| vqa | 0.5 |\\n")
    (folder / "result.json").write_text(json.dumps(result))
"""


def write_app(folder: Path, mode: str) -> Path:
    """Write a Flower app whose clients or server fail as `mode` says."""
    package = folder / "labapp"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    (package / "apps.py").write_text(APP.format(mode=mode))
    return folder


@contextmanager
def nothing_left(monkeypatch, patience: float = 0.0):
    """Check that the block leaves no process and no temporary file."""
    base = Path(tempfile.mkdtemp(prefix="t", dir="/tmp")).resolve()
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    try:
        yield base
        deadline = time.monotonic() + patience
        while (left := leftovers(base)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
    finally:
        shutil.rmtree(base, ignore_errors=True)


def leftovers(base: Path) -> list[str]:
    """Name the files below `base` and the processes that work in it or have it as ``FLWR_HOME``."""
    left = [str(path) for path in base.iterdir()]
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            inside = process.cwd().startswith(f"{base}/")
            if inside or f"{base}/" in process.environ().get("FLWR_HOME", ""):
                left.append(f"{process.pid} {process.cmdline()}")
        except (psutil.Error, OSError):
            continue
    return left


SUPERLINK = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
{simulation}
print("superlink says hello", flush=True)
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.timeout = {lifetime}
import threading, os
threading.Timer({lifetime}, lambda: os._exit(7)).start()
server.serve_forever()
"""

SIMULATION = 'subprocess.Popen([sys.executable, __file__.replace("flower-superlink", "{name}")])'

FLWR = """
import json, sys, time
command = sys.argv[1]
if command == "log":
    print("flower says hello", flush=True)
    time.sleep({log_seconds})
elif command == "run":
    print({run!r})
elif command == "list":
    print({list!r})
"""


def pretend_flower(folder: Path, monkeypatch, **kinds) -> None:
    """Replace Flower's programs.

    Parameters
    ----------
    folder : Path
        Where to put the scripts.
    monkeypatch : pytest.MonkeyPatch
        Points the launcher at them.
    **kinds
        `lifetime` of the SuperLink and `simulation_seconds` (None: there is none), both in
        seconds; `log_seconds`; the text that ``flwr run`` and ``flwr list`` print as `run`, `list`.
    """
    seconds = kinds.pop("simulation_seconds", 60)
    name = "flwr-simulation"
    values = {
        "lifetime": 60,
        "log_seconds": 60,
        "run": '{"success": true, "run-id": "7"}',
        "list": '{"success": true, "runs": [{"status": "running", "status-details": "N/A"}]}',
        "simulation": "" if seconds is None else SIMULATION.format(name=name),
        **kinds,
    }
    _script(folder / "flower-superlink", SUPERLINK.format(**values))
    _script(folder / "flwr", FLWR.format(**values))
    _script(folder / name, f"import time\ntime.sleep({seconds or 0})\n")
    monkeypatch.setattr(flower_cli, "flower_program", lambda name: folder / name)


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
