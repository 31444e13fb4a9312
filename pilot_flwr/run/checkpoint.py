"""Write, read, list and prune the server's checkpoints, the folders ``round-NNNN/``.

``state.json`` has the SHA-256 of every file, the run's identity, the number of events recorded so
far and its own checksum. A folder is written under a hidden name, flushed and then renamed; none
is removed before its successor is complete. A folder with any defect is refused.

A LoRA that several clients share is one file, and a LoRA that has not changed is a hard link to
the file of the previous checkpoint, or a copy on a file system without links.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilot_flwr.errors import StateError
from pilot_flwr.protocol import State
from pilot_flwr.run.atomic import (
    FORMAT,
    TensorFile,
    complete,
    create_tensors,
    flush,
    load_tensors,
    read_metadata,
    remove_leftovers,
    save_tensors,
    sha256,
    write_text,
)
from pilot_flwr.run.provenance import RunIdentity

KEPT_ROUNDS = 2
"""Number of checkpoints kept."""

_NAME = re.compile(r"round-(\d{4,})(\.old)?")


def checkpoint_folders(folder: Path) -> list[Path]:
    """List a run's checkpoint folders, complete or not, newest last."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("round-*"))
    found = [(int(name[1]), name[2] is None, path) for name, path in named if name]
    return [path for _, _, path in sorted(found)]


def exchange_of(folder: Path) -> int | None:
    """Return the exchange in a folder's name, None if it is not a checkpoint's name."""
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else None


def prune_checkpoints(folder: Path) -> None:
    """Remove all but the last `KEPT_ROUNDS` checkpoints."""
    for old in checkpoint_folders(folder)[:-KEPT_ROUNDS]:
        discard(old)


def discard(folder: Path) -> None:
    """Remove a checkpoint, renamed first so that no reader finds it partly removed."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_partial(folder: Path, *, but: Path | None = None) -> None:
    """Remove the partial checkpoints of killed writers, `but` one."""
    remove_leftovers(folder)
    for leftover in folder.glob(".round-*"):
        if leftover != but:
            shutil.rmtree(leftover, ignore_errors=True)


def _partial(folder: Path, server_round: int) -> Path:
    return folder / f".round-{server_round:04d}.tmp"


_PARTS = {"task_adapters": "task", "lora": "client", "moments": "target", "residual": "owner"}
"""Folder → the kind of name that its files have; the last two depend on the method."""

EVERYONE = "everyone"
"""File name of the residual."""


def create_lora(folder: Path, server_round: int, client: str, layout: State) -> TensorFile:
    """Create a client's LoRA in the checkpoint that will be saved next, mapped, to be filled."""
    path = _partial(folder, server_round) / _path("lora", client)
    return create_tensors(path, layout, {_PARTS["lora"]: client})


