"""Open a run folder: start a new run, or resume one from its last complete checkpoint.

Resuming truncates the event log to the checkpoint and archives the rest in
``interrupted-N.jsonl``, so that the log is that of an uninterrupted run. Every step can be repeated
if the process dies during it.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pilot_flwr.algorithm.arrays import layout_difference
from pilot_flwr.algorithm.lora_ranks import at_rank, rank_of
from pilot_flwr.algorithm.server_optimizer import Moments
from pilot_flwr.algorithm.server_state import InitialState, ServerState
from pilot_flwr.config.loading import from_yaml, to_yaml
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError, RunError, StateError
from pilot_flwr.protocol import State
from pilot_flwr.run.aggregations import remove_matrices
from pilot_flwr.run.atomic import TensorFile, flush, write_bytes
from pilot_flwr.run.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    latest_checkpoint,
    prune_checkpoints,
)
from pilot_flwr.run.directory import RunFolder, parse_events
from pilot_flwr.run.events import Resumed
from pilot_flwr.run.provenance import RunIdentity, differences, keep_provenance, settings_hash

logger = logging.getLogger("flwr")

OVERRIDES = "overrides.txt"
"""File of a run folder: the overrides of its start."""


@dataclass(frozen=True)
class OpenRun:
    """A run that is ready to execute, from its `checkpoint` or from the beginning."""

    folder: RunFolder
    identity: RunIdentity
    checkpoint: Checkpoint | None = None


def start_run(path: Path, config: PilotConfig, overrides: str, *, name: str) -> OpenRun:
    """Start a run in a new folder, or one that holds no run."""
    check_unused(path)
    folder = RunFolder(path)
    return OpenRun(folder, _record_identity(folder, config, overrides, name))


def check_unused(path: Path) -> None:
    """Raise `RunError` if a folder holds a run."""
    if (path / "metrics.jsonl").exists():
        raise RunError(
            f"`run.folder` is {path}, which already holds a run; choose another folder, or resume "
            f"that run: `resume={path}`."
        )


def check_resumable(path: Path, config: PilotConfig) -> PilotConfig | None:
    """Check the settings of a run to resume; return its recorded configuration, if it has one."""
    if not path.is_dir():
        raise ConfigError(f"`resume` is {str(path)!r}, which is not a run folder.")
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        if not (path / OVERRIDES).is_file():
            raise ConfigError(f"`resume` is {str(path)!r}, which holds no run.") from None
        return None  # the run was stopped while its processes started
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`resume` is {str(path)!r} but its config.yaml cannot be read: {error}."
        ) from None
    recorded = from_yaml(text)
    if found := differences(recorded, config):
        hint = f"Resume a run with the settings of its start, in {path / OVERRIDES}."
        raise ConfigError("\n".join([*found, hint]))
    return recorded


def completed(path: Path, config: PilotConfig) -> Mapping[str, Any] | None:
    """Return the result of a completed run; None if work is left, such as additional rounds."""
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        rounds = from_yaml((path / "config.yaml").read_text(encoding="utf-8")).strategy.rounds
    except (OSError, ValueError, ConfigError):
        return None
    done = isinstance(result, dict) and result.get("status") == "completed"
    return result if done and config.strategy.rounds <= rounds else None


def resume_run(
    path: Path, config: PilotConfig, overrides: str, *, name: str, flower_run: str
) -> OpenRun:
    """Resume the run in a folder, perhaps with more rounds.

    `name` serves a run that was stopped before it had one; `flower_run` is Flower's id of the
    resuming run.
    """
    recorded = check_resumable(path, config)
    identity = _read_identity(path)
    log = path / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    checkpoint, passed_over = latest_checkpoint(
        path / "checkpoint", fits=lambda found: _misfit(found, identity, config, len(lines))
    )
    kept = lines[: checkpoint.events] if checkpoint else []
    events = parse_events(kept, log)
    attempt = 1 + max(_previous_attempts(path, lines), default=0)
    archive = _archive_events(path, lines, kept, attempt)
    remove_matrices(path, after=checkpoint.server_round if checkpoint else 0)
    _archive_checkpoints(path / "checkpoint", checkpoint, attempt)
    prune_checkpoints(path / "checkpoint")  # the run may have died before it did
    (path / "result.json").unlink(missing_ok=True)
    folder = RunFolder(path, events)
    if identity is None or recorded is None:
        identity = _record_identity(folder, config, overrides, identity.name if identity else name)
    elif recorded != _as_recorded(config, path):
        folder.write("config.yaml", to_yaml(_as_recorded(config, path)))
        folder.write(OVERRIDES, overrides + "\n")
    for reason in passed_over:
        logger.warning("Ignoring a checkpoint: %s", reason)
    folder.record(
        Resumed(
            exchange=checkpoint.server_round if checkpoint else 0,
            attempt=attempt,
            interrupted=archive,
            moved=len(lines) - len(kept),
            passed_over=tuple(passed_over),
            flower_run=flower_run,
        )
    )
    return OpenRun(folder, identity, checkpoint)


def restored(checkpoint: Checkpoint, tasks: tuple[str, ...], initial: InitialState) -> ServerState:
    """Restore the server's state from a checkpoint."""
    state = ServerState(
        tasks,
        initial,
        adapters={task: _like(checkpoint.adapter(task), initial.adapter) for task in tasks},
        loras=_loras(checkpoint, initial.lora),
        task_of=dict(checkpoint.task_of),
        residual=checkpoint.residual(),
    )
    state.rounds = checkpoint.server_round
    for target in checkpoint.moments:
        pattern = initial.adapter if target.startswith("adapter.") else initial.lora
        try:
            state.moments[target] = Moments.unpack(checkpoint.moments_of(target), pattern)
        except (KeyError, ValueError) as error:
            raise StateError(f"The checkpoint's moments of {target!r}: {error}.") from None
    return state


