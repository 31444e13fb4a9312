"""Open a finished run and load its models; nothing is written into the run folder.

Task adapters and LoRAs are in the run's checkpoint. A client's private state is in
``clients/<id>/`` after a simulation, and on the site's disk after a real run. A client that did not
take part can use the consensus model of its task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch

from pilot_flwr.algorithm.lora_ranks import newcomer_lora
from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.client.personalization import Received, personalize_as_trained
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.model import FeatureCacheConfig
from pilot_flwr.config.overrides import with_folder
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.federation import Client, federation_clients
from pilot_flwr.errors import ConfigError, RunError, StateError
from pilot_flwr.model.loading import initial_state, loaded_model
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import State
from pilot_flwr.run.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    latest_checkpoint,
    load_checkpoint,
)
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import Evaluated, Event, select


@dataclass(frozen=True)
class Run:
    """A run with at least one checkpoint."""

    folder: Path
    config: PilotConfig
    """The run's configuration with the user's overrides."""
    recorded: PilotConfig
    """The run's configuration without them."""
    checkpoint: Checkpoint
    events: list[Event]
    notes: tuple[str, ...]
    """Messages for the user, for instance about a torn checkpoint that was skipped."""

    def clients(self) -> list[Client]:
        """Return the clients of the federation; of an open one, those that trained."""
        configured = federation_clients(self.config.data)
        if not self.config.strategy.clients:
            return configured
        known = {client.id: client for client in configured}
        trained = sorted(self.checkpoint.task_of.items())
        return [known.get(name, Client(name, task)) for name, task in trained]

    def client(self, client_id: str) -> Client:
        """Return a client by its id; raise `ConfigError` for an unknown one."""
        clients = {client.id: client for client in self.clients()}
        if client_id not in clients:
            raise ConfigError(
                f"`--client` is {client_id!r} but must be one of {', '.join(clients)}. For a new "
                "site, take the consensus model of its task with `--task`."
            )
        return clients[client_id]

    def received(self, selected: "Selected") -> Received:
        """Assemble the server's share of a model: adapters, LoRA and residual."""
        checkpoint, recorded, task = self.checkpoint, self.recorded, selected.task
        sharing = Sharing.of(recorded.strategy.sharing, recorded.train.lora_matrices)
        client = selected.client.id if selected.client else ""
        if client in checkpoint.task_of:
            lora: State = checkpoint.lora(client)
        else:
            first = initial_state(self.config.model, seed=self.config.seed).sent(sharing).lora
            rank = recorded.model.lora.client_ranks.get(client, recorded.model.lora.rank)
            task_of, load = checkpoint.task_of, checkpoint.lora
            lora = newcomer_lora(task_of, load, task, rank=rank, spare=first)
        moa = selected.private is not None and selected.private.stage == 2
        return Received(
            task,
            checkpoint.tasks,
            {t: checkpoint.adapter(t) for t in (checkpoint.tasks if moa else (task,))},
            lora,
            checkpoint.residual(),
            sharing,
            recorded.seed,
            self.config.train.personal,
        )

    def prompt_suffix(self, task: str) -> str:
        """Return the text appended to every question of a task; may be empty."""
        files = self.config.data.files
        return files[task].prompt_suffix if task in files else ""


@dataclass(frozen=True)
class Selected:
    """One model of a run: a client's personalised model, or a task's consensus model."""

    client: Client | None
    """None for a consensus model."""
    task: str
    private: PrivateState | None
    """None for a consensus model, and for a client that has not trained."""

    @property
    def name(self) -> str:
        """Name of the model in messages."""
        return self.client.id if self.client else f"consensus of {self.task}"


def open_run(
    folder: Path, *, server_round: int | None = None, overrides: Sequence[str] = ()
) -> Run:
    """Open a run folder.

    Parameters
    ----------
    folder : Path
        The run folder.
    server_round : int, optional
        Exchange whose checkpoint to use; by default the last intact one.
    overrides : sequence of str
        Settings that have changed since, each ``key=value``, for instance the base model's path. A
        relative `data.folder` is resolved against the working directory.

    Raises
    ------
    RunError
        The folder is not a run folder.
    ConfigError
        The run's configuration or an override is invalid.
    StateError
        There is no intact checkpoint, or not the requested one.
    """
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise RunError(f"{folder} is not a run folder: it has no readable config.yaml.") from None
    try:
        recorded = from_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a run's configuration: {error}") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty.")
    config = _override(recorded, text, overrides) if overrides else recorded
    # Every image is needed once, and nothing is written into the run folder.
    config = replace(
        config, model=replace(config.model, feature_cache=FeatureCacheConfig(where="off"))
    )
    checkpoint, notes = _checkpoint(folder / "checkpoint", server_round)
    if set(checkpoint.tasks) != set(recorded.data.tasks):
        raise StateError(
            f"{checkpoint.folder} is for tasks {list(checkpoint.tasks)} but the run's "
            f"configuration has {list(recorded.data.tasks)}."
        )
    return Run(folder, config, recorded, checkpoint, read_events(folder), tuple(notes))


