"""Tensors on disk: a client's private state and the server's checkpoints.

Files are safetensors, written whole to a temporary name, flushed to disk and then renamed, so
that a reader finds either the old content or the new one. No pickle is read or written.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pilot_flwr.errors import StateError
from pilot_flwr.parameters import GROUPS, GroupName, State

FORMAT = "pilot-flwr-1"
"""Version of the private state's file and of the checkpoint folder."""

KEPT_ROUNDS = 2
"""Checkpoints kept: the last one and the one before it."""


def save_tensors(path: Path, tensors: State, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to `path`, atomically.

    Raises
    ------
    OSError
        The folder cannot be written, for instance because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": FORMAT, **metadata})
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def load_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Read what `save_tensors` wrote.

    Raises
    ------
    StateError
        The file is torn, or not of this format.
    """
    metadata = _metadata(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


@dataclass(frozen=True)
class PrivateState:
    """What never leaves a client: ψ_s and, after stage 2, ψ_c and φ.

    Attributes
    ----------
    stage : int
        The last stage trained.
    tasks : tuple of str
        After stage 2, the T tasks in the router's order; else empty.
    groups : dict
        Group → its tensors, for the groups that are private.
    """

    stage: int
    tasks: tuple[str, ...] = ()
    groups: dict[GroupName, State] = field(default_factory=dict)


class PrivateStore:
    """The private state of one client in one run, one file in its own folder.

    Parameters
    ----------
    folder : Path
        Made at the first save.
    client, task : str
        Whose it is. The file says so as well: another client's is refused, because its tensors
        would fit.
    """

    def __init__(self, folder: Path, client: str, task: str) -> None:
        self.path = folder / "private.safetensors"
        self.owner = {"client": client, "task": task}

    def stage(self) -> int:
        """Return the last stage trained, 0 if none, without reading the tensors.

        Raises
        ------
        StateError
            The file is torn, foreign or another client's.
        """
        return self._header()[0] if self.path.exists() else 0

    def load(self) -> PrivateState | None:
        """Return the state, or None if this client has not trained yet.

        Raises
        ------
        StateError
            The file is torn, foreign or another client's.
        """
        if not self.path.exists():
            return None
        stage, tasks = self._header()
        groups: dict[GroupName, State] = {group: {} for group, row in GROUPS.items() if row.private}
        try:
            for name, tensor in load_tensors(self.path)[0].items():
                group, key = name.split("/", 1)
                groups[group][key] = tensor  # type: ignore[index]
        except (KeyError, ValueError) as error:
            raise StateError(f"{self.path} is not a private state: {error}") from error
        return PrivateState(stage, tasks, groups)

    def _header(self) -> tuple[int, tuple[str, ...]]:
        metadata = _metadata(self.path)
        for kind, name in self.owner.items():
            if metadata.get(kind) != name:
                raise StateError(
                    f"{self.path} is of {kind} {metadata.get(kind)!r} but must be of {name!r}."
                )
        try:
            return int(metadata["stage"]), tuple(json.loads(metadata["tasks"]))
        except (KeyError, ValueError) as error:
            raise StateError(f"{self.path} is not a private state: {error}") from error

    def save(self, state: PrivateState) -> None:
        """Replace the state on disk, atomically."""
        tensors = {
            f"{group}/{name}": tensor
            for group, named in state.groups.items()
            for name, tensor in named.items()
        }
        metadata = {"stage": str(state.stage), "tasks": json.dumps(state.tasks), **self.owner}
        save_tensors(self.path, tensors, metadata)


def save_checkpoint(
    folder: Path,
    *,
    server_round: int,
    adapters: Mapping[str, State],
    loras: Mapping[str, State],
    info: Mapping[str, Any],
) -> Path:
    """Write ``round-NNNN/`` with the task adapters, each client's LoRA and ``state.json``.

    The folder appears whole or not at all; the last `KEPT_ROUNDS` are kept.
    """
    target = folder / f"round-{server_round:04d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for task, state in adapters.items():
        save_tensors(temporary / "task_adapters" / f"{task}.safetensors", state, {"task": task})
    for client, state in loras.items():
        save_tensors(temporary / "lora" / f"{client}.safetensors", state, {"client": client})
    content = {"format": FORMAT, "round": server_round, **info}
    write_text(temporary / "state.json", json.dumps(content, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    _flush(folder)
    for old in sorted(folder.glob("round-*"))[:-KEPT_ROUNDS]:
        shutil.rmtree(old)
    return target


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder; its tensors are read when they are asked for.

    Attributes
    ----------
    folder : Path
        ``round-NNNN/``.
    server_round : int
        Exchange after which it was written.
    tasks : tuple of str
        The T tasks in the federation's order.
    task_of : dict
        Client → its task, of the clients that have a LoRA.
    """

    folder: Path
    server_round: int
    tasks: tuple[str, ...]
    task_of: dict[str, str]

    def adapter(self, task: str) -> State:
        """Read a task's adapter ψ_t."""
        return load_tensors(self.folder / "task_adapters" / f"{task}.safetensors")[0]

    def lora(self, client: str) -> State:
        """Read a client's LoRA Θ̄_l."""
        return load_tensors(self.folder / "lora" / f"{client}.safetensors")[0]


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open ``round-NNNN/`` and check that it is what `save_checkpoint` wrote, file by file.

    Raises
    ------
    StateError
        It is torn or foreign: a file is missing, cut short, too many or of another format.
    """
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checkpoint = Checkpoint(
            folder, int(content["round"]), tuple(content["tasks"]), dict(content["task_of"])
        )
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is not a checkpoint's: {type(error).__name__}: {error}") from None
    if version != FORMAT:
        raise StateError(f"{path} has format {version!r} but must have {FORMAT!r}.")
    if unknown := set(checkpoint.task_of.values()) - set(checkpoint.tasks):
        raise StateError(f"{path} has clients of tasks {sorted(unknown)}, which it does not list.")
    named = {"task_adapters": ("task", checkpoint.tasks), "lora": ("client", checkpoint.task_of)}
    for part, (kind, names) in named.items():
        present = {file.name.removesuffix(".safetensors") for file in (folder / part).glob("*")}
        if present != set(names):
            raise StateError(
                f"{folder / part} has files for {sorted(present)} but must have them for "
                f"{sorted(names)}."
            )
        for name in names:
            file = folder / part / f"{name}.safetensors"
            if (owner := _metadata(file).get(kind)) != name:
                raise StateError(f"{file} is of {kind} {owner!r} but must be of {name!r}.")
    return checkpoint


def latest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Open the last whole checkpoint of a run.

    Parameters
    ----------
    folder : Path
        The folder of all checkpoints.

    Returns
    -------
    Checkpoint, list of str
        And for every later one that was passed over, why.

    Raises
    ------
    StateError
        None is whole.
    """
    passed_over: list[str] = []
    for candidate in sorted(folder.glob("round-*"), reverse=True):
        try:
            return load_checkpoint(candidate), passed_over
        except StateError as error:
            passed_over.append(str(error))
    raise StateError(" ".join([f"{folder} holds no whole checkpoint.", *passed_over]))


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:  # refuses a file that is cut short
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path} has format {metadata.get('format')!r} but must have {FORMAT!r}.")
    return metadata


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