def save_checkpoint(
    folder: Path,
    *,
    server_round: int,
    adapters: Mapping[str, State],
    loras: Mapping[str, State],
    tasks: tuple[str, ...],
    task_of: Mapping[str, str],
    run: RunIdentity,
    events: int,
    moments: Mapping[str, State] | None = None,
    residual: State | None = None,
) -> Path:
    """Write ``round-NNNN/`` into the folder of all checkpoints, atomically; prune older ones.

    `adapters` maps tasks to ψ_t, `loras` clients to Θ̄_l and `task_of` the same clients to their
    tasks. Clients share a LoRA if theirs is the same object. A `TensorFile` is not written again;
    it gets its new path and its checksum. `events` is the number of lines in ``metrics.jsonl``,
    `moments` are the server optimizer's, by target, and `residual` is what exact aggregation adds
    to the frozen base.
    """
    target = folder / f"round-{server_round:04d}"
    temporary = _partial(folder, server_round)
    mapped = [state for state in loras.values() if isinstance(state, TensorFile)]
    begun = any(state.path.is_relative_to(temporary) for state in mapped)
    remove_partial(folder, but=temporary if begun else None)
    lora_of = _lora_files(loras)
    parts: dict[str, Mapping[str, State]] = {
        "task_adapters": adapters,
        "lora": {lora_of[client]: state for client, state in loras.items()},
        "moments": moments or {},
        "residual": {EVERYONE: residual} if residual else {},
    }
    files: dict[str, str] = {}
    for part, states in parts.items():
        for name, state in states.items():
            path = _path(part, name)
            files[path.as_posix()] = _store(state, temporary / path, {_PARTS[part]: name})
    content = {
        "format": FORMAT,
        "round": server_round,
        "tasks": list(tasks),
        "task_of": dict(task_of),
        "lora_of": lora_of,
        "run": run.name,
        "settings": run.settings,
        "events": events,
        "moments": sorted(parts["moments"]),
        "residual": sorted(parts["residual"]),
        "files": files,
    }
    content["checksum"] = _checksum(content)
    write_text(temporary / "state.json", json.dumps(content, indent=2) + "\n")
    replaced = folder / f"{target.name}.old"
    if target.exists():  # keep it readable under another name until the new one is in place
        discard(replaced)
        os.replace(target, replaced)
    os.replace(temporary, target)
    flush(folder)
    for client, name in lora_of.items():
        if isinstance(state := loras[client], TensorFile):
            state.path = target / _path("lora", name)
    discard(replaced)
    prune_checkpoints(folder)
    return target


def _path(part: str, name: str) -> Path:
    return Path(part) / f"{name}.safetensors"


def _lora_files(loras: Mapping[str, State]) -> dict[str, str]:
    """Return the client whose name the file of each client's LoRA gets.

    It is one of those that share the LoRA, so that no two files get the same name: the one whose
    name the file has already, else the first.
    """
    sharing: dict[int, list[str]] = {}
    for client in sorted(loras):
        sharing.setdefault(id(loras[client]), []).append(client)
    names: dict[str, str] = {}
    for clients in sharing.values():
        state = loras[clients[0]]
        kept = state.path.stem if isinstance(state, TensorFile) else ""
        names |= dict.fromkeys(clients, kept if kept in clients else clients[0])
    return names


