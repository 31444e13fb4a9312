"""Write, read, list and prune the server's checkpoints, the folders ``round-NNNN/``.

``state.json`` has the SHA-256 of every file, the run's identity, the number of events recorded so
far and its own checksum. A folder is written under a hidden name, flushed and then renamed; none
is removed before its successor is complete. A folder with any defect is refused.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot_flwr.errors import StateError
from pilot_flwr.protocol import State
from pilot_flwr.run.atomic import (
    FORMAT,
    flush,
    load_tensors,
    read_metadata,
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


def remove_partial(folder: Path) -> None:
    """Remove the partial checkpoints of killed writers."""
    for leftover in folder.glob(".round-*"):
        shutil.rmtree(leftover, ignore_errors=True)


_PARTS = {"task_adapters": "task", "lora": "client", "moments": "target", "residual": "owner"}
"""Folder → the kind of name that its files have; the last two depend on the method."""

EVERYONE = "everyone"
"""File name of the residual."""


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
    tasks; `events` is the number of lines in ``metrics.jsonl``. `moments` are the server
    optimizer's, by target; `residual` is what exact aggregation adds to the frozen base.
    """
    target = folder / f"round-{server_round:04d}"
    temporary = folder / f".{target.name}.tmp"
    remove_partial(folder)
    parts: dict[str, Mapping[str, State]] = {
        "task_adapters": adapters,
        "lora": loras,
        "moments": moments or {},
        "residual": {EVERYONE: residual} if residual else {},
    }
    written = [
        (Path(part) / f"{name}.safetensors", state, {_PARTS[part]: name})
        for part, states in parts.items()
        for name, state in states.items()
    ]
    for path, state, metadata in written:
        save_tensors(temporary / path, state, metadata)
    content = {
        "format": FORMAT,
        "round": server_round,
        "tasks": list(tasks),
        "task_of": dict(task_of),
        "run": run.name,
        "settings": run.settings,
        "events": events,
        "moments": sorted(parts["moments"]),
        "residual": sorted(parts["residual"]),
        "files": {path.as_posix(): sha256(temporary / path) for path, _, _ in written},
    }
    content["checksum"] = _checksum(content)
    write_text(temporary / "state.json", json.dumps(content, indent=2) + "\n")
    replaced = folder / f"{target.name}.old"
    if target.exists():  # keep it readable under another name until the new one is in place
        discard(replaced)
        os.replace(target, replaced)
    os.replace(temporary, target)
    flush(folder)
    discard(replaced)
    prune_checkpoints(folder)
    return target


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder; its tensors are read on demand.

    `task_of` has the clients with a LoRA, `events` is the number of lines in ``metrics.jsonl`` at
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

    def adapter(self, task: str) -> State:
        """Read a task's adapter ψ_t."""
        return self._read("task_adapters", task)

    def lora(self, client: str) -> State:
        """Read a client's LoRA Θ̄_l."""
        return self._read("lora", client)

    def moments_of(self, target: str) -> State:
        """Read the server optimizer's packed moments of a target."""
        return self._read("moments", target)

    def residual(self) -> State:
        """Read what is added to the frozen base; empty unless the aggregation is exact."""
        return self._read("residual", EVERYONE) if self.has_residual else {}

    def _read(self, part: str, name: str) -> State:
        return load_tensors(self.folder / part / f"{name}.safetensors")[0]


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
        )
        files = dict(content["files"])
        tasks = [*checkpoint.tasks, *checkpoint.task_of.values()]
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
    _check_files(checkpoint, files)
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


def _check_files(checkpoint: Checkpoint, files: Mapping[str, str]) -> None:
    folder = checkpoint.folder
    parts: dict[str, Collection[str]] = {
        "task_adapters": checkpoint.tasks,
        "lora": checkpoint.task_of,
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
