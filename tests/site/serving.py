"""Run ``pilot-flwr site serve`` as a process of its own."""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from pilot_flwr.site import service


def command(node):
    """Return the command that serves the site of a node config."""
    settings = " ".join(f'{key}="{value}"' for key, value in node.items())
    main = [sys.executable, "-m", "pilot_flwr.cli.main", "site", "serve"]
    return [*main, "--node-config", settings]


@contextmanager
def serving(node, log):
    """Run the service of a node config and write its log; yield its process."""
    Path(node["state-folder"]).mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(command(node), stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 60
        while not service.status(node["state-folder"]):
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def worker_of(process):
    """Return the worker of a service's process."""
    (worker,) = psutil.Process(process.pid).children()
    return worker
