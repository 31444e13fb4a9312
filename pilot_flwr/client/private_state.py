"""A client's private state on disk, one file per exchange.

An exchange starts from the newest state of an earlier exchange. So a repeated exchange starts from
the same state as the interrupted attempt, whether or not that attempt had saved its own.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pilot_flwr.errors import StateError
from pilot_flwr.protocol import GroupName, State
from pilot_flwr.run.atomic import flush, load_tensors, read_metadata, remove_leftovers, save_tensors

KEPT_STATES = 3
"""Files kept: the server goes back by at most two exchanges, and a third may be unfinished."""

ADVICE = (
    "Nothing has been overwritten. Restore the file from a copy, or move it away: then this client "
    "resumes from the state before it, or from stage 1 if there is none."
)
"""How to recover from a file that cannot be used."""

_PERSONAL = "personal/"
"""Prefix of the tensor names of Ditto's personal model."""

_MOMENTS = "moments/"
"""Prefix of the tensor names of AdamW's moments."""

_NAME = re.compile(r"private-(\d{4,})\.safetensors")


@dataclass(frozen=True)
class PrivateState:
    """The tensors that never leave a client: ψ_s, after stage 2 ψ_c and φ, and unshared ones.

    `stage` is the last one trained; after stage 2, `tasks` has the T tasks in the router's order.
    `groups` has the private groups and the unsent tensors of the others, `personal` all tensors of
    Ditto's personal model, `moments` AdamW's of the trained tensors (`train.schedule=run`).
    """

    stage: int
    tasks: tuple[str, ...] = ()
    groups: dict[GroupName, State] = field(default_factory=dict)
    personal: dict[GroupName, State] = field(default_factory=dict)
    moments: State = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether it holds no tensor: a run may have nothing private."""
        return not any(self.groups.values()) and not self.personal


class PrivateStore:
    """The private states of one client in one run.

    Every file names its client and task: another client's tensors would fit, so they are refused.
    """

    def __init__(self, folder: Path, client: str, task: str) -> None:
        self.folder = folder
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

    def save(self, state: PrivateState, *, server_round: int) -> None:
        """Save the state after exchange `server_round`, atomically; keep the last `KEPT_STATES`.

        Raises `StateError` if the folder holds another client's states, `OSError` if it cannot be
        written.
        """
        self._check_owners()
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
            for prefix, groups in (("", state.groups), (_PERSONAL, state.personal))
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        tensors |= {f"{_MOMENTS}{name}": tensor for name, tensor in state.moments.items()}
        metadata = {"stage": str(state.stage), "tasks": json.dumps(state.tasks), **self.owner}
        save_tensors(self.path(server_round), tensors, metadata)
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

    def _header(self, path: Path) -> tuple[int, tuple[str, ...]]:
        metadata = read_metadata(path)
        for kind, name in self.owner.items():
            if metadata.get(kind) != name:
                raise StateError(
                    f"{path} is of {kind} {metadata.get(kind)!r} but must be of {name!r}."
                )
        try:
            stage, tasks = int(metadata["stage"]), json.loads(metadata["tasks"])
            if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
                raise ValueError("`tasks` is not a list of strings")
            if stage not in (1, 2):
                raise ValueError(f"`stage` is {stage} but must be 1 or 2")
        except (KeyError, ValueError, RecursionError) as error:
            raise StateError(f"{path} is not a private state: {error}") from error
        return stage, tuple(tasks)


def _read_groups(path: Path) -> tuple[dict[GroupName, State], dict[GroupName, State], State]:
    """Read `PrivateState.groups`, `.personal` and `.moments`."""
    from pilot_flwr.algorithm.parameter_groups import GROUPS  # the roster query needs no torch

    groups: dict[GroupName, State] = {group: {} for group, row in GROUPS.items() if row.private}
    personal: dict[GroupName, State] = {}
    tensors = load_tensors(path)[0]
    moments = {n: tensors.pop(n) for n in list(tensors) if n.startswith(_MOMENTS)}
    try:
        for name, tensor in tensors.items():
            prefix, key = name.removeprefix(_PERSONAL).split("/", 1)
            group = next(g for g, row in GROUPS.items() if g == prefix and row.may_be_kept)
            kept = personal if name.startswith(_PERSONAL) else groups
            kept.setdefault(group, {})[key] = tensor
    except (StopIteration, ValueError) as error:
        raise StateError(f"{path} is not a private state: {error}") from error
    return groups, personal, {n.removeprefix(_MOMENTS): t for n, t in moments.items()}


@contextlib.contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except StateError as error:
        raise StateError(f"{error} {ADVICE}") from error
