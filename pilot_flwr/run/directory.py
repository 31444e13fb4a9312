"""The run folder: all files of a run, written as it happens.

::

    config.yaml      the resolved configuration
    overrides.txt    the overrides that it was started with, which `resume` starts it with again
    code.json        commit and versions of the code that it was made by
    run.json         which run it is: its name, by which clients know it, and a hash of its settings
    metrics.jsonl    one event a line: who trained what, how long, which bytes, which scores
    interrupted-N.jsonl  events after the checkpoint that the N-th resumption started from
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from pilot_flwr.run.atomic import flush, write_text
from pilot_flwr.run.events import (
    AnyEvent,
    ClientFailed,
    Evaluated,
    Event,
    Resumed,
    append,
    history,
    parse_event,
    parse_events,
    select,
)

_TOKEN = ".token"  # nosec B105  # a file's name


def read_events(folder: Path) -> list[Event]:
    """Read what counts of the events of a run folder, none if it has no ``metrics.jsonl``.

    The last line may be cut short, because a run may die while it is written: it is left out.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        try:
            parse_event(lines[-1])
        except ValueError:
            lines.pop()
    return history(parse_events(lines, path))


def holds_token(folder: Path, token: str) -> bool:
    """Return whether `folder` is the run folder of whoever knows `token`, seen from here."""
    try:
        held = (folder / _TOKEN).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return bool(token) and secrets.compare_digest(held, token)


class RunFolder:
    """Writes a run folder and keeps its events.

    Attributes
    ----------
    events : list of Event
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
        """Open an absolute path, with all the events that its ``metrics.jsonl`` holds already."""
        self.path = path
        self.events = history(events)
        self.lines = len(events)
        self._started = time.time() - (events[-1].elapsed if events else 0.0)
        self.listener: Callable[[Event], None] = lambda event: None
        self.token = secrets.token_hex(16)
        self.write(_TOKEN, self.token)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoint"

    def record(self, event: Event) -> None:
        """Append an event to ``metrics.jsonl``, at once, with the seconds since the run began."""
        event = replace(event, elapsed=round(time.time() - self._started, 3))
        append(self.events, event)
        self.lines += 1
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.to_dict()) + "\n")
        self.listener(event)

    def flush(self) -> None:
        """Flush the events to disk, before something is written that depends on them."""
        flush(self.path / "metrics.jsonl")

    def select(self, kind: type[AnyEvent], exchange: int | None = None) -> list[AnyEvent]:
        """Return the events of one kind, in order, and of one exchange if it is given."""
        return select(self.events, kind, exchange)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder, atomically."""
        write_text(self.path / name, text)

    def finish(self, *, error: str | None, restartable: bool = False) -> dict[str, Any]:
        """Write ``result.json`` and return it: status, error, failures, last scores.

        `restartable` says that the run may resume from its last checkpoint, because the error has
        nothing to do with the run itself.
        """
        failures = [
            {"round": f.exchange, "phase": f.phase, "client": f.client, "reason": f.reason}
            for f in self.select(ClientFailed)
        ]
        result = {
            "status": "failed" if error else "completed",
            "error": error,
            "restartable": restartable,
            "failures": failures,
            "scores": {event.client: event.score for event in self.select(Evaluated)},
            "resumed": max([event.attempt for event in self.select(Resumed)], default=0),
            "seconds": round(time.time() - self._started, 3),
        }
        self.write("result.json", json.dumps(result, indent=2) + "\n")
        return result
