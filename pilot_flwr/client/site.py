"""Who and where a client is: by what this node says, never what the server says.

A simulated node has a ``partition-id`` and ``num-partitions``: it is the client with that number,
and its private folder is inside the run folder, and its files are those that the run's
configuration names. A real site's ``--node-config`` (`pilot_flwr.client.node_config`) gives
``client-id`` and ``state-folder``, the site's data as ``train-file``, ``test-file`` and
``image-folder``, and may give ``task``, ``device``, ``model-path`` and ``micro-batch``. No path of
the run's configuration is ever opened there.
"""

import re
from dataclasses import replace
from pathlib import Path

from pilot_flwr.checks import LONGEST_NAME, NAME_PATTERN, check_name
from pilot_flwr.client.kit import Site
from pilot_flwr.client.node_config import NodeConfig, NodeSettings, find_device, is_engines
from pilot_flwr.data.federation import Client, SiteFiles, federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.model.shipped import checkpoint_path
from pilot_flwr.settings.model import ModelConfig
from pilot_flwr.settings.pilot import PilotConfig
from pilot_flwr.storage.run_folder import holds_token
from pilot_flwr.submission import federation_config

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")

UNSHARED = (
    " If this is a simulation, its clients use the run folder, and the one that the server wrote "
    "cannot be read here: on a Ray cluster of several machines `run.folder` must be on a file "
    "system that all of them share."
)


def find_site(
    node: NodeSettings,
    config: PilotConfig,
    *,
    run_name: str,
    run_folder: str,
    simulated: bool,
) -> Site:
    """Return who and where this client is; no file is looked at.

    Parameters
    ----------
    node : NodeSettings
        This node's.
    config : PilotConfig
        The run's configuration.
    run_name : str
        Name of the run, from the server; names a folder inside ``state-folder``.
    run_folder : str
        The run folder; used by simulated clients only.
    simulated : bool
        What `is_simulated` says.

    Raises
    ------
    ConfigError
        The node's configuration is incomplete or contradicts itself or the run's, or the
        simulation has another number of nodes than the configuration has clients.
    """
    check_name("run name", run_name, longest=2 * LONGEST_NAME)  # with Flower's own id of the run
    device = find_device(node.device)
    client = site_client(node, config)
    if node.state_folder is not None:
        folder = node.state_folder / run_name
    elif simulated:
        folder = Path(run_folder) / "clients" / client.id
    else:
        engines = node.num_partitions is not None and not node.client_id
        raise ConfigError(
            f"`state-folder` is missing in the node config of client {client.id!r}; it must be "
            "a folder of this site for its private adapters." + (UNSHARED if engines else "")
        )
    files = None
    if config.data.source == "llava" and not simulated:
        files = site_files(node, client)
    return Site(client, folder, device, files, run_name, node.demands)


def is_simulated(node_config: NodeConfig, run_folder: str, run_token: str) -> bool:
    """Return whether the run's configuration may name files here.

    That takes a node as Flower's simulation engine makes it, with ``partition-id`` and
    ``num-partitions`` and without a ``client-id``, which can read the run folder's token: only
    then server and client are on one machine, started together. At any other node not even the
    token is looked for.
    """
    return is_engines(node_config) and holds_token(Path(run_folder), run_token)


