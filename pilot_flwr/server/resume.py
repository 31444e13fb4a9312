"""The events of a run that died: those that count go on, the rest is moved aside, never lost.

Begin a run folder, or go on in one: after the last whole checkpoint, under the run's own name.

What was recorded after that checkpoint is moved to ``interrupted-N.jsonl``, so that the history
is that of a run which was never interrupted. Every step can be repeated if the process dies in it.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pilot_flwr.algorithm.server_optimizer import Moments
from pilot_flwr.algorithm.server_state import InitialState, ServerState
from pilot_flwr.config.loading import from_yaml, to_yaml
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError, RunError, StateError
from pilot_flwr.protocol import State
from pilot_flwr.run.atomic import flush, write_bytes
from pilot_flwr.run.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    latest_checkpoint,
    prune_checkpoints,
)
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import Resumed, parse_events
from pilot_flwr.run.provenance import RunIdentity, differences, keep_provenance, settings_hash


def read_lines(path: Path) -> list[bytes]:
    """Return the lines of a file with their ends, the last perhaps cut short; none if absent."""
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []


def earlier_attempts(path: Path, lines: list[bytes]) -> list[int]:
    """Return the numbers of the resumptions of a run folder, by its files and its events."""
    numbers = (p.stem.removeprefix("interrupted-") for p in path.glob("interrupted-*.jsonl"))
    found = [int(number) for number in numbers if number.isdecimal()]
    for line in lines:
        if b'"resume"' in line:
            try:
                found.append(int(json.loads(line).get("attempt", 0)))
            except (ValueError, TypeError, AttributeError):
                continue  # cut short
    return found


def set_aside(path: Path, lines: list[bytes], kept: list[bytes], attempt: int) -> str:
    """Move the events behind the kept ones to a file of their own.

    Parameters
    ----------
    path : Path
        The run folder.
    lines, kept : list of bytes
        All lines of ``metrics.jsonl``, and the first ones of them, which stay.
    attempt : int
        The number of this resumption.

    Returns
    -------
    str
        Name of the file; empty if there is nothing to move.
    """
    rest = b"".join(lines[len(kept) :])
    if not rest:
        return ""
    target = path / f"interrupted-{attempt}.jsonl"
    before = path / f"interrupted-{attempt - 1}.jsonl"
    if before.is_file() and before.read_bytes() == rest:  # died before the next line, last time
        target = before
    else:
        write_bytes(target, rest)
    write_bytes(path / "metrics.jsonl", b"".join(kept))
    return target.name


logger = logging.getLogger("flwr")

OVERRIDES = "overrides.txt"
"""File of a run folder: the overrides that the run was started with."""


@dataclass(frozen=True)
class Opened:
    """A run that can begin or go on.

    Attributes
    ----------
    folder : RunFolder
        Where it writes.
    identity : RunIdentity
        Its name and the hash of its settings.
    checkpoint : Checkpoint or None
        Where it goes on; None from the beginning.
    """

    folder: RunFolder
    identity: RunIdentity
    checkpoint: Checkpoint | None = None


def begin_run(path: Path, config: PilotConfig, overrides: str, *, name: str) -> Opened:
    """Begin a run in a folder that holds none.

    Parameters
    ----------
    path : Path
        The run folder.
    config : PilotConfig
        Its configuration.
    overrides : str
        What the configuration was composed from.
    name : str
        The run's name.

    Raises
    ------
    RunError
        It holds one.
    """
    check_unused(path)
    folder = RunFolder(path)
    return Opened(folder, _describe(folder, config, overrides, name))


def check_unused(path: Path) -> None:
    """Raise `RunError` if a folder holds a run."""
    if (path / "metrics.jsonl").exists():
        raise RunError(
            f"`run.folder` is {path}, which already holds a run; choose another, or go on with "
            f"that one: `resume={path}`."
        )


def continue_run(
    path: Path, config: PilotConfig, overrides: str, *, name: str, flower_run: str
) -> Opened:
    """Go on in a run folder.

    Parameters
    ----------
    path : Path
        The run folder.
    config : PilotConfig
        Its configuration, perhaps with more rounds.
    overrides : str
        What the configuration was composed from.
    name : str
        The run's name, if it was stopped before it had one.
    flower_run : str
        Flower's id of the run that goes on; the ``resume`` event has it.

    Raises
    ------
    ConfigError
        A setting on which results depend is another one than before.
    StateError
        What is in the folder cannot be read.
    """
    recorded = check_resumable(path, config)
    identity = _identity(path)
    lines = read_lines(path / "metrics.jsonl")
    checkpoint, passed_over = latest_checkpoint(
        path / "checkpoint", fits=lambda found: _misfit(found, identity, config, len(lines))
    )
    kept = lines[: checkpoint.events] if checkpoint else []
    events = parse_events(kept, path / "metrics.jsonl")
    attempt = 1 + max(earlier_attempts(path, lines), default=0)
    moved = set_aside(path, lines, kept, attempt)
    _refuse_later(path / "checkpoint", checkpoint, attempt)
    prune_checkpoints(path / "checkpoint")  # it may have died before it did
    (path / "result.json").unlink(missing_ok=True)
    folder = RunFolder(path, events)
    if identity is None or recorded is None:
        identity = _describe(folder, config, overrides, identity.name if identity else name)
    elif recorded != _as_recorded(config, path):
        folder.write("config.yaml", to_yaml(_as_recorded(config, path)))
        folder.write(OVERRIDES, overrides + "\n")
    for reason in passed_over:
        logger.warning("Passed over a checkpoint: %s", reason)
    folder.record(
        Resumed(
            exchange=checkpoint.server_round if checkpoint else 0,
            attempt=attempt,
            interrupted=moved,
            moved=len(lines) - len(kept),
            passed_over=tuple(passed_over),
            flower_run=flower_run,
        )
    )
    return Opened(folder, identity, checkpoint)


def check_resumable(path: Path, config: PilotConfig) -> PilotConfig | None:
    """Return the run's recorded configuration; None if it was stopped before it had one.

    Raises
    ------
    ConfigError
        There is no such folder, or a setting is another one than before.
    """
    if not path.is_dir():
        raise ConfigError(f"`resume` is {str(path)!r}, which is no folder of a run.")
    file = path / "config.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not (path / OVERRIDES).is_file():
            raise ConfigError(
                f"`resume` is {str(path)!r}, which holds no run to go on with."
            ) from None
        return None  # it was stopped while programs started
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`resume` is {str(path)!r}, whose config.yaml is no text: {error}."
        ) from None
    recorded = from_yaml(text)
    if found := differences(recorded, config):
        raise ConfigError(
            "\n".join(
                [
                    *found,
                    f"A run is resumed with its own settings: {path / OVERRIDES} has the "
                    "overrides that it was started with.",
                ]
            )
        )
    return recorded


def completed(path: Path, config: PilotConfig) -> Mapping[str, Any] | None:
    """Return the result of a run that is at its end, None if there is anything left to do.

    Parameters
    ----------
    path : Path
        The run folder.
    config : PilotConfig
        With more rounds than the run had there is something left.
    """
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        rounds = from_yaml((path / "config.yaml").read_text(encoding="utf-8")).strategy.rounds
    except (OSError, ValueError, ConfigError):
        return None
    done = isinstance(result, dict) and result.get("status") == "completed"
    return result if done and config.strategy.rounds <= rounds else None


def restored(checkpoint: Checkpoint, tasks: tuple[str, ...], initial: InitialState) -> ServerState:
    """Return what the server knew when it wrote a checkpoint.

    Raises
    ------
    StateError
        Its tensors are not those of the configured model.
    """
    state = ServerState(
        tasks,
        initial,
        adapters={task: _like(checkpoint.adapter(task), initial.adapter) for task in tasks},
        loras={name: _like(checkpoint.lora(name), initial.lora) for name in checkpoint.task_of},
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


def _like(state: State, pattern: State) -> State:
    """Return a state with its tensors in the pattern's order."""
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    if shapes != {name: (tensor.shape, tensor.dtype) for name, tensor in pattern.items()}:
        raise StateError("The checkpoint's tensors are not those of the configured model.")
    return {name: state[name] for name in pattern}


