"""A run's settings, some of them different now: where its data or its base model are.

Results do not depend on what may change here; `pilot_flwr.run.provenance` says what does.

Open a run folder, to use what came out of it. Nothing is written into it.

The server's part of a personalised model (task adapters, LoRAs) is in the run's checkpoint. A
client's own part is in ``clients/<id>/`` after a simulation, and on the site's disk after a real
run. A client that was not in the run gets its task's consensus model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.algorithm.server_state import lora_peers, mean_lora
from pilot_flwr.client.personalization import assemble
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.config.federation_file import with_folder
from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.model import FeatureCacheConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.federation import Client, federation_clients
from pilot_flwr.errors import ConfigError, RunError, StateError
from pilot_flwr.model.loading import initial_state, warm_model
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import State
from pilot_flwr.run.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    latest_checkpoint,
    load_checkpoint,
)
from pilot_flwr.run.directory import Event, read_events


def changed(recorded: PilotConfig, text: str, overrides: Sequence[str]) -> PilotConfig:
    """Return the configuration with some settings changed; a new `data.folder` counts from here.

    Parameters
    ----------
    recorded : PilotConfig
        The run's.
    text : str
        The same as the run folder has it.
    overrides : sequence of str
        Each ``key=value``.

    Raises
    ------
    ConfigError
        An override is none, or its value is not allowed; names the first that is wrong.
    """
    groups = [f.name for f in fields(PilotConfig) if is_dataclass(getattr(recorded, f.name))]
    for word in overrides:
        key = word.partition("=")[0]
        if key in [*groups, "experiment"] or not key[:1].isalpha():
            raise ConfigError(
                f"{word!r} must be one setting, such as `data.folder=/new/place`: the groups of a "
                "run's settings are not chosen again."
            )
    try:
        config = from_yaml(text, overrides)
    except ConfigError as error:
        for word in overrides:  # the first that is wrong by itself
            try:
                from_yaml(text, [word])
            except ConfigError as own:
                raise ConfigError(f"{word!r}: {own}") from None
        raise error from None
    return with_folder(config, ())[0] if config.data.folder != recorded.data.folder else config


@dataclass(frozen=True)
class Run:
    """A run that has ended, or has got as far as a checkpoint.

    Attributes
    ----------
    folder : Path
        The run folder.
    config : PilotConfig
        The run's configuration, with the settings that are different now.
    recorded : PilotConfig
        The run's configuration as it was.
    checkpoint : Checkpoint
        The server's part.
    events : list of dict
        What happened.
    notes : tuple of str
        What the user should be told, for instance that a torn checkpoint was passed over.
    """

    folder: Path
    config: PilotConfig
    recorded: PilotConfig
    checkpoint: Checkpoint
    events: list[Event]
    notes: tuple[str, ...]

    def clients(self) -> list[Client]:
        """Return the clients of the configured federation; of an open one, those that trained."""
        configured = federation_clients(self.config.data)
        if not self.config.strategy.clients:
            return configured
        known = {client.id: client for client in configured}
        trained = sorted(self.checkpoint.task_of.items())
        return [known.get(name, Client(name, task)) for name, task in trained]

    def client(self, client_id: str) -> Client:
        """Return a client by its id; raises `ConfigError` if there is none."""
        clients = {client.id: client for client in self.clients()}
        if client_id not in clients:
            raise ConfigError(
                f"`--client` is {client_id!r} but must be one of {', '.join(clients)}. A new site "
                "has no adapters of its own: give it the consensus model of its task with `--task`."
            )
        return clients[client_id]

    @property
    def sharing(self) -> Sharing:
        """What of the adapters and LoRAs the checkpoint has."""
        config = self.recorded
        return Sharing.of(config.strategy.sharing, config.train.lora_matrices)

    def lora(self, client: str | None, task: str) -> State:
        """Return Θ̄_l of a client as the server would send it; None is a client without one."""
        if client is not None and client in self.checkpoint.task_of:
            return self.checkpoint.lora(client)
        peers = lora_peers(self.checkpoint.task_of, task)
        if not peers:  # nobody has trained
            return initial_state(self.config.model, seed=self.config.seed).sent(self.sharing).lora
        return mean_lora([self.checkpoint.lora(peer) for peer in peers])

    def prompt_suffix(self, task: str) -> str:
        """Return what every question of a task ends with in the run's data; empty if nothing."""
        files = self.config.data.files
        return files[task].prompt_suffix if task in files else ""

    def check_task(self, task: str) -> None:
        """Raise `ConfigError` unless the run has the task."""
        if task not in self.checkpoint.tasks:
            raise ConfigError(
                f"`--task` is {task!r} but must be one of {', '.join(self.checkpoint.tasks)}."
            )


