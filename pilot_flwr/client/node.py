"""Resolve identity, data and device from the node's own config, never from server input.

A real site's ``--node-config`` has its id, its state folder, its data. No path of the run's
configuration is ever opened there. A simulated node has Flower's ``partition-id`` and
``num-partitions``: it is the client with that number, keeps its private state in the run folder
and reads the files that the run's configuration names.

`pilot_flwr.client.node_config` parses it. Nothing here opens the site's files;
`pilot_flwr.client.preflight` does.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pilot_flwr.client.node_config import FLOWER_KEYS, NodeConfig, NodeSettings
from pilot_flwr.client.privacy_accountant import PrivacyAccount, PrivacyDemands, require_accounting
from pilot_flwr.client.private_state import PrivateStore
from pilot_flwr.config import rules
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.overrides import federation_config
from pilot_flwr.config.schema import PilotConfig, PrivacyConfig
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.client_files import SiteFiles
from pilot_flwr.data.federation import Client, federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.run.directory import holds_token

if TYPE_CHECKING:
    import torch

_UNSHARED = (
    " If this is a simulation, its clients keep their state in the run folder, which cannot be "
    "read here: on a Ray cluster of several machines, `run.folder` must be on a file system that "
    "all of them share."
)

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


SHARED_FOLDERS = ("features", "overlap")
"""Folders of a ``state-folder`` that belong to no run."""


@dataclass(frozen=True)
class Site:
    """A client's identity and resources on its own machine, none of them set by the server.

    `state_folder` holds its private state of this run, `device` is a name for `find_device`,
    `processes` is the number of processes that train and evaluate, `files` is None for a simulated
    client, `lora_rank` is 0 for the run's rank. `flower_run` and `node_id` are Flower's, and
    `key_file` holds the private key, by default `default_key`; a simulated client has none of them.
    """

    client: Client
    state_folder: Path
    device: str = "auto"
    files: SiteFiles | None = None
    run: str = ""
    demands: PrivacyDemands = PrivacyDemands()
    flower_run: str = ""
    node_id: int = 0
    key_file: Path | None = None
    lora_rank: int = 0
    processes: int = 1

    @property
    def private_store(self) -> PrivateStore:
        """The client's private states of this run."""
        return PrivateStore(
            self.state_folder, self.client.id, self.client.task, flower_run=self.flower_run
        )

    @property
    def default_key(self) -> Path:
        """The file of the generated key, used without ``identity-key``."""
        return generated_key(self.state_folder.parent, self.client.id)

    @property
    def account(self) -> PrivacyAccount:
        """The client's privacy account, beside the folders of its runs."""
        return PrivacyAccount.of(self.state_folder.parent, self.client.id)

    def check_budget(self, privacy: PrivacyConfig) -> None:
        """Raise `PilotError` if one more upload exceeds the budget or cannot be accounted for."""
        if privacy.enabled:
            require_accounting()
            self.demands.check_budget(self.account.epsilon_after(privacy, self.demands.delta))


def is_simulated(node_config: NodeConfig, run_folder: str, run_token: str) -> bool:
    """Return whether this node is simulated, so that the run's configuration may name files here.

    It must come from Flower's simulation engine, have no ``client-id`` and read the run folder's
    token, as only a node on the server's machine can. No other node looks for the token.
    """
    from_engine = set(FLOWER_KEYS) <= node_config.keys() and "client-id" not in node_config
    return from_engine and holds_token(Path(run_folder), run_token)


def find_site(
    node: NodeSettings,
    config: PilotConfig,
    *,
    run_name: str,
    run_folder: str,
    simulated: bool,
    flower_run: str = "",
    node_id: int = 0,
) -> Site:
    """Resolve this client's identity, folder, files and device; open no file.

    `run_name` comes from the server and names a folder in ``state-folder``; `flower_run` and
    `node_id` come from Flower; only simulated clients use `run_folder`. Raises `ConfigError` if the
    node config is incomplete or contradicts itself or the run.
    """
    longest = 2 * rules.LONGEST_NAME  # it ends with Flower's id of the run
    rules.check_name("run name", run_name, longest=longest)
    if run_name in SHARED_FOLDERS:
        raise ConfigError(f"The run name is {run_name!r}, which names a folder of all runs.")
    check_device(node.device)
    processes = num_processes(node, config, simulated=simulated)
    client = site_client(node, config)
    if node.state_folder is not None:
        folder = node.state_folder / run_name
    elif simulated:
        folder = Path(run_folder) / "clients" / client.id
    else:
        from_engine = node.num_partitions is not None and not node.client_id
        raise ConfigError(
            f"`state-folder` is missing in the node config of client {client.id!r}; it must be "
            "a folder of this site for its private adapters." + (_UNSHARED if from_engine else "")
        )
    files = None
    if config.data.source == "llava" and not simulated:
        files = site_files(node, client)
    site = Site(client, folder, node.device, files, run_name, node.demands, processes=processes)
    if simulated:
        return replace(site, lora_rank=config.model.lora.client_ranks.get(client.id, 0))
    key_file = node.identity_key or site.default_key
    return replace(
        site,
        flower_run=flower_run,
        node_id=node_id,
        key_file=key_file,
        lora_rank=node.lora_rank,
    )


