"""The run folder: everything that a run leaves behind, written as it happens.

::

    config.yaml      the resolved configuration
    overrides.txt    the overrides that it was started with, which `resume` starts it with again
    code.json        commit and versions of the code that it was made by
    run.json         which run it is: its name, by which clients know it, and a hash of its settings
    metrics.jsonl    one event a line: who trained what, how long, which bytes, which scores
    interrupted-N.jsonl  events after the checkpoint from which the N-th resumption went on
    timeline.md      one row per exchange, from the events
    summary.md       scores per task and round, from the events
    result.json      how the run ended; the last file written
    checkpoint/      task adapters and every client's LoRA after each round
    clients/         private folders of simulated clients
    tensorboard/     the live log, if it is on
    report/          the report, if it was written
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pilot_flwr.errors import StateError
from pilot_flwr.run.atomic import flush, write_text

Event = dict[str, Any]
_TOKEN = ".token"  # nosec B105  # a file's name


def select(events: Sequence[Event], kind: str, server_round: int | None = None) -> list[Event]:
    """Return the events of one kind, in order, and of one round if it is given."""
    return [
        event
        for event in events
        if event["event"] == kind and (server_round is None or event["round"] == server_round)
    ]


def tasks_of(events: Sequence[Event]) -> list[str]:
    """Return the tasks of a run: those of all clients that took part or were scored, by name."""
    rostered = {c["task"] for event in select(events, "roster") for c in event["clients"]}
    return sorted(rostered | {event["task"] for event in select(events, "evaluate")})


def history(events: Sequence[Event]) -> list[Event]:
    """Return what counts: not the attempts at an exchange that were closed and then repeated.

    A ``repeat`` event stays; with it goes what its attempt recorded before, the last `undone`
    events.
    """
    kept: list[Event] = []
    for event in events:
        _add(kept, event)
    return kept


def _add(kept: list[Event], event: Event) -> None:
    if event["event"] == "repeat" and event["undone"]:
        del kept[-event["undone"] :]
    kept.append(event)


def read_events(folder: Path) -> list[Event]:
    """Read what counts of the events of a run folder, none if it has no ``metrics.jsonl``.

    Its last line may be cut short, because a run may end while it is written: it is left out.

    Raises
    ------
    StateError
        Another line is no event.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            if not _is_event(event):
                raise ValueError("no event")
            events.append(event)
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise StateError(f"{path}, line {number}, is no event of a run.") from None
    return history(events)


def _is_event(entry: Any) -> bool:
    """Return whether a line is an event as far as `history` and `select` go by it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
        return False
    undone = entry.get("undone")
    return entry["event"] != "repeat" or (type(undone) is int and undone >= 0)


def holds_token(folder: Path, token: str) -> bool:
    """Return whether `folder` is the run folder of whoever knows `token`, seen from here."""
    try:
        held = (folder / _TOKEN).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return bool(token) and secrets.compare_digest(held, token)


class RunFolder:
    """Writes a run folder and keeps its events.

    Parameters
    ----------
    path : Path
        Absolute; made if it does not exist.
    events : sequence of dict
        Every event that ``metrics.jsonl`` holds already, if the run goes on.

    Attributes
    ----------
    events : list of dict
        Those that count, see `history`.
    listener : callable
        Gets every event as it is recorded.
    lines : int
        Of ``metrics.jsonl``.
    token : str
        Random; the folder holds it, so that a simulated client can tell that it sees the same
        folder as the server.
    """

    def __init__(self, path: Path, events: Sequence[Event] = ()) -> None:
        self.path = path
        self.events = history(events)
        self.lines = len(events)
        self._started = time.time() - (events[-1]["elapsed"] if events else 0.0)
        self.listener: Callable[[Event], None] = lambda event: None
        self.token = secrets.token_hex(16)
        self.write(_TOKEN, self.token)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoint"

    def record(self, event: str, **values: Any) -> None:
        """Append one event to ``metrics.jsonl``, at once; `elapsed` seconds are added."""
        entry = {"event": event, "elapsed": round(time.time() - self._started, 3), **values}
        _add(self.events, entry)
        self.lines += 1
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.listener(entry)

    def flush(self) -> None:
        """Flush the events to disk: what is written next may count on them."""
        flush(self.path / "metrics.jsonl")

    def select(self, kind: str, server_round: int | None = None) -> list[Event]:
        """Return the events of one kind, in order, and of one round if it is given."""
        return select(self.events, kind, server_round)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder, atomically."""
        write_text(self.path / name, text)

    def finish(self, *, error: str | None, restartable: bool = False) -> dict[str, Any]:
        """Write ``result.json`` and return it: status, error, failures, last scores.

        `restartable` says that the error has nothing to do with the run itself, so that it may
        go on from its last checkpoint.
        """
        failures = [
            {key: entry[key] for key in ("round", "phase", "client", "reason")}
            for entry in self.select("failure")
        ]
        result = {
            "status": "failed" if error else "completed",
            "error": error,
            "restartable": restartable,
            "failures": failures,
            "scores": {entry["client"]: entry["score"] for entry in self.select("evaluate")},
            "resumed": max([entry["attempt"] for entry in self.select("resume")], default=0),
            "seconds": round(time.time() - self._started, 3),
        }
        self.write("result.json", json.dumps(result, indent=2) + "\n")
        return result
