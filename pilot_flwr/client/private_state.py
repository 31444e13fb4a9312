"""A client's private state on disk, one file per exchange.

An exchange starts from the newest state of an earlier exchange. So a repeated exchange starts from
the same state as the interrupted attempt, whether or not that attempt had saved its own.

Every file holds a SHA-256 of itself, Flower's id of the run that wrote it and the latest exchange
that the client has trained. From the last two, `PrivateStore.check_exchange` decides whether an
exchange may replace a state, so that the server's word alone cannot erase one.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pilot_flwr.errors import StateError
from pilot_flwr.protocol import GroupName, State
from pilot_flwr.run.atomic import (
    check_checksum,
    flush,
    load_tensors,
    read_metadata,
    remove_leftovers,
    save_tensors,
)

KEPT_STATES = 3
"""Files kept: the latest exchange, the one before it, which a resumed run may repeat as well, and
the state that this one starts from."""

ADVICE = (
    "Nothing has been overwritten. Restore the file from a copy, or move it away: then this client "
    "resumes from the state before it, or from stage 1 if there is none."
)
"""How to recover from a file that cannot be used."""

_PERSONAL = "personal/"
"""Prefix of the tensor names of a personal model."""

_ERRORS = "errors/"
"""Prefix of the tensor names of an upload's compression errors."""

_MOMENTS = "moments/"
"""Prefix of the tensor names of AdamW's moments."""

_PREFIXES = ("", _PERSONAL, _ERRORS)
"""Prefixes of the tensors that are stored by group."""

_FIRST_KEYS = {"format", "stage", "tasks", "client", "task"}
"""Metadata of the first versions, whose files have no checksum."""

_NAME = re.compile(r"private-(\d{4,})\.safetensors")


Groups: TypeAlias = dict[GroupName, State]