@dataclass(frozen=True)
class Personal:
    """Whose model it is, and what it is made of.

    Attributes
    ----------
    client : Client or None
        None for a task's consensus model.
    task : str
        The task.
    private : PrivateState or None
        The client's own part; None if it has none, and for a consensus model.
    """

    client: Client | None
    task: str
    private: PrivateState | None

    @property
    def name(self) -> str:
        """What people call it."""
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
        Exchange whose checkpoint is wanted; the last whole one otherwise.
    overrides : sequence of str
        Each ``key=value``: settings that are different now, for instance where the base model is.

    Raises
    ------
    RunError
        It is no run folder.
    ConfigError
        Its configuration is not one, or an override is wrong.
    StateError
        It has no whole checkpoint, or not the one that is wanted.
    """
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise RunError(f"{folder} is no run folder: it has no readable config.yaml.") from None
    try:
        recorded = from_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a run's configuration: {error}") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty.")
    config = changed(recorded, text, overrides) if overrides else recorded
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


def personal(run: Run, client_id: str, *, state: Path | None = None) -> Personal:
    """Find a client's own part.

    Parameters
    ----------
    run : Run
        The run.
    client_id : str
        A client of its federation.
    state : Path, optional
        Folder of the client's private state; ``clients/<id>/`` of the run folder otherwise.

    Raises
    ------
    ConfigError
        The federation has no such client.
    StateError
        The client took part, but its own part is not there, is torn, foreign or another client's.
    """
    client = run.client(client_id)
    folder = state or run.folder / "clients" / client_id
    after = run.checkpoint.server_round  # what the client had when the checkpoint was written
    private = PrivateStore(folder, client_id, client.task).load(before=after + 1)
    if private is None and (state or client_id in run.checkpoint.task_of):
        raise StateError(
            f"{folder} has no private state of exchange {after} or before. "
            f"Client {client_id!r} has trained, so its model needs it: give "
            "the folder with `--state` where the client keeps it, or take the consensus model "
            "of its task with `--task`."
        )
    return Personal(client, client.task, private)


def consensus(run: Run, task: str) -> Personal:
    """Return what a client of `task` gets that was not in the run: a new site.

    It is the stage-1 architecture with the task's adapter ψ_t, an inert ψ_s and the mean LoRA
    of the task's clients: what the server sends to a client that joins late.

    Raises
    ------
    ConfigError
        The run has no such task.
    """
    run.check_task(task)
    return Personal(None, task, None)


def personal_model(run: Run, who: Personal, *, device: torch.device) -> PilotModel:
    """Return this process's base model with the adapters of `who` in it.

    Raises
    ------
    PilotError
        The base model cannot be loaded, or the adapters do not fit it.
    """
    reduction = run.config.train.difference_loss.reduction
    model = warm_model(run.config.model, reduction=reduction, device=device)
    fill(model, run, who)
    return model


def client_model(
    run: Run, client_id: str, *, device: torch.device, state: Path | None = None
) -> PilotModel:
    """Return a client's personalised model: `personal`, then `personal_model`."""
    return personal_model(run, personal(run, client_id, state=state), device=device)


def fill(model: PilotModel, run: Run, who: Personal) -> None:
    """Load the adapters of `who` into a model of the run's base."""
    stage = who.private.stage if who.private else 1
    tasks = run.checkpoint.tasks if stage == 2 else (who.task,)
    assemble(
        model,
        who.task,
        who.private,
        adapters={task: run.checkpoint.adapter(task) for task in tasks},
        lora=run.lora(who.client.id if who.client else None, who.task),
        tasks=run.checkpoint.tasks,
        sharing=run.sharing,
        seed=run.recorded.seed,
        residual=run.checkpoint.residual(),
    )
    model.eval()


def last_scores(run: Run) -> list[Event]:
    """Return the last recorded evaluation of every client, in the clients' order."""
    last = {event["client"]: event for event in run.events if event["event"] == "evaluate"}
    return [last[client.id] for client in run.clients() if client.id in last]


def _checkpoint(folder: Path, server_round: int | None) -> tuple[Checkpoint, list[str]]:
    if server_round is None:
        checkpoint, torn = latest_checkpoint(folder)
        if checkpoint is None:
            raise StateError(" ".join([f"{folder} holds no whole checkpoint.", *torn]))
        notes = [f"Passed over a checkpoint: {reason}" for reason in torn]
        if torn:
            notes.append(f"Using {checkpoint.folder.name} and the clients' states of that time.")
        return checkpoint, notes
    wanted = folder / f"round-{server_round:04d}"
    if not wanted.is_dir():
        numbers = [p.name[6:].lstrip("0") for p in checkpoint_folders(folder)]
        present = ", ".join(numbers) or "none"
        raise StateError(f"`--round` is {server_round} but the run has checkpoints of {present}.")
    return load_checkpoint(wanted), []