def select_client(run: Run, client_id: str, *, state: Path | None = None) -> Selected:
    """Select a client's personalised model, with its private state as of the checkpoint.

    Parameters
    ----------
    run, client_id : Run, str
        The run, and a client of its federation.
    state : Path, optional
        Folder of the client's private state; by default ``clients/<id>/`` of the run folder.

    Raises
    ------
    ConfigError
        The federation has no such client.
    StateError
        The client trained, but its private state is missing, torn or another client's or run's.
    """
    client = run.client(client_id)
    folder = state or run.folder / "clients" / client_id
    after = run.checkpoint.server_round
    private = PrivateStore(folder, client_id, client.task).load(before=after + 1)
    if private is None and (state or client_id in run.checkpoint.task_of):
        raise StateError(
            f"{folder} has no private state of exchange {after} or before. "
            f"Client {client_id!r} has trained, so its model needs it: pass the client's state "
            "folder with `--state`, or take the consensus model of its task with `--task`."
        )
    return Selected(client, client.task, private)


def select_consensus(run: Run, task: str) -> Selected:
    """Select a task's consensus model, which a client that joins late starts from.

    It is of stage 1, with the task's adapter ψ_t, an inert ψ_s and the mean LoRA of the task's
    clients. Raises `ConfigError` for an unknown task.
    """
    tasks = run.checkpoint.tasks
    if task not in tasks:
        raise ConfigError(f"`--task` is {task!r} but must be one of {', '.join(tasks)}.")
    return Selected(None, task, None)


def load_model(run: Run, selected: Selected, *, device: torch.device) -> PilotModel:
    """Load a selected model into this process's only base model, in evaluation mode.

    The next call replaces its adapters. Raises `PilotError` if the base model cannot be loaded or
    the adapters do not fit it.
    """
    train = run.config.train
    model = loaded_model(
        run.config.model,
        reduction=train.difference_loss.reduction,
        balance_reduction=train.balance_loss.reduction,
        device=device,
    )
    load_adapters(model, run, selected)
    return model


def client_model(
    run: Run, client_id: str, *, device: torch.device, state: Path | None = None
) -> PilotModel:
    """Load a client's personalised model: `select_client`, then `load_model`."""
    return load_model(run, select_client(run, client_id, state=state), device=device)


def load_adapters(model: PilotModel, run: Run, selected: Selected) -> None:
    """Load a selected model's adapters into a base model of the run."""
    personalize_as_trained(model, selected.private, run.received(selected))
    model.eval()


def last_scores(run: Run) -> list[Evaluated]:
    """Return the last recorded evaluation of every client, in the clients' order."""
    last = {event.client: event for event in select(run.events, Evaluated)}
    return [last[client.id] for client in run.clients() if client.id in last]


def _override(recorded: PilotConfig, text: str, overrides: Sequence[str]) -> PilotConfig:
    """Apply the overrides to the run's configuration `text`, parsed as `recorded`."""
    groups = [f.name for f in fields(PilotConfig) if is_dataclass(getattr(recorded, f.name))]
    for override in overrides:
        key = override.partition("=")[0]
        if key in [*groups, "experiment"] or not key[:1].isalpha():
            raise ConfigError(
                f"{override!r} must be one setting, such as `data.folder=/new/place`; a finished "
                "run's groups of settings cannot be replaced."
            )
    try:
        config = from_yaml(text, overrides)
    except ConfigError as error:
        for override in overrides:  # name the first one that fails alone
            try:
                from_yaml(text, [override])
            except ConfigError as cause:
                raise ConfigError(f"{override!r}: {cause}") from None
        raise error from None
    return with_folder(config, ())[0] if config.data.folder != recorded.data.folder else config


def _checkpoint(folder: Path, server_round: int | None) -> tuple[Checkpoint, list[str]]:
    if server_round is None:
        checkpoint, torn = latest_checkpoint(folder)
        if checkpoint is None:
            raise StateError(" ".join([f"{folder} has no intact checkpoint.", *torn]))
        notes = [f"Skipped a checkpoint: {reason}" for reason in torn]
        if torn:
            notes.append(f"Using {checkpoint.folder.name} and the clients' states as of then.")
        return checkpoint, notes
    wanted = folder / f"round-{server_round:04d}"
    if not wanted.is_dir():
        numbers = [p.name[6:].lstrip("0") for p in checkpoint_folders(folder)]
        present = ", ".join(numbers) or "none"
        raise StateError(f"`--round` is {server_round} but the run has checkpoints of {present}.")
    return load_checkpoint(wanted), []