def _loras(checkpoint: Checkpoint, pattern: State) -> dict[str, State]:
    """Map all LoRAs; clients that share a file share its state."""
    files: dict[str, State] = {}
    for client, name in checkpoint.lora_of.items():
        if name not in files:
            found = checkpoint.lora(client)
            own = at_rank(pattern, max(rank_of(found), 1))
            files[name] = TensorFile(found.path, _like(found, own), found.sha256)
    return {client: files[checkpoint.lora_of[client]] for client in checkpoint.task_of}


def _like(state: State, pattern: State) -> State:
    """Return a state in the pattern's order; raise `StateError` if its layout differs."""
    if difference := layout_difference(state, pattern):
        raise StateError(f"The checkpoint's tensors do not fit the configured model: {difference}.")
    return {name: state[name] for name in pattern}


# The event log.


def _previous_attempts(path: Path, lines: list[bytes]) -> list[int]:
    """Return the numbers of earlier attempts to resume, from archives and events."""
    numbers = (p.stem.removeprefix("interrupted-") for p in path.glob("interrupted-*.jsonl"))
    found = [int(number) for number in numbers if number.isdecimal()]
    for line in lines:
        if b'"resume"' in line:
            try:
                found.append(int(json.loads(line).get("attempt", 0)))
            except (ValueError, TypeError, AttributeError):
                continue  # an incomplete line
    return found


def _archive_events(path: Path, lines: list[bytes], kept: list[bytes], attempt: int) -> str:
    """Truncate ``metrics.jsonl`` to the kept lines; return the name of the rest's archive."""
    rest = b"".join(lines[len(kept) :])
    if not rest:
        return ""
    target = path / f"interrupted-{attempt}.jsonl"
    previous = path / f"interrupted-{attempt - 1}.jsonl"
    if previous.is_file() and previous.read_bytes() == rest:
        target = previous  # the last attempt died before it truncated the log
    else:
        write_bytes(target, rest)
    write_bytes(path / "metrics.jsonl", b"".join(kept))
    return target.name


# Checkpoints and identity.


def _misfit(
    checkpoint: Checkpoint, identity: RunIdentity | None, config: PilotConfig, lines: int
) -> str:
    """Return why the run cannot resume from a complete checkpoint; empty if it can."""
    if identity is None or checkpoint.run.name != identity.name:
        here = "one without a name" if identity is None else repr(identity.name)
        return f"is of run {checkpoint.run.name!r}, but this run is {here}."
    if checkpoint.run.settings != identity.settings:
        return "is of a run with other settings."
    if checkpoint.tasks != tuple(config.data.tasks):
        return f"is for tasks {list(checkpoint.tasks)}, not {config.data.tasks}."
    if checkpoint.server_round > config.strategy.rounds + 1:
        return f"is of exchange {checkpoint.server_round}, after the run's last one."
    if checkpoint.events > lines:
        return f"refers to {checkpoint.events} events, but metrics.jsonl has {lines}."
    return ""


def _archive_checkpoints(folder: Path, checkpoint: Checkpoint | None, attempt: int) -> None:
    """Rename the later checkpoints, which were refused, to free their names."""
    usable = checkpoint.server_round if checkpoint else 0
    for found in checkpoint_folders(folder):
        if int(found.name[6:].removesuffix(".old")) > usable:
            os.replace(found, folder / f"refused-{attempt}-{found.name}")
            flush(folder)


def _record_identity(
    folder: RunFolder, config: PilotConfig, overrides: str, name: str
) -> RunIdentity:
    """Record a run's settings, then its name: from then on, clients may know it."""
    identity = RunIdentity(name, settings_hash(config))
    folder.write("config.yaml", to_yaml(_as_recorded(config, folder.path)))
    folder.write(OVERRIDES, overrides + "\n")
    keep_provenance(folder.path)
    folder.write("run.json", json.dumps(asdict(identity), indent=2) + "\n")
    return identity


def _read_identity(path: Path) -> RunIdentity | None:
    try:
        content = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return RunIdentity(str(content["name"]), str(content["settings"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path / 'run.json'} does not identify a run: {error}") from None


def _as_recorded(config: PilotConfig, path: Path) -> PilotConfig:
    return replace(config, resume="", run=replace(config.run, folder=str(path)))