def generated_key(state_folder: Path, client_id: str) -> Path:
    """Return the file of the key that a client without ``identity-key`` generates."""
    return state_folder / f"{client_id}.key"


def find_device(name: str, *, rank: int = 0) -> torch.device:
    """Return the device called `name`; ``auto`` is a GPU if there is one.

    `rank` is the number of the client's process, from 0; each process has a GPU of its own.
    """
    import torch

    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(f"{name}:{rank}" if rank and name == "cuda" else name)


def check_device(name: str) -> None:
    """Raise `ConfigError` if there is no such device; only a GPU's name imports torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"`device` is {name!r} but must be auto, cpu, cuda or cuda:N.")
    if name.startswith("cuda"):
        import torch

        if (torch.device(name).index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"`device` is {name!r} but this machine has {torch.cuda.device_count()} GPUs."
            )


def num_processes(node: NodeSettings, config: PilotConfig, *, simulated: bool) -> int:
    """Return the number of a client's processes; a site's comes from its node config alone.

    Raises `ConfigError` if there are fewer GPUs, ``device`` names one of them, or
    `model.device_map` is ``auto``.
    """
    processes = node.processes or (config.simulation.client_processes if simulated else 1)
    if processes == 1 or node.device == "cpu":
        return processes
    if ":" in node.device:
        raise ConfigError(
            f"`device` is {node.device!r} but must be auto, cuda or cpu with {processes} "
            "processes; CUDA_VISIBLE_DEVICES selects their GPUs."
        )
    if config.model.device_map == "auto":
        raise ConfigError(
            f"`{_key(node)}` is {processes} but must be 1 with `model.device_map=auto`, which "
            "spreads one model over all GPUs."
        )
    import torch

    if 0 < (seen := torch.cuda.device_count()) < processes:
        raise ConfigError(
            f"`{_key(node)}` is {processes} but must be at most {seen}, the number of GPUs that "
            "this client sees."
        )
    return processes


def _key(node: NodeSettings) -> str:
    return "processes" if node.processes else "simulation.client_processes"


def site_client(node: NodeSettings, config: PilotConfig) -> Client:
    """Return the run's client that this node is; raise `ConfigError` if they do not match."""
    client = _named_client(node, config) if node.client_id else _numbered_client(node, config)
    if node.task and node.task != client.task:
        raise ConfigError(
            f"`task` is {node.task!r} but client {client.id!r} of the run has task "
            f"{client.task!r}; change `task` or `client-id`."
        )
    return client


def _numbered_client(node: NodeSettings, config: PilotConfig) -> Client:
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
    if node.num_partitions is not None and node.num_partitions != config.num_clients:
        fitting = federation_config(config.num_clients, config.simulation)
        raise ConfigError(
            f"This simulation has {node.num_partitions} SuperNodes but the configuration has "
            f"{config.num_clients} clients. Run `pilot-flwr run` with the same overrides, or "
            f'`flwr run . --federation-config "{fitting}"`.'
        )
    clients = federation_clients(config.data)
    if not 0 <= node.partition_id < len(clients):
        raise ConfigError(
            f"`partition-id` is {node.partition_id} but must be from 0 to {len(clients) - 1}."
        )
    return clients[node.partition_id]


def _named_client(node: NodeSettings, config: PilotConfig) -> Client:
    configured = {client.id: client for client in federation_clients(config.data)}
    tasks = ", ".join(config.data.tasks)
    if node.task and node.task not in config.data.tasks:
        raise ConfigError(f"`task` is {node.task!r} but the run has {tasks}.")
    if node.client_id in configured:
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