def site_config(node: NodeSettings, config: PilotConfig, *, simulated: bool) -> PilotConfig:
    """Return the run's configuration as it holds at this client.

    Raises
    ------
    ConfigError
        See `site_model`; or ``micro-batch`` does not divide the examples of an optimizer step;
        or the run is to be trained on pooled data; or its `privacy` is less than this site demands.
    """
    node.demands.check(config.privacy)
    if config.strategy.trained_by == "pooled" and not simulated:
        raise ConfigError(
            "`strategy.trained_by` is 'pooled', which takes the data of all clients to one place: "
            "only a simulation can do that, no real site."
        )
    config = replace(config, model=site_model(node, config.model, simulated=simulated))
    if not node.micro_batch:
        return config
    train, size = config.train, node.micro_batch
    per_step = train.batch_size * train.accumulation_steps
    if per_step % size:
        possible = ", ".join(str(n) for n in range(1, per_step + 1) if per_step % n == 0)
        raise ConfigError(
            f"`micro-batch` is {size} but must divide the {per_step} examples of an optimizer "
            f"step of the run: {possible}."
        )
    return replace(
        config,
        train=replace(train, batch_size=size, accumulation_steps=per_step // size),
        evaluation=replace(config.evaluation, batch_size=min(config.evaluation.batch_size, size)),
    )


def site_model(node: NodeSettings, model: ModelConfig, *, simulated: bool) -> ModelConfig:
    """Return the base model's settings as they hold at this client.

    Parameters
    ----------
    node : NodeSettings
        Its `model_path`, if any, is the folder of the base model at this site.
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
    if node.model_path is not None:
        if not node.model_path.is_dir():
            raise ConfigError(f"`model-path` names {str(node.model_path)!r}, which is no folder.")
        return replace(model, path=str(node.model_path))
    if NAME_PATTERN.fullmatch(model.path) and checkpoint_path(model.path) != model.path:
        return model
    if not _HUB_ID.fullmatch(model.path) or Path(model.path).exists():
        raise ConfigError(
            "`model.path` of the run must be a shipped name or a hub id (organisation/name) at a "
            "real site; a folder of the site is named by `model-path` in its node config."
        )
    return model


def site_files(node: NodeSettings, client: Client) -> SiteFiles:
    """Return a real site's data files; `pilot_flwr.client.readiness` tries them.

    Raises
    ------
    ConfigError
        ``train-file`` is missing.
    """
    if not node.train_files:
        raise ConfigError(
            f"`train-file` is missing in the node config of client {client.id!r}; it must be "
            "this site's training data, LLaVA JSON or JSONL."
        )
    return SiteFiles(node.train_files, node.test_files, node.image_folder)


def site_client(node: NodeSettings, config: PilotConfig) -> Client:
    """Return which client of the run this node is.

    Raises
    ------
    ConfigError
        The node config says too little, or ``client-id`` and ``task`` do not fit each other or
        the run.
    """
    if node.client_id:
        return _named_client(node, config)
    if node.partition_id is None:
        raise ConfigError(
            "The node config has neither `client-id` (a real site) nor `partition-id` "
            "(a simulated node)."
        )
    if config.strategy.clients:
        raise ConfigError(
            f"`strategy.clients` is {config.strategy.clients}, a federation of real sites: the "
            "node config must have a `client-id`, and a simulation needs `strategy.clients=0`."
        )
    _check_partitions(node, config)
    clients = federation_clients(config.data)
    if not 0 <= node.partition_id < len(clients):
        raise ConfigError(
            f"`partition-id` is {node.partition_id} but must be from 0 to {len(clients) - 1}."
        )
    client = clients[node.partition_id]
    _check_task(node, client)
    return client


def _named_client(node: NodeSettings, config: PilotConfig) -> Client:
    configured = {client.id: client for client in federation_clients(config.data)}
    tasks = ", ".join(config.data.tasks)
    if node.task and node.task not in config.data.tasks:
        raise ConfigError(f"`task` is {node.task!r} but the run has {tasks}.")
    if node.client_id in configured:
        _check_task(node, configured[node.client_id])
        return configured[node.client_id]
    names = ", ".join(configured)
    if not config.strategy.clients:
        raise ConfigError(
            f"`client-id` is {node.client_id!r} but must be one of {names}; a run with "
            "`strategy.clients` above 0 takes any."
        )
    if not node.task:
        raise ConfigError(
            f"`task` is missing in the node config of client {node.client_id!r}; it must be one "
            f"of {tasks}. Only {names} need none."
        )
    return Client(node.client_id, node.task)


def _check_task(node: NodeSettings, client: Client) -> None:
    if node.task and node.task != client.task:
        raise ConfigError(
            f"`task` is {node.task!r} but client {client.id!r} of the run has task "
            f"{client.task!r}; change `task` or `client-id`."
        )


def _check_partitions(node: NodeSettings, config: PilotConfig) -> None:
    if node.num_partitions is not None and node.num_partitions != config.num_clients:
        fitting = federation_config(config.num_clients, config.simulation)
        raise ConfigError(
            f"This simulation has {node.num_partitions} SuperNodes but the configuration has "
            f"{config.num_clients} clients. Run `pilot-flwr run` with the same overrides, or "
            f'`flwr run . --federation-config "{fitting}"`.'
        )
