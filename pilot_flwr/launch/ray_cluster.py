"""Run the simulation on an existing Ray cluster: find it, check its machines, connect Flower to it.

`simulation.address` names the cluster, else the environment variable ``RAY_ADDRESS``; without
either, or with ``local``, a run starts its own Ray on this machine. Flower's engine connects by
``RAY_ADDRESS`` and starts one actor per client that fits on each node, so a run uses the whole
cluster; only one client's share is configurable. Before a run `pilot_flwr.launch.ray_preflight`
checks the run folder, data and packages on every node, in a separate process with a time limit;
missing ones are reported per node. User documentation: docs/how-to/cluster.md.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pilot_flwr.config.schema import PilotConfig, SimulationConfig
from pilot_flwr.data.client_files import simulated_path, simulated_paths
from pilot_flwr.errors import ConfigError, PilotError, RunError
from pilot_flwr.formatting import count, headline
from pilot_flwr.launch.processes import MARK_VARIABLE

ADDRESS_VARIABLE = "RAY_ADDRESS"

HOME = ".flower"
"""Flower's folder in the run folder: the nodes import the app from the bundle in it."""

FORWARDED = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM",
)
"""Environment variables forwarded from the user's shell to the clients on every node."""

PACKAGES = ("ray", "flwr", "torch", "transformers", "peft", "safetensors", "numpy", "hydra-core")
"""Packages that every node must have in the version installed here."""

CONNECT_SECONDS = 10.0
NODES_SECONDS = 90.0
PREFLIGHT_SECONDS = 180.0

ANSWER = "pilot-flwr preflight: "
"""Prefix of the preflight's answer: Ray writes to the same stream."""

_HOST_PORT = re.compile(r"[^\s/:]+:\d{1,5}|\[[0-9A-Fa-f:.]+\]:\d{1,5}")


@dataclass(frozen=True)
class Node:
    """A cluster machine: name with address, and the CPUs and GPUs that Ray manages on it."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """An existing Ray cluster: its head's ``HOST:PORT``, its live nodes, and its idle resources."""

    address: str
    nodes: tuple[Node, ...]
    free_cpus: float
    free_gpus: float

    def client_gpus(self, simulation: SimulationConfig) -> float:
        """Return one client's GPUs: as set, or one if a node has any."""
        if simulation.client_gpus != -1:
            return float(simulation.client_gpus)
        return float(any(node.gpus >= 1 for node in self.nodes))

    def clients_at_a_time(self, simulation: SimulationConfig) -> int:
        """Return the number of clients that fit, node by node as Flower counts them."""
        gpus = self.client_gpus(simulation)
        return sum(
            min(
                int(node.cpus / simulation.client_cpus),
                int(node.gpus / gpus) if gpus else sys.maxsize,
            )
            for node in self.nodes
        )

    def federation_config(self, num_clients: int, simulation: SimulationConfig) -> str:
        """Return the value of ``flwr run --federation-config``.

        It sets no limits for the whole simulation, since Ray rejects them on an existing cluster. A
        cluster without room for one client is an error: Flower would report that run as completed.
        """
        gpus = self.client_gpus(simulation)
        if not self.clients_at_a_time(simulation):
            offers = "; ".join(f"{node.name}: {_resources(node)}" for node in self.nodes)
            raise ConfigError(
                f"No machine of the Ray cluster has `simulation.client_cpus` = "
                f"{simulation.client_cpus} and `simulation.client_gpus` = {gpus:g} for even one "
                f"client. It has {offers}."
            )
        return (
            f"num-supernodes={num_clients} "
            f"client-resources-num-cpus={simulation.client_cpus} "
            f"client-resources-num-gpus={gpus!r}"
        )

    def describe(self, simulation: SimulationConfig) -> str:
        """Describe the cluster's resources, and their use by other jobs, in one or two lines."""
        cpus, gpus = (sum(getattr(n, what) for n in self.nodes) for what in ("cpus", "gpus"))
        fitting = count(self.clients_at_a_time(simulation), "client")
        line = f"Ray cluster {self.address}: {count(len(self.nodes), 'machine')}, CPUs {cpus:g}, "
        line += f"GPUs {gpus:g}; room for {fitting} at a time."
        if self.free_cpus < cpus or self.free_gpus < gpus:
            line += (
                f"\nOther jobs use the cluster: {self.free_cpus:g} of {cpus:g} CPUs and "
                f"{self.free_gpus:g} of {gpus:g} GPUs are free. Flower plans with all of them; "
                "clients placed on occupied ones wait until those jobs end."
            )
        return line


def address_of(simulation: SimulationConfig, environment: Mapping[str, str]) -> str:
    """Return the address of the cluster to use, perhaps ``auto``; empty to start a local Ray.

    Raises `ConfigError` for `simulation.cpus` and `simulation.gpus`, which cannot limit a cluster.
    """
    name = "simulation.address" if simulation.address else ADDRESS_VARIABLE
    address = simulation.address or environment.get(ADDRESS_VARIABLE, "").strip()
    if address in ("", "local"):
        return ""
    if address != "auto" and not _HOST_PORT.fullmatch(address):
        raise ConfigError(
            f"`{name}` is {address!r} but must be HOST:PORT of the Ray cluster's head, auto "
            "(the cluster of this machine) or local (start a Ray for this run)."
        )
    for setting, value, default in (("cpus", simulation.cpus, 0), ("gpus", simulation.gpus, -1)):
        if value != default:
            raise ConfigError(
                f"`simulation.{setting}` is {value} but must be left at {default} with "
                f"`{name}`={address}: a run uses the whole cluster. How many clients "
                "train at a time follows from `simulation.client_cpus` and "
                "`simulation.client_gpus`."
            )
    return address