def _store(state: State, path: Path, metadata: Mapping[str, str]) -> str:
    """Write, link or copy a state to `path`, unless it is there; return its SHA-256."""
    if not isinstance(state, TensorFile) or state.path.stem != path.stem:
        save_tensors(path, state, metadata)
        digest = sha256(path)
        if isinstance(state, TensorFile):
            state.sha256 = digest
        return digest
    if state.path == path:
        complete(state)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(state.path, path)
        except OSError:  # no hard links here
            shutil.copyfile(state.path, path)
    flush(path)
    flush(path.parent)
    # A file is hashed once: a byte that changes on the disk must not get a new checksum.
    state.sha256 = state.sha256 or sha256(path)
    return state.sha256


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder; its tensors are read on demand.

    `task_of` has the clients with a LoRA, `lora_of` the client whose name each one's file has,
    `files` the checksums; `events` is the number of lines in ``metrics.jsonl`` at
    the time, and `moments` names the server optimizer's targets.
    """

    folder: Path
    server_round: int
    tasks: tuple[str, ...]
    task_of: dict[str, str]
    run: RunIdentity = RunIdentity()
    events: int = 0
    moments: tuple[str, ...] = ()
    has_residual: bool = False
    lora_of: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def adapter(self, task: str) -> State:
        """Read a task's adapter ψ_t."""
        return self._read("task_adapters", task)

    def lora(self, client: str) -> TensorFile:
        """Map a client's LoRA Θ̄_l."""
        path = _path("lora", self.lora_of[client])
        return TensorFile(
            self.folder / path, load_tensors(self.folder / path)[0], self.files[path.as_posix()]
        )

    def moments_of(self, target: str) -> State:
        """Read the server optimizer's packed moments of a target."""
        return self._read("moments", target)

    def residual(self) -> State:
        """Read what is added to the frozen base; empty unless the aggregation is exact."""
        return self._read("residual", EVERYONE) if self.has_residual else {}

    def _read(self, part: str, name: str) -> State:
        return load_tensors(self.folder / _path(part, name))[0]


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open ``round-NNNN/``; `StateError` unless every byte is as written."""
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (version := content["format"]) != FORMAT:
            raise StateError(f"{path} has format {version!r} but must have {FORMAT!r}.")
        if content.get("checksum") != _checksum(content):
            raise StateError(f"{path} has been changed: its checksum does not match.")
        checkpoint = Checkpoint(
            folder,
            _whole_number(content, "round"),
            tuple(content["tasks"]),
            dict(content["task_of"]),
            RunIdentity(str(content["run"]), str(content["settings"])),
            _whole_number(content, "events"),
            tuple(content.get("moments", ())),
            content.get("residual", []) == [EVERYONE],
            # Earlier versions wrote one file per client.
            dict(content.get("lora_of", {client: client for client in content["task_of"]})),
            dict(content["files"]),
        )
        files, shared = checkpoint.files, checkpoint.lora_of
        if shared.keys() != checkpoint.task_of.keys():
            raise ValueError("`lora_of` and `task_of` have different clients")
        tasks = [*checkpoint.tasks, *checkpoint.task_of.values(), *shared.values()]
        if not all(isinstance(n, str) for n in (*tasks, *checkpoint.moments, *files.values())):
            raise TypeError("a name is not text")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise StateError(
            f"{path} cannot be read as the file of a checkpoint: {type(error).__name__}: {error}"
        ) from None
    if exchange_of(folder) != checkpoint.server_round:
        raise StateError(
            f"{path} is of exchange {checkpoint.server_round}, which does not match its folder."
        )
    if unknown := set(checkpoint.task_of.values()) - set(checkpoint.tasks):
        raise StateError(f"{path} has clients of tasks {sorted(unknown)}, which it does not list.")
    _check_files(checkpoint)
    return checkpoint


def latest_checkpoint(
    folder: Path, *, fits: Callable[[Checkpoint], str] = lambda checkpoint: ""
) -> tuple[Checkpoint | None, list[str]]:
    """Open a run's last complete checkpoint that `fits`; also return why later ones do not.

    `fits` returns why a complete checkpoint cannot be used, or an empty string.
    """
    passed_over: list[str] = []
    for candidate in reversed(checkpoint_folders(folder)):
        try:
            checkpoint = load_checkpoint(candidate)
            if defect := fits(checkpoint):
                raise StateError(f"{candidate} {defect}")
        except StateError as error:
            passed_over.append(str(error))
        else:
            return checkpoint, passed_over
    return None, passed_over


def _whole_number(content: Mapping[str, Any], key: str) -> int:
    value = content[key]
    if type(value) is not int or value < 0:
        raise ValueError(f"`{key}` is {value!r} but must be a whole number of at least 0")
    return value


def _check_files(checkpoint: Checkpoint) -> None:
    folder, files = checkpoint.folder, checkpoint.files
    parts: dict[str, Collection[str]] = {
        "task_adapters": checkpoint.tasks,
        "lora": set(checkpoint.lora_of.values()),
        "moments": checkpoint.moments,
        "residual": [EVERYONE] * checkpoint.has_residual,
    }
    owners = {
        f"{part}/{name}.safetensors": (_PARTS[part], name)
        for part, names in parts.items()
        for name in names
    }
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    for what, found in (("files", present - {"state.json"}), ("listed files", set(files))):
        if odd := found ^ owners.keys():
            raise StateError(
                f"{folder} has {what} that differ from its tasks and clients: missing or "
                f"unexpected are {sorted(odd)}."
            )
    for file, (kind, name) in owners.items():
        if (owner := read_metadata(folder / file).get(kind)) != name:
            raise StateError(f"{folder / file} belongs to {kind} {owner!r}, not to {name!r}.")
        if sha256(folder / file) != files[file]:
            raise StateError(f"{folder / file} has been changed: its SHA-256 does not match.")


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