def _describe(folder: RunFolder, config: PilotConfig, overrides: str, name: str) -> RunIdentity:
    """Write down what a run is; its name last, as no client has heard of it before."""
    identity = RunIdentity(name, settings_hash(config))
    folder.write("config.yaml", to_yaml(_as_recorded(config, folder.path)))
    folder.write(OVERRIDES, overrides + "\n")
    keep_provenance(folder.path)
    folder.write("run.json", json.dumps(asdict(identity), indent=2) + "\n")
    return identity


def _as_recorded(config: PilotConfig, path: Path) -> PilotConfig:
    return replace(config, resume="", run=replace(config.run, folder=str(path)))


def _identity(path: Path) -> RunIdentity | None:
    try:
        content = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return RunIdentity(str(content["name"]), str(content["settings"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path / 'run.json'} does not say which run this is: {error}") from None


def _misfit(
    checkpoint: Checkpoint, identity: RunIdentity | None, config: PilotConfig, lines: int
) -> str:
    if identity is None or checkpoint.run.name != identity.name:
        here = "one without a name" if identity is None else repr(identity.name)
        return f"is of run {checkpoint.run.name!r}, but this run is {here}."
    if checkpoint.run.settings != identity.settings:
        return "is of a run with other settings."
    if checkpoint.tasks != tuple(config.data.tasks):
        return f"is for tasks {list(checkpoint.tasks)}, not {config.data.tasks}."
    if checkpoint.server_round > config.strategy.rounds + 1:
        return f"is of exchange {checkpoint.server_round}, behind the run's last one."
    if checkpoint.events > lines:
        return f"counts {checkpoint.events} events, but metrics.jsonl has {lines}."
    return ""


def _refuse_later(folder: Path, checkpoint: Checkpoint | None, attempt: int) -> None:
    """Take later checkpoints, which were refused, out of the way of those to come."""
    usable = checkpoint.server_round if checkpoint else 0
    for found in checkpoint_folders(folder):
        if int(found.name[6:].removesuffix(".old")) > usable:
            os.replace(found, folder / f"refused-{attempt}-{found.name}")
            flush(folder)