@dataclass(frozen=True)
class PrivateState:
    """The tensors that never leave a client: ψ_s, after stage 2 ψ_c and φ, and unshared ones.

    `stage` is the last one trained; after stage 2, `tasks` has the T tasks in the router's order.
    `groups` has the private groups and the unsent tensors of the others, `personal` those of a
    personal model (`train.personal`), `errors` the compression errors of the last upload
    (`model.sent_dtype`), `moments` AdamW's of the trained tensors (`train.schedule=run`).
    """

    stage: int
    tasks: tuple[str, ...] = ()
    groups: dict[GroupName, State] = field(default_factory=dict)
    personal: dict[GroupName, State] = field(default_factory=dict)
    errors: dict[GroupName, State] = field(default_factory=dict)
    moments: State = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether it holds no tensor: a run may have nothing private."""
        return not any(self.groups.values()) and not self.personal


class PrivateStore:
    """The private states of one client in one run.

    Every file names its client and task: another client's tensors would fit, so they are refused.
    `flower_run` is Flower's id of the run, empty for a simulated client, whose folder is the
    server's anyway.
    """

    def __init__(self, folder: Path, client: str, task: str, *, flower_run: str = "") -> None:
        self.folder, self.flower_run = folder, flower_run
        self.owner = {"client": client, "task": task}

    def path(self, server_round: int) -> Path:
        """Return the file of an exchange, whether or not it exists."""
        return self.folder / f"private-{server_round:04d}.safetensors"

    def rounds(self) -> list[int]:
        """Return the exchanges that have a state, in order."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.glob("private-*")]
        return sorted(int(name[1]) for name in names if name)

    def newest(self, *, before: int | None = None) -> Path | None:
        """Return the file of the newest exchange (before another)."""
        rounds = [number for number in self.rounds() if before is None or number < before]
        return self.path(rounds[-1]) if rounds else None

    def stage(self, *, before: int | None = None) -> int:
        """Return the last stage trained (before an exchange), 0 if none, without reading tensors.

        Raises `StateError` if the file is corrupt or another client's.
        """
        path = self.newest(before=before)
        with _advised():
            return self._header(path)[0] if path else 0

    def load(self, *, before: int | None = None) -> PrivateState | None:
        """Return the newest state (before an exchange) or None; raise as `stage` does."""
        path = self.newest(before=before)
        if path is None:
            return None
        with _advised():
            stage, tasks = self._header(path)
            return PrivateState(stage, tasks, *_read_groups(path))

    def check_exchange(self, server_round: int) -> int:
        """Raise `StateError` if training an exchange would replace states that a resume needs.

        Within one run of Flower, the latest exchange may be repeated (`strategy.below_minimum`).
        Another run of Flower resumes this one from one of the server's last two checkpoints, so it
        may repeat the exchange before the latest one as well. Returns the latest exchange. Also
        raises if the folder holds another client's states.
        """
        self._check_owners()
        path = self.newest()
        if path is None or not self.flower_run:
            return server_round
        with _advised():
            metadata = self._metadata(path)
            latest = _whole(metadata.get("latest", "0"), path)
        latest = max(latest, self.rounds()[-1])
        same = metadata.get("flower-run") == self.flower_run
        first = latest if same else latest - 1
        if server_round < first:
            raise StateError(
                f"The server asked to train exchange {server_round}, but client "
                f"{self.owner['client']!r} has trained exchange {latest} and {first} is the first "
                f"that {'this' if same else 'a resumed'} run may repeat. Nothing has been "
                f"overwritten. To let the run start over at this client, move {self.folder} away."
            )
        return max(latest, server_round)

    def save(self, state: PrivateState, *, server_round: int) -> None:
        """Save the state after exchange `server_round`, atomically; keep the last `KEPT_STATES`.

        Raises `StateError` if the folder holds another client's states or `check_exchange` does,
        `OSError` if it cannot be written.
        """
        latest = self.check_exchange(server_round)
        # States of later exchanges are of abandoned attempts; a client that misses an exchange
        # would start from one. If the process dies here, the state before `server_round` is left.
        for number in self.rounds():
            if number > server_round:
                self.path(number).unlink(missing_ok=True)
        if self.folder.is_dir():
            remove_leftovers(self.folder)
            flush(self.folder)
        tensors = {
            f"{prefix}{group}/{name}": tensor
            for prefix, groups in zip(
                _PREFIXES, (state.groups, state.personal, state.errors), strict=True
            )
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        tensors |= {f"{_MOMENTS}{name}": tensor for name, tensor in state.moments.items()}
        metadata = {
            "stage": str(state.stage),
            "tasks": json.dumps(state.tasks),
            "flower-run": self.flower_run,
            "latest": str(latest),
            **self.owner,
        }
        save_tensors(self.path(server_round), tensors, metadata, checksum=True)
        for number in self.rounds()[:-KEPT_STATES]:
            self.path(number).unlink(missing_ok=True)

    def _check_owners(self) -> None:
        """Refuse a folder shared with another client: each would remove the other's states."""
        for number in self.rounds():
            try:
                owner = read_metadata(self.path(number)).get("client", self.owner["client"])
            except StateError:  # loading it raises
                continue
            if owner != self.owner["client"]:
                raise StateError(
                    f"{self.folder} holds private states of client {owner!r}, but this is client "
                    f"{self.owner['client']!r}: no two clients may share a `state-folder`."
                )

    def _metadata(self, path: Path) -> dict[str, str]:
        """Return a file's metadata; raise `StateError` if it is changed or another client's."""
        metadata = read_metadata(path)
        if not metadata.keys() <= _FIRST_KEYS:
            check_checksum(path, metadata)
        for kind, name in self.owner.items():
            if metadata.get(kind) != name:
                raise StateError(
                    f"{path} belongs to {kind} {metadata.get(kind)!r}, not to {name!r}."
                )
        return metadata

    def _header(self, path: Path) -> tuple[int, tuple[str, ...]]:
        metadata = self._metadata(path)
        try:
            stage, tasks = int(metadata["stage"]), json.loads(metadata["tasks"])
            if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
                raise ValueError("`tasks` is not a list of strings")
            if stage not in (1, 2):
                raise ValueError(f"`stage` is {stage} but must be 1 or 2")
        except (KeyError, ValueError, RecursionError) as error:
            raise StateError(f"{path} is not a private state: {error}") from error
        return stage, tuple(tasks)


def _whole(text: str, path: Path) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise StateError(f"{path} is not a private state: `latest` is {text!r}.")
    return int(text)


def _read_groups(path: Path) -> tuple[Groups, Groups, Groups, State]:
    """Read `PrivateState.groups`, `.personal`, `.errors` and `.moments`."""
    from pilot_flwr.algorithm.parameter_groups import GROUPS  # the roster query needs no torch

    found: dict[str, Groups] = {prefix: {} for prefix in _PREFIXES}
    found[""] = {group: {} for group, row in GROUPS.items() if row.private}
    tensors = load_tensors(path)[0]
    moments = {n: tensors.pop(n) for n in list(tensors) if n.startswith(_MOMENTS)}
    try:
        for name, tensor in tensors.items():
            prefix = next((p for p in (_PERSONAL, _ERRORS) if name.startswith(p)), "")
            owner, key = name.removeprefix(prefix).split("/", 1)
            group = next(g for g, row in GROUPS.items() if g == owner and row.may_be_kept)
            found[prefix].setdefault(group, {})[key] = tensor
    except (StopIteration, ValueError) as error:
        raise StateError(f"{path} is not a private state: {error}") from error
    groups, personal, errors = (found[prefix] for prefix in _PREFIXES)
    return groups, personal, errors, {n.removeprefix(_MOMENTS): t for n, t in moments.items()}


@contextlib.contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except StateError as error:
        raise StateError(f"{error} {ADVICE}") from error
