"""Where a client is: what its node's own configuration says, never what the server says.

A simulated node has a ``partition-id``: it is the client with that number, and its private
folder is inside the run folder. A real site's ``--node-config`` gives ``client-id`` and
``state-folder`` and may give ``device``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from pilot_flwr.checks import check_name
from pilot_flwr.data.federation import Client, client_by_id, federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.run_folder import holds_token
from pilot_flwr.settings import PilotConfig
from pilot_flwr.submission import federation_config
from pilot_flwr.turn import Site

NodeConfig = Mapping[str, bool | float | int | str]


def find_site(
    node_config: NodeConfig, config: PilotConfig, *, run_name: str, run_folder: str, run_token: str
) -> Site:
    """Return who and where this client is.

    Parameters
    ----------
    node_config : mapping
        As Flower's context carries it.
    config : PilotConfig
        The run's configuration.
    run_name : str
        Name of the run, from the server; names a folder inside ``state-folder``.
    run_folder, run_token : str
        The run folder and what its token file holds; used by simulated clients only, and only
        if the token can be read there, which shows that the server is on this machine.

    Raises
    ------
    ConfigError
        The node's configuration is incomplete, or the simulation has another number of nodes
        than the configuration has clients.
    """
    check_name("run name", run_name)
    device = find_device(str(node_config.get("device", "auto")))
    client = _client(node_config, config)
    if node_config.get("state-folder"):
        folder = Path(str(node_config["state-folder"])).expanduser() / run_name
    elif "client-id" not in node_config and holds_token(Path(run_folder), run_token):
        folder = Path(run_folder) / "clients" / client.id
    else:
        raise ConfigError(
            f"`state-folder` is missing in the node config of client {client.id!r}; it must be "
            "a folder of this site for its private adapters."
        )
    return Site(client, folder, device)


def _client(node_config: NodeConfig, config: PilotConfig) -> Client:
    if "client-id" in node_config:
        return client_by_id(config.data, str(node_config["client-id"]))
    if "partition-id" not in node_config:
        raise ConfigError(
            "The node config has neither `client-id` (a real site) nor `partition-id` "
            "(a simulated node)."
        )
    _check_partitions(node_config, config)
    clients = federation_clients(config.data)
    number = int(node_config["partition-id"])
    if not 0 <= number < len(clients):
        raise ConfigError(f"`partition-id` is {number} but must be from 0 to {len(clients) - 1}.")
    return clients[number]


def _check_partitions(node_config: NodeConfig, config: PilotConfig) -> None:
    nodes = int(node_config.get("num-partitions", config.num_clients))
    if nodes != config.num_clients:
        fitting = federation_config(config.num_clients, config.simulation)
        raise ConfigError(
            f"This simulation has {nodes} SuperNodes but the configuration has "
            f"{config.num_clients} clients. Run `pilot-flwr run` with the same overrides, or "
            f'`flwr run . --federation-config "{fitting}"`.'
        )


def find_device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is a GPU if there is one.

    Raises
    ------
    ConfigError
        There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"`device` is {name!r} but must be auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"`device` is {name!r} but this machine has {torch.cuda.device_count()} GPUs."
        )
    return device
