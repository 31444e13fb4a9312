"""The run folder, which holds all files of a run.

::

    config.yaml      the resolved configuration
    overrides.txt    the overrides that it was started with, used again by `resume`
    code.json        commit and versions of the code
    run.json         the run's identity: its name, as clients know it, and a hash of its settings
    metrics.jsonl    one event per line
    aggregations/    distances and mixing weights of every exchange
    interrupted-N.jsonl  events after the checkpoint that the N-th resumption started from
    timeline.md      one row per exchange, from the events
    summary.md       scores per task and exchange, from the events
    result.json      how the run ended; the last file written
    checkpoint/      task adapters and every client's LoRA after each exchange
    clients/         private folders of simulated clients
    tensorboard/     the live log, if it is on
    report/          the report, if it was written
"""

import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pilot_flwr.errors import StateError
from pilot_flwr.run.atomic import flush, write_text
from pilot_flwr.run.events import (
    AnyEvent,
    ClientFailed,
    Evaluated,
    Event,
    ExchangeRepeated,
    Resumed,
    parse_event,
    select,
)

_TOKEN = ".token"  # nosec B105  # a file's name


def read_events(folder: Path) -> list[Event]:
    """Read a run folder's events, without discarded attempts; none without ``metrics.jsonl``.

    An incomplete last line is ignored: a run may die while writing it.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        try:
            parse_event(lines[-1])
        except ValueError:
            lines.pop()
    return history(parse_events(lines, path))


def parse_events(lines: Iterable[bytes], path: Path) -> list[Event]:
    """Read lines of the file `path`, from its first; `StateError` if one is not an event."""
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(parse_event(line))
        except ValueError as error:
            raise StateError(f"{path}, line {number}, is not an event of a run: {error}.") from None
    return events


def history(events: Iterable[Event]) -> list[Event]:
    """Return the events without discarded attempts at an exchange; the repetitions stay."""
    kept: list[Event] = []
    for event in events:
        append(kept, event)
    return kept


def append(kept: list[Event], event: Event) -> None:
    """Append an event to a history; one that repeats an exchange removes the discarded attempt."""
    if isinstance(event, ExchangeRepeated) and event.undone:
        del kept[-event.undone :]
    kept.append(event)


def holds_token(folder: Path, token: str) -> bool:
    """Return whether `folder`, as seen from here, is the run folder with this `token`."""
    try:
        held = (folder / _TOKEN).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return bool(token) and secrets.compare_digest(held, token)


class RunFolder:
    """Write a run folder and keep its events.

    `events` are without discarded attempts and `lines` counts all those in ``metrics.jsonl``;
    `listener` receives every new one. The random `token` is also in the folder, so that a
    simulated client can recognise the server's folder.
    """

    def __init__(self, path: Path, events: Sequence[Event] = ()) -> None:
        """Open an absolute path, with the events that are already in its ``metrics.jsonl``."""
        self.path = path
        self.events = history(events)
        self.lines = len(events)
        self._started = time.time() - (events[-1].elapsed if events else 0.0)
        self.listener: Callable[[Event], None] = lambda event: None
        self.token = secrets.token_hex(16)
        self.write(_TOKEN, self.token)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoint"

    def record(self, event: Event) -> None:
        """Append an event to ``metrics.jsonl``, with the seconds since the run began."""
        event = replace(event, elapsed=round(time.time() - self._started, 3))
        append(self.events, event)
        self.lines += 1
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.to_dict()) + "\n")
        self.listener(event)

    def flush(self) -> None:
        """Flush the events to disk, before writing anything that depends on them."""
        flush(self.path / "metrics.jsonl")

    def select(self, kind: type[AnyEvent], exchange: int | None = None) -> list[AnyEvent]:
        """Return the events of one kind, in order, of all exchanges or of one."""
        return select(self.events, kind, exchange)

    def write(self, name: str, text: str) -> None:
        """Write a text file in the folder, atomically."""
        write_text(self.path / name, text)

    def finish(self, *, error: str | None, restartable: bool = False) -> dict[str, Any]:
        """Write ``result.json`` and return its content.

        `restartable` means that a process died and the run itself had no error, so that it can be
        resumed from its last checkpoint.
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
