"""An existing Ray cluster is looked at before a run: whether it answers and each node will do.

The look is `pilot_flwr.launching.cluster_survey`'s, in a process of its own with a time limit. What
a node lacks is said before any training, node by node: the run folder, data, packages.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pilot_flwr.data.files import simulated_path, simulated_paths
from pilot_flwr.errors import PilotError, RunError
from pilot_flwr.launching.cluster import ADDRESS_VARIABLE, Cluster, Node
from pilot_flwr.settings.pilot import PilotConfig
from pilot_flwr.wording import headline

PACKAGES = ("ray", "flwr", "torch", "transformers", "peft", "safetensors", "numpy", "hydra-core")
"""Of which every node must have the version that is here."""

CONNECT_SECONDS = 10.0
NODES_SECONDS = 90.0
SURVEY_SECONDS = 180.0

ANSWER = "pilot-flwr survey: "
"""What the survey's line starts with; Ray writes to the same stream."""


def prepare(config: PilotConfig, address: str, folder: Path) -> tuple[Cluster, str]:
    """Return the cluster for a run, and the value of ``flwr run --federation-config``.

    Parameters
    ----------
    config : PilotConfig
        The run's, every path absolute.
    address : str
        From `pilot_flwr.launching.cluster.address_of`.
    folder : Path
        The run folder; made if it is not there, and removed again if it is of no use.

    Raises
    ------
    RunError
        See `look_at`.
    ConfigError
        Not even one client fits.
    """
    try:
        found = look_at(address, folder, needed_paths(config))
        return found, found.federation_config(config.num_clients, config.simulation)
    except PilotError:
        with contextlib.suppress(OSError):  # not empty: a run that goes on
            folder.rmdir()
        raise


def look_at(address: str, folder: Path, paths: Sequence[str] = ()) -> Cluster:
    """Ask a cluster what it has, and whether every node can run clients of this run.

    Parameters
    ----------
    address : str
        From `address_of`.
    folder : Path
        The run folder; made if it is not there. Every node must see it and write in it.
    paths : sequence of str
        Absolute; must be there on every node.

    Raises
    ------
    RunError
        The cluster does not answer, has other versions of Ray or Python, or a node lacks
        something; all that is missing is named, node by node.
    """
    if address != "auto":
        _knock(address)
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    probe = folder / f".probe-{token}"
    request = {
        "address": address,
        "folder": str(folder),
        "probe": probe.name,
        "token": token,
        "paths": list(paths),
        "packages": PACKAGES,
        "seconds": NODES_SECONDS,
        "answer": ANSWER,
    }
    probe.write_text(token, encoding="utf-8")
    try:
        answer = _ask(address, request)
        complaints = [line for row in answer["nodes"] for line in _complaints(row, folder)]
    finally:
        for left in folder.glob(f"{probe.name}*"):
            left.unlink(missing_ok=True)
    if complaints:
        raise RunError(
            "The Ray cluster cannot run this simulation:\n"
            + "\n".join(f"- {line}" for line in complaints)
            + "\nWhat every machine of a cluster needs: docs/cluster.md."
        )
    nodes = tuple(Node(row["name"], row["cpus"], row["gpus"]) for row in answer["nodes"])
    return Cluster(answer["address"], nodes, answer["free"]["CPU"], answer["free"]["GPU"])


def needed_paths(config: PilotConfig) -> list[str]:
    """Return the absolute paths that the run's configuration names and clients read."""
    paths = [Path(config.model.path)] if os.path.isabs(config.model.path) else []
    if config.data.source == "llava":
        for task in config.data.tasks:
            paths += simulated_paths(config.data, task, "train")
            if config.evaluation.enabled:
                paths += simulated_paths(config.data, task, "test")
            key = f"data.files.{task}.images"
            paths.append(simulated_path(config.data, config.data.files[task].images, key))
    return sorted({str(path) for path in paths})


def _knock(address: str) -> None:
    """Raise unless something listens there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"The Ray cluster at {address} cannot be reached from here: {error}. Is its head "
            "running (`ray start --head --port ...`), and is the port open?"
        ) from None


def _ask(address: str, request: Mapping[str, Any]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-P",
        "-c",
        "from pilot_flwr.launching.cluster_survey import main; main()",
    ]
    environment = {k: v for k, v in os.environ.items() if k != ADDRESS_VARIABLE}
    try:
        done = subprocess.run(  # nosec B603  # no shell, our own program
            [*command, json.dumps(request)],
            cwd="/",
            env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SURVEY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunError(
            f"The Ray cluster at {address} did not answer within {SURVEY_SECONDS:.0f} s."
        ) from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    answer = json.loads(lines[-1].removeprefix(ANSWER)) if lines else {"error": done.stderr}
    if "error" in answer:
        raise RunError(
            f"The Ray cluster at {address} cannot be used from this machine. `pilot-flwr run` "
            "must run on one of the cluster's own machines, with its versions of Ray and Python. "
            f"Ray says: {' '.join(str(answer['error']).split()) or 'nothing'}"
        )
    assert isinstance(answer, dict)
    return answer


def _complaints(row: Mapping[str, Any], folder: Path) -> list[str]:
    """Say what a node lacks."""
    name, answer = row["name"], row["answer"]
    if answer is None:
        reason = f" Ray says: {headline(row['error'])}" if row["error"] else ""
        return [f"{name} did not answer within {NODES_SECONDS:.0f} s.{reason}"]
    lines = []
    for package, there in answer["versions"].items():
        if there != (here := version(package)):
            lines.append(f"{name} has {package} {there or 'not installed'}; here it is {here}.")
    if answer["folder"]:
        lines.append(
            f"{name} cannot use the run folder {str(folder)!r} ({answer['folder']}): `run.folder` "
            "must be on a file system that all machines share and may write to."
        )
    lines += [f"{name} has no {path!r}." for path in answer["missing"]]
    return lines
