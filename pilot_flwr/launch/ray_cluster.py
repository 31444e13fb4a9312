"""Run the simulation on an existing Ray cluster: check its machines and connect Flower to it.

`simulation.address` names the cluster, else the environment variable ``RAY_ADDRESS``; without
either, or with ``local``, a run starts its own Ray on this machine. Flower's engine starts one
actor per client that fits on each node, so a run uses the whole cluster; only one client's share
is configurable. A preflight checks the run folder, data and packages on every node and reports
what is missing, per node. It runs in its own process (`main`), because Ray can terminate the
process that connects to it or block it for minutes. User documentation: docs/how-to/cluster.md.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pilot_flwr.config.overrides import gpus_per_client
from pilot_flwr.config.schema import PilotConfig, SimulationConfig
from pilot_flwr.data.client_files import simulated_paths
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
        """Return one client's GPUs: as set, or one per process if a node has any."""
        return gpus_per_client(simulation, max(node.gpus for node in self.nodes))

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
            offers = "; ".join(f"{n.name}: CPUs {n.cpus:g}, GPUs {n.gpus:g}" for n in self.nodes)
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
        cpus = sum(node.cpus for node in self.nodes)
        gpus = sum(node.gpus for node in self.nodes)
        line = (
            f"Ray cluster {self.address}: {count(len(self.nodes), 'machine')}, CPUs {cpus:g}, "
            f"GPUs {gpus:g}; room for {count(self.clients_at_a_time(simulation), 'client')} at a "
            "time."
        )
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
                f"`{name}`={address}: a run uses the whole cluster. `simulation.client_cpus` and "
                "`simulation.client_gpus` determine how many clients train at a time."
            )
    return address


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
    }
    probe.write_text(token, encoding="utf-8")
    try:
        answer = _ask(address, request)
    finally:
        for left in folder.glob(f"{probe.name}*"):
            left.unlink(missing_ok=True)
    if problems := [line for row in answer["nodes"] for line in _problems(row, folder)]:
        raise RunError(
            "The Ray cluster cannot run this simulation:\n"
            + "\n".join(f"- {line}" for line in problems)
            + "\nRequirements for every machine of a cluster: docs/how-to/cluster.md."
        )
    nodes = tuple(Node(row["name"], row["cpus"], row["gpus"]) for row in answer["nodes"])
    return Cluster(answer["address"], nodes, answer["free"]["CPU"], answer["free"]["GPU"])


def needed_paths(config: PilotConfig) -> list[str]:
    """Return the absolute paths in the configuration that clients read."""
    paths = [Path(config.model.path)] if os.path.isabs(config.model.path) else []
    if config.data.source == "llava":
        evaluated = config.evaluation.enabled
        paths += simulated_paths(config.data, ["train", "test"] if evaluated else ["train"])
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
    """Run the preflight in its own process."""
    program = "from pilot_flwr.launch.ray_cluster import main; main()"
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


def _problems(row: Mapping[str, Any], folder: Path) -> list[str]:
    """List what a node lacks."""
    name, answer = row["name"], row["answer"]
    if answer is None:
        reason = f" Ray reports: {headline(row['error'])}" if row["error"] else ""
        return [f"{name} did not answer within {NODES_SECONDS:.0f} s.{reason}"]
    lines = [
        f"{name} has {package} {there or 'not installed'}; here it is {here}."
        for package, there in answer["versions"].items()
        if there != (here := version(package))
    ]
    if answer["folder"]:
        lines.append(
            f"{name} cannot use the run folder {str(folder)!r} ({answer['folder']}): `run.folder` "
            "must be on a file system that all machines share and may write to."
        )
    return lines + [f"{name} has no {path!r}." for path in answer["missing"]]


def main() -> None:
    """Run the preflight that the first argument requests; print its answer as a line of JSON."""
    answer: dict[str, Any]
    try:
        answer = _preflight(json.loads(sys.argv[1]))
    except Exception as error:  # Ray raises its own types and Python's
        answer = {"error": str(error) or type(error).__name__}
    print(ANSWER + json.dumps(answer), flush=True)


def _preflight(request: Mapping[str, Any]) -> dict[str, Any]:
    import ray

    # The path that Flower's simulation engine will give to the clients' processes.
    path = os.pathsep.join(filter(None, sys.path))
    ray.init(
        request["address"],
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        log_to_driver=False,
        logging_level="ERROR",
    )
    nodes = _ask_nodes(request)
    free = ray.available_resources()
    return {
        "address": ray.get_runtime_context().gcs_address,
        "nodes": nodes,
        "free": {name: float(free.get(name, 0)) for name in ("CPU", "GPU")},
    }


def _ask_nodes(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Query every node, and wait for those that Ray considers alive.

    Ray detects a dead node after about 30 seconds. Flower would wait for clients on it forever, so
    this check waits longer than that.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    answers: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    pending: dict[str, Any] = {}
    check = _remote_check()
    deadline = time.monotonic() + NODES_SECONDS
    while True:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for identity in nodes.keys() - answers.keys() - pending.keys():
            placement = NodeAffinitySchedulingStrategy(identity, soft=False)
            pending[identity] = check.options(scheduling_strategy=placement).remote(
                request, identity
            )
        for identity in list(pending):
            if not ray.wait([pending[identity]], timeout=0)[0]:
                continue
            try:
                answers[identity] = ray.get(pending.pop(identity))
            except ray.exceptions.RayError as error:  # retried while the node is alive
                errors[identity] = str(error).strip()
        if nodes.keys() <= answers.keys() or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return [
        {
            "name": f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            "cpus": float(node["Resources"].get("CPU", 0)),
            "gpus": float(node["Resources"].get("GPU", 0)),
            "answer": answers.get(identity),
            "error": errors.get(identity, ""),
        }
        for identity, node in sorted(nodes.items())
    ]


def _remote_check() -> Any:
    """Return the remote task, an inner function: Ray ships its code, so nodes do not need it."""
    import ray

    def check(request: dict[str, Any], identity: str) -> dict[str, Any]:
        from importlib.metadata import PackageNotFoundError, version
        from pathlib import Path

        versions: dict[str, str] = {}
        for package in request["packages"]:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = ""
        folder = Path(request["folder"])
        problem = ""
        try:
            if (folder / request["probe"]).read_text(encoding="utf-8") != request["token"]:
                problem = "a different folder there"
            else:
                trial = folder / f"{request['probe']}-{identity}"
                trial.write_text("", encoding="utf-8")
                trial.unlink()
        except OSError as error:
            problem = error.strerror or type(error).__name__
        missing = [path for path in request["paths"] if not Path(path).exists()]
        return {"versions": versions, "folder": problem, "missing": missing}

    return ray.remote(num_cpus=0, max_retries=0)(check)
