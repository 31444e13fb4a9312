"""The simulation on an existing Ray cluster: which one, what it offers, how Flower gets there.

`simulation.address` names the cluster, else the environment variable ``RAY_ADDRESS``; without
either, or with ``local``, a run starts a Ray of its own on this machine. Flower's engine connects
by ``RAY_ADDRESS`` and makes one actor per client that fits on each node, so that a cluster is
used whole; only one client's part is configurable. docs/cluster.md is the user's page.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pilot_flwr.errors import ConfigError
from pilot_flwr.launching.processes import MARK_VARIABLE
from pilot_flwr.settings.pilot import SimulationConfig
from pilot_flwr.wording import count

ADDRESS_VARIABLE = "RAY_ADDRESS"
HOME = ".flower"
"""Flower's folder inside the run folder: the nodes import the app from the bundle in it."""

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
"""Environment variables of the user's shell that the clients on every node get."""

_HOST_PORT = re.compile(r"[^\s/:]+:\d{1,5}|\[[0-9A-Fa-f:.]+\]:\d{1,5}")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its name and address, CPUs and GPUs that Ray shares out there."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """An existing Ray cluster, as it answered.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of its head.
    nodes : tuple of Node
        Those alive.
    free_cpus, free_gpus : float
        What no other job of the cluster uses at this moment.
    """

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

        Ray refuses limits for all of a simulation on a cluster that exists, so there are none.

        Raises
        ------
        ConfigError
            Not even one client fits: Flower would call that run completed.
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
        """Say in a line or two what the cluster offers, and whether others use it too."""
        cpus, gpus = (sum(getattr(n, what) for n in self.nodes) for what in ("cpus", "gpus"))
        fitting = count(self.clients_at_a_time(simulation), "client")
        line = f"Ray cluster {self.address}: {count(len(self.nodes), 'machine')}, CPUs {cpus:g}, "
        line += f"GPUs {gpus:g}; room for {fitting} at a time."
        if self.free_cpus < cpus or self.free_gpus < gpus:
            line += (
                f"\nOther jobs use the cluster: {self.free_cpus:g} of {cpus:g} CPUs and "
                f"{self.free_gpus:g} of {gpus:g} GPUs are free. Flower counts on all of them, and "
                "clients that it places on the others wait until those jobs end."
            )
        return line


def address_of(simulation: SimulationConfig, environment: Mapping[str, str]) -> str:
    """Return the address of the cluster to use, ``auto`` included; empty for a Ray of our own.

    Raises
    ------
    ConfigError
        The address has another form, or `simulation.cpus` or `simulation.gpus` would limit a
        cluster that exists.
    """
    name = "simulation.address" if simulation.address else ADDRESS_VARIABLE
    address = simulation.address or environment.get(ADDRESS_VARIABLE, "").strip()
    if address in ("", "local"):
        return ""
    if address != "auto" and not _HOST_PORT.fullmatch(address):
        raise ConfigError(
            f"`{name}` is {address!r} but must be HOST:PORT of the Ray cluster's head, auto "
            "(the cluster that this machine is a node of) or local (a Ray of this run's own)."
        )
    for setting, value, default in (("cpus", simulation.cpus, 0), ("gpus", simulation.gpus, -1)):
        if value != default:
            raise ConfigError(
                f"`simulation.{setting}` is {value} but must be left at {default} with "
                f"`{name}`={address}: an existing Ray cluster is used whole. How many clients "
                "train at a time follows from `simulation.client_cpus` and "
                "`simulation.client_gpus`."
            )
    return address


@contextmanager
def flower_home(folder: Path) -> Iterator[None]:
    """Remove Flower's folder from the run folder at the end."""
    try:
        yield
    finally:
        shutil.rmtree(folder / HOME, ignore_errors=True)


def ray_environment(
    address: str, folder: Path, mark: str, base: Mapping[str, str]
) -> dict[str, str]:
    """Return what makes Flower's processes use a cluster instead of a Ray of their own.

    Parameters
    ----------
    address : str
        ``HOST:PORT``.
    folder : Path
        The run folder; Flower's own folder, with the app's bundle, goes into it so that every
        node runs this app and not what is installed there.
    mark : str
        The launch's, for its actors on this machine; Ray itself ends all of them with the job.
    base : mapping
        The user's environment, of which `FORWARDED` goes to the actors.
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