def site_files(node: NodeSettings, client: Client) -> SiteFiles:
    """Return a real site's data files; raise `ConfigError` if ``train-file`` is missing."""
    if not node.train_files:
        raise ConfigError(
            f"`train-file` is missing in the node config of client {client.id!r}; it must be "
            "this site's training data: JSON, JSONL or a Hugging Face data set."
        )
    images, links = node.image_folder, node.linked_folders
    return SiteFiles(node.train_files, node.test_files, images, links, node.allowed_overlap)


def site_config(node: NodeSettings, config: PilotConfig, *, simulated: bool) -> PilotConfig:
    """Apply the node config to the run's; raise `ConfigError` if it forbids or contradicts it."""
    node.demands.check(config.privacy)
    if config.strategy.trained_by == "pooled" and not simulated:
        raise ConfigError(
            "`strategy.trained_by` is 'pooled', which takes the data of all clients to one place: "
            "only a simulation can do that."
        )
    model = site_model(node, config.model, simulated=simulated)
    if node.lora_rank:
        rules.check_lora_rank("lora-rank", node.lora_rank, config)
    if not simulated:
        if model.lora.client_ranks:
            raise ConfigError(
                "`model.lora.client_ranks` is set but must be empty except in a simulation: a site "
                "sets `lora-rank` in its node config."
            )
        most = min(model.feature_cache.max_gib, node.max_feature_gib)
        model = replace(model, feature_cache=replace(model.feature_cache, max_gib=most))
    config = replace(config, model=model)
    train = config.train
    size = _micro_batch(node, train, num_processes(node, config, simulated=simulated))
    steps = train.batch_size * train.accumulation_steps // size
    evaluated = min(config.evaluation.batch_size, node.micro_batch or sys.maxsize)
    return replace(
        config,
        train=replace(train, batch_size=size, accumulation_steps=steps),
        evaluation=replace(config.evaluation, batch_size=evaluated),
    )


def _micro_batch(node: NodeSettings, train: TrainConfig, processes: int) -> int:
    """Return the number of examples of a micro-batch: ``micro-batch``, or few enough for all ranks.

    Raises `ConfigError` unless an optimizer step divides into such micro-batches, and into one for
    every process.
    """
    per_step = train.batch_size * train.accumulation_steps
    possible = [n for n in range(1, per_step + 1) if per_step % n == 0]
    size = node.micro_batch or train.batch_size
    fixed = train.loss_reduction == "micro_batch"
    if fixed and size != train.batch_size:
        raise ConfigError(
            f"`micro-batch` is {size} but must be {train.batch_size}, the run's `train.batch_size`,"
            " with `train.loss_reduction=micro_batch`, where it changes the gradient."
        )
    if size not in possible:
        raise ConfigError(
            f"`micro-batch` is {size} but must divide the {per_step} examples of an optimizer "
            f"step of the run: {', '.join(map(str, possible))}."
        )
    if not fixed and not node.micro_batch:
        size = max(n for n in possible if n <= size and (n == 1 or per_step // n >= processes))
    if per_step // size < processes:
        raise ConfigError(
            f"`{_key(node)}` is {processes} but must be at most {per_step // size}, the "
            "micro-batches of an optimizer step (`train.accumulation_steps`)."
        )
    return size


def site_model(node: NodeSettings, model: ModelConfig, *, simulated: bool) -> ModelConfig:
    """Replace `model.path` by a real site's ``model-path``, or refuse any path of the server's.

    `model.path` is a shipped name or a hub id by its spelling. A hub id is refused if a folder of
    this name exists in the working directory, which transformers would prefer. The error does not
    repeat `model.path`: it would tell the server whether it has guessed a path of this site.
    """
    if simulated:
        return model
    if node.model_path is not None:
        if not node.model_path.is_dir():
            raise ConfigError(
                f"`model-path` names {str(node.model_path)!r}, which is not a folder."
            )
        return replace(model, path=str(node.model_path))
    if rules.NAME_PATTERN.fullmatch(model.path) and checkpoint_path(model.path) != model.path:
        return model
    if not _HUB_ID.fullmatch(model.path) or Path(model.path).exists():
        raise ConfigError(
            "`model.path` of the run must be a shipped name or a hub id (organisation/name) at a "
            "real site; a folder of the site is named by `model-path` in its node config."
        )
    return model
