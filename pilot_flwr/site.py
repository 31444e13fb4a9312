"""Where a client is: what its node's own configuration says, never what the server says.

A simulated node has a ``partition-id`` and ``num-partitions``: it is the client with that number,
and its private folder is inside the run folder, and its files are those that the run's
configuration names. A real site's ``--node-config`` gives ``client-id`` and ``state-folder``, the
site's data as ``train-file``, ``test-file`` and ``image-folder``, and may give ``device`` and
``model-path``. No path of the run's configuration is ever opened there.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pilot_flwr.checks import NAME_PATTERN, check_name, expanded
from pilot_flwr.data.federation import Client, SiteFiles, client_by_id, federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.kit import Site
from pilot_flwr.model_settings import ModelConfig
from pilot_flwr.run_folder import holds_token
from pilot_flwr.settings import PilotConfig
from pilot_flwr.shipped import checkpoint_path
from pilot_flwr.submission import federation_config

NodeConfig = Mapping[str, bool | float | int | str]

FILE_SEPARATOR = ";"
"""Between the files of ``train-file`` and of ``test-file``."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


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
    simulated = is_simulated(node_config, run_folder, run_token)
    if node_config.get("state-folder"):
        folder = expanded("state-folder", str(node_config["state-folder"])) / run_name
    elif simulated:
        folder = Path(run_folder) / "clients" / client.id
    else:
        raise ConfigError(
            f"`state-folder` is missing in the node config of client {client.id!r}; it must be "
            "a folder of this site for its private adapters."
        )
    files = None
    if config.data.source == "llava" and not simulated:
        files = site_files(node_config, client)
    return Site(client, folder, device, files)


def is_simulated(node_config: NodeConfig, run_folder: str, run_token: str) -> bool:
    """Return whether the run's configuration may name files here.

    That takes a node as Flower's simulation engine makes it, with ``partition-id`` and
    ``num-partitions`` and without a ``client-id``, which can read the run folder's token: only
    then server and client are on one machine, started together. At any other node not even the
    token is looked for.
    """
    engines = {"partition-id", "num-partitions"} <= node_config.keys()
    own = "client-id" in node_config
    return engines and not own and holds_token(Path(run_folder), run_token)


def site_model(node_config: NodeConfig, model: ModelConfig, *, simulated: bool) -> ModelConfig:
    """Return the base model's settings as they hold at this client.

    Parameters
    ----------
    node_config : mapping
        Its ``model-path``, if any, is the folder of the base model at this site.
    model : ModelConfig
        The run's.
    simulated : bool
        What `is_simulated` says; if so, `model.path` may be a folder.

    Raises
    ------
    ConfigError
        At a real site, ``model-path`` is no folder, or there is none and `model.path` is
        something else than a shipped name or a hub id.

    Notes
    -----
    What `model.path` names is decided by its letters alone. One look at the disk is left: for a
    hub id transformers prefers a folder ``organisation/name`` where the client stands, so it is
    refused if there is one. The error does not repeat `model.path`: beside a path that
    an error never has, it would tell the server whether it has guessed one.
    """
    if simulated:
        return model
    if node_config.get("model-path"):
        path = _path(node_config, "model-path", str(node_config["model-path"]))
        if not path.is_dir():
            raise ConfigError(f"`model-path` names {path.name!r}, which is no folder.")
        return replace(model, path=str(path))
    if NAME_PATTERN.fullmatch(model.path) and checkpoint_path(model.path) != model.path:
        return model
    if not _HUB_ID.fullmatch(model.path) or Path(model.path).exists():
        raise ConfigError(
            "`model.path` of the run must be a shipped name or a hub id (organisation/name) at a "
            "real site; a folder of the site is named by `model-path` in its node config."
        )
    return model


def site_files(node_config: NodeConfig, client: Client) -> SiteFiles:
    """Return a real site's data files.

    Raises
    ------
    ConfigError
        ``train-file`` is missing, a path is relative, or nothing is there.
    """
    if not node_config.get("train-file"):
        raise ConfigError(
            f"`train-file` is missing in the node config of client {client.id!r}; it must be "
            "this site's training data, LLaVA JSON or JSONL."
        )
    split = {}
    for key in ("train-file", "test-file"):
        names = str(node_config.get(key, "")).split(FILE_SEPARATOR)
        split[key] = tuple(_path(node_config, key, name) for name in names if name.strip())
        for path in split[key]:
            if not path.is_file():
                raise ConfigError(f"`{key}` names {path.name!r}, which is no file.")
    images = None
    if node_config.get("image-folder"):
        images = _path(node_config, "image-folder", str(node_config["image-folder"]))
        if not images.is_dir():
            raise ConfigError(f"`image-folder` names {images.name!r}, which is no folder.")
    return SiteFiles(split["train-file"], split["test-file"], images)


def _path(node_config: NodeConfig, key: str, name: str) -> Path:
    """Return a path of the node config; errors go to the server and have its last part only."""
    path = expanded(key, name.strip())
    if not path.is_absolute():
        raise ConfigError(f"`{key}` names {path.name!r} but must be an absolute path.")
    return path


def private_paths(node_config: NodeConfig) -> dict[str, str]:
    """Return what no error may tell the server: this site's paths, and what to write instead.

    Parameters
    ----------
    node_config : mapping
        Every value that is a path counts, each file of ``train-file`` for itself: as it is
        written, with ``~`` expanded, and with links resolved.

    Returns
    -------
    dict
        Path → ``<key>``; also the folders that files are in, and the home folder.
    """
    named: dict[str, str] = {}
    for key, value in node_config.items():
        for name in str(value).split(FILE_SEPARATOR) if isinstance(value, str) else ():
            for form in _forms(name.strip()):
                named[form] = f"<{key}>"
                if key.endswith("-file"):
                    named.setdefault(str(Path(form).parent), f"<folder of {key}>")
    for form in _forms("~"):
        named.setdefault(form, "<home>")
    return {path: key for path, key in named.items() if len(path) > 1}


def _forms(name: str) -> set[str]:
    """Return the spellings of a path; none for what is no path."""
    if "/" not in name and not name.startswith("~"):
        return set()
    forms = {name}
    try:
        path = Path(name).expanduser()
        forms |= {str(path), os.path.abspath(path), str(path.resolve())}
    except (OSError, RuntimeError, ValueError):  # no such user, a loop of links, a null byte
        pass
    return {form.rstrip("/") for form in forms} - {"", "~", "."}


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
