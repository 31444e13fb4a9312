"""A client's private state: what never leaves it, one file per exchange.

An exchange starts from the newest state of an exchange before it. So an exchange that is ordered
again, because the run was killed in it, starts from exactly what it started from the first time,
whether or not the first attempt had got as far as saving.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.errors import StateError
from pilot_flwr.protocol import GroupName, State
from pilot_flwr.run.atomic import flush, load_tensors, read_metadata, remove_leftovers, save_tensors

KEPT_STATES = 3
"""Files kept. The server goes back by two exchanges at most, and a third may be unfinished."""

ADVICE = (
    "Nothing has been overwritten. Put a copy of the file back, or take it away: then this client "
    "goes on from the state before it, or from stage 1 if there is none."
)
"""What to do about a file that cannot be used."""

_PERSONAL = "personal/"
"""Before the names of a personal model's tensors."""

_NAME = re.compile(r"private-(\d{4,})\.safetensors")


@dataclass(frozen=True)
class PrivateState:
    """What never leaves a client: ψ_s, after stage 2 ψ_c and φ, and what a run does not share.

    Attributes
    ----------
    stage : int
        The last stage trained.
    tasks : tuple of str
        After stage 2, the T tasks in the router's order; else empty.
    groups : dict
        Group → its tensors: the private groups, and what of the others is not sent.
    personal : dict
        The same of a personal model beside the shared one, if there is one: all of its tensors.
    """

    stage: int
    tasks: tuple[str, ...] = ()
    groups: dict[GroupName, State] = field(default_factory=dict)
    personal: dict[GroupName, State] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether it has no tensor: a run may have nothing that is private."""
        return not any(self.groups.values()) and not self.personal


class PrivateStore:
    """The private states of one client in one run, in its own folder.

    Parameters
    ----------
    folder : Path
        Made at the first save.
    client, task : str
        Whose they are. The files say so as well: another client's is refused, because its
        tensors would fit.
    """

    def __init__(self, folder: Path, client: str, task: str) -> None:
        self.folder = folder
        self.owner = {"client": client, "task": task}

    def path(self, server_round: int) -> Path:
        """Return where the state of an exchange is, or would be."""
        return self.folder / f"private-{server_round:04d}.safetensors"

    def rounds(self) -> list[int]:
        """Return the exchanges of which there is a state, in order."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.glob("private-*")]
        return sorted(int(name[1]) for name in names if name)

    def newest(self, *, before: int | None = None) -> Path | None:
        """Return the file of the newest exchange, or of the newest one before another.

        Parameters
        ----------
        before : int, optional
            The exchange that is to be worked on.
        """
        rounds = [number for number in self.rounds() if before is None or number < before]
        return self.path(rounds[-1]) if rounds else None

    def stage(self, *, before: int | None = None) -> int:
        """Return the last stage trained (before an exchange), without reading the tensors.

        Returns
        -------
        int
            0 if there is no state.

        Raises
        ------
        StateError
            The file is torn, foreign or another client's.
        """
        path = self.newest(before=before)
        with _advised():
            return self._header(path)[0] if path else 0

    def load(self, *, before: int | None = None) -> PrivateState | None:
        """Return the newest state (before an exchange), or None if there is none.

        Raises
        ------
        StateError
            The file is torn, foreign or another client's.
        """
        path = self.newest(before=before)
        if path is None:
            return None
        with _advised():
            stage, tasks = self._header(path)
            return PrivateState(stage, tasks, *self._groups(path))

    def save(self, state: PrivateState, *, server_round: int) -> None:
        """Keep what exchange `server_round` made, atomically.

        States of later exchanges are of attempts that the run has gone back behind: they go
        first, as a client that misses an exchange would take one for its own. Whatever dies in
        between, the newest state before `server_round` is still there. The last `KEPT_STATES`
        are kept.

        Raises
        ------
        StateError
            The folder holds another client's states.
        OSError
            The folder cannot be written, for instance because the disk is full.
        """
        self._check_owners()
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
        metadata = {"stage": str(state.stage), "tasks": json.dumps(state.tasks), **self.owner}
        save_tensors(self.path(server_round), tensors, metadata)
        for number in self.rounds()[:-KEPT_STATES]:
            self.path(number).unlink(missing_ok=True)

    def _check_owners(self) -> None:
        """Refuse a folder in which another client keeps its states: one would remove the other's.

        A file that cannot be read is nobody's here; who needs it says so.
        """
        for number in self.rounds():
            try:
                owner = read_metadata(self.path(number)).get("client", self.owner["client"])
            except StateError:
                continue
            if owner != self.owner["client"]:
                raise StateError(
                    f"{self.folder} holds private states of client {owner!r}, but this is client "
                    f"{self.owner['client']!r}: every client needs a `state-folder` of its own."
                )

    @staticmethod
    def _groups(path: Path) -> tuple[dict[GroupName, State], dict[GroupName, State]]:
        groups: dict[GroupName, State] = {group: {} for group, row in GROUPS.items() if row.private}
        personal: dict[GroupName, State] = {}
        try:
            for name, tensor in load_tensors(path)[0].items():
                prefix, key = name.removeprefix(_PERSONAL).split("/", 1)
                group = next(g for g, row in GROUPS.items() if g == prefix and row.may_be_kept)
                kept = personal if name.startswith(_PERSONAL) else groups
                kept.setdefault(group, {})[key] = tensor
        except (StopIteration, ValueError) as error:
            raise StateError(f"{path} is not a private state: {error}") from error
        return groups, personal

    def _header(self, path: Path) -> tuple[int, tuple[str, ...]]:
        metadata = read_metadata(path)
        for kind, name in self.owner.items():
            if metadata.get(kind) != name:
                raise StateError(
                    f"{path} is of {kind} {metadata.get(kind)!r} but must be of {name!r}."
                )
        try:
            stage, tasks = int(metadata["stage"]), json.loads(metadata["tasks"])
            texts = isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
            if stage not in (1, 2) or not texts:
                raise ValueError("its `stage` is not 1 or 2, or its `tasks` are no list of texts")
        except (KeyError, ValueError, RecursionError) as error:
            raise StateError(f"{path} is not a private state: {error}") from error
        return stage, tuple(tasks)


@contextlib.contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except StateError as error:
        raise StateError(f"{error} {ADVICE}") from error
