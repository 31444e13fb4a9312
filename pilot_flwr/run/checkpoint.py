"""Write, read, list and prune the server's checkpoints: folders ``round-NNNN/``, whole or refused.

``state.json`` names every file with its SHA-256, the run that it belongs to and the number of its
events in ``metrics.jsonl``, and has a checksum of itself. A folder is written under a hidden name,
flushed and then renamed; none is removed before its successor is whole.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
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
"""Checkpoints that are kept."""

_NAME = re.compile(r"round-(\d{4,})(\.old)?")


def checkpoint_folders(folder: Path) -> list[Path]:
    """List a run's checkpoint folders, whole or not, the newest last."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("round-*"))
    found = [(int(name[1]), name[2] is None, path) for name, path in named if name]
    return [path for _, _, path in sorted(found)]


def exchange_of(folder: Path) -> int | None:
    """Return the exchange in a folder's name, None if it is not a checkpoint's name."""
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else None


def prune_checkpoints(folder: Path) -> None:
    """Remove all but the last `KEPT_ROUNDS`."""
    for old in checkpoint_folders(folder)[:-KEPT_ROUNDS]:
        discard(old)


def discard(folder: Path) -> None:
    """Remove a checkpoint, under a name that no reader looks at while it is half removed."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what a killed writer left."""
    for leftover in folder.glob(".round-*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(leftover)


_PARTS = {"task_adapters": "task", "lora": "client", "moments": "target", "residual": "owner"}
"""Folder → what its files are named after; the last two exist if the method has them."""

EVERYONE = "everyone"
"""Owner of the residual."""


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
    """Write ``round-NNNN/`` in the folder of all checkpoints, whole or not at all; prune the rest.

    `adapters` maps tasks to ψ_t, `loras` clients to Θ̄_l and `task_of` the same clients to their
    tasks; `events` counts the lines of ``metrics.jsonl`` up to here. `moments` are the server
    optimizer's, by target; `residual` is what an exact aggregation adds to the frozen base.
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
    if target.exists():  # it stays readable under another name until the new one is in place
        discard(replaced)
        os.replace(target, replaced)
    os.replace(temporary, target)
    flush(folder)
    discard(replaced)
    prune_checkpoints(folder)
    return target


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder; its tensors are read on demand.

    `task_of` has the clients with a LoRA, `events` counts the lines of ``metrics.jsonl`` up to the
    checkpoint, and `moments` names what the server optimizer has moments of.
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
        return load_tensors(self.folder / "task_adapters" / f"{task}.safetensors")[0]

    def lora(self, client: str) -> State:
        """Read a client's LoRA Θ̄_l."""
        return load_tensors(self.folder / "lora" / f"{client}.safetensors")[0]

    def moments_of(self, target: str) -> State:
        """Read the server optimizer's moments of one target, as they were packed."""
        return load_tensors(self.folder / "moments" / f"{target}.safetensors")[0]

    def residual(self) -> State:
        """Read what is added to the frozen base: empty, except after an exact aggregation."""
        path = self.folder / "residual" / f"{EVERYONE}.safetensors"
        return load_tensors(path)[0] if self.has_residual else {}


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open ``round-NNNN/``; `StateError` if it is not what was written, byte by byte."""
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateError(f"{path} is not a checkpoint's: {type(error).__name__}: {error}") from None
    if version != FORMAT:
        raise StateError(f"{path} has format {version!r} but must have {FORMAT!r}.")
    if content.get("checksum") != _checksum(content):
        raise StateError(f"{path} has been changed: its checksum is not that of its content.")
    try:
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
        texts = [*checkpoint.tasks, *checkpoint.task_of.values(), *checkpoint.moments]
        _check_texts([*texts, *files.values()])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise StateError(f"{path} is not a checkpoint's: {type(error).__name__}: {error}") from None
    if exchange_of(folder) != checkpoint.server_round:
        raise StateError(
            f"{path} is of exchange {checkpoint.server_round}, which is not that of its folder."
        )
    if unknown := set(checkpoint.task_of.values()) - set(checkpoint.tasks):
        raise StateError(f"{path} has clients of tasks {sorted(unknown)}, which it does not list.")
    _check_files(checkpoint, files)
    return checkpoint


def latest_checkpoint(
    folder: Path, *, fits: Callable[[Checkpoint], str] = lambda checkpoint: ""
) -> tuple[Checkpoint | None, list[str]]:
    """Open a run's last whole checkpoint that `fits`; also say why later ones were passed over.

    `fits` returns why a whole checkpoint cannot be used, or nothing.
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


def _check_texts(names: Sequence[object]) -> None:
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a name is not text")


def _whole_number(content: Mapping[str, Any], key: str) -> int:
    value = content[key]
    if type(value) is not int or value < 0:
        raise ValueError(f"`{key}` is {value!r} but must be a whole number, 0 at least")
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
    for what, found in (("files", present - {"state.json"}), ("a list of files", set(files))):
        if odd := found ^ owners.keys():
            raise StateError(
                f"{folder} has {what} that does not fit its tasks and clients: too many or too "
                f"few are {sorted(odd)}."
            )
    for file, (kind, name) in owners.items():
        if (owner := read_metadata(folder / file).get(kind)) != name:
            raise StateError(f"{folder / file} is of {kind} {owner!r} but must be of {name!r}.")
        if sha256(folder / file) != files[file]:
            raise StateError(f"{folder / file} has been changed: its SHA-256 is another one.")


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