@contextmanager
def flower_home(folder: Path) -> Iterator[None]:
    """Remove Flower's folder from the run folder on exit."""
    try:
        yield
    finally:
        shutil.rmtree(folder / HOME, ignore_errors=True)


def ray_environment(
    address: str, folder: Path, mark: str, base: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment variables that connect Flower's processes to a cluster.

    Flower's folder, with the app bundle, is in the run folder so that every node runs this app and
    not an installed one. `mark` marks the actors on this machine; Ray ends them with the job.
    """
    actors = {name: base[name] for name in FORWARDED if name in base}
    actors |= {MARK_VARIABLE: mark, "FLWR_TELEMETRY_ENABLED": "0"}
    job = {"runtime_env": {"env_vars": actors}, "metadata": {"name": "pilot-flwr"}}
    return {
        ADDRESS_VARIABLE: address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job),  # merged with what Flower gives to Ray
        "FLWR_HOME": str(folder / HOME),
    }


def _resources(node: Node) -> str:
    return f"CPUs {node.cpus:g}, GPUs {node.gpus:g}"


def check_cluster(config: PilotConfig, address: str, folder: Path) -> tuple[Cluster, str]:
    """Check a cluster for a run; return it and the value of ``flwr run --federation-config``.

    The run folder is created if missing; if a check fails, it is removed again unless it has files.
    """
    try:
        found = inspect_cluster(address, folder, needed_paths(config))
        return found, found.federation_config(config.num_clients, config.simulation)
    except PilotError:
        with contextlib.suppress(OSError):  # not empty: a resumed run
            folder.rmdir()
        raise


def inspect_cluster(address: str, folder: Path, paths: Sequence[str] = ()) -> Cluster:
    """Query a cluster's resources and check that every node can run this run's clients.

    Every node must be able to write to the run folder, which is created if missing, and must have
    the absolute `paths` and the local versions of `PACKAGES`.
    """
    if address != "auto":
        _check_reachable(address)
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
        complaints = [line for row in answer["nodes"] for line in _missing(row, folder)]
    finally:
        for left in folder.glob(f"{probe.name}*"):
            left.unlink(missing_ok=True)
    if complaints:
        raise RunError(
            "The Ray cluster cannot run this simulation:\n"
            + "\n".join(f"- {line}" for line in complaints)
            + "\nRequirements for every machine of a cluster: docs/how-to/cluster.md."
        )
    nodes = tuple(Node(row["name"], row["cpus"], row["gpus"]) for row in answer["nodes"])
    return Cluster(answer["address"], nodes, answer["free"]["CPU"], answer["free"]["GPU"])


def needed_paths(config: PilotConfig) -> list[str]:
    """Return the absolute paths in the configuration that clients read."""
    paths = [Path(config.model.path)] if os.path.isabs(config.model.path) else []
    if config.data.source == "llava":
        for task in config.data.tasks:
            paths += simulated_paths(config.data, task, "train")
            if config.evaluation.enabled:
                paths += simulated_paths(config.data, task, "test")
            key = f"data.files.{task}.images"
            paths.append(simulated_path(config.data, config.data.files[task].images, key))
    return sorted({str(path) for path in paths})


def _check_reachable(address: str) -> None:
    """Raise `RunError` unless the port accepts connections; Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"The Ray cluster at {address} cannot be reached from here: {error}. Is its head "
            "running (`ray start --head --port ...`), and is the port open?"
        ) from None


def _ask(address: str, request: Mapping[str, Any]) -> dict[str, Any]:
    program = "from pilot_flwr.launch.ray_preflight import main; main()"
    environment = {k: v for k, v in os.environ.items() if k != ADDRESS_VARIABLE}
    try:
        done = subprocess.run(  # nosec B603  # no shell; this package's code
            [sys.executable, "-P", "-c", program, json.dumps(request)],
            cwd="/",
            env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PREFLIGHT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunError(
            f"The Ray cluster at {address} did not answer within {PREFLIGHT_SECONDS:.0f} s."
        ) from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    answer = json.loads(lines[-1].removeprefix(ANSWER)) if lines else {"error": done.stderr}
    if "error" in answer:
        raise RunError(
            f"The Ray cluster at {address} cannot be used from this machine. `pilot-flwr run` "
            "must run on one of the cluster's own machines, with its versions of Ray and Python. "
            f"Ray reports: {' '.join(str(answer['error']).split()) or 'nothing'}"
        )
    assert isinstance(answer, dict)
    return answer


def _missing(row: Mapping[str, Any], folder: Path) -> list[str]:
    """List what a node lacks."""
    name, answer = row["name"], row["answer"]
    if answer is None:
        reason = f" Ray reports: {headline(row['error'])}" if row["error"] else ""
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
