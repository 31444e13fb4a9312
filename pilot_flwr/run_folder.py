"""The run folder: everything that a run leaves behind, written as it happens.

::

    config.yaml      the resolved configuration
    metrics.jsonl    one event a line: who trained what, how long, which bytes, which scores
    timeline.md      one row per exchange, from the events
    summary.md       scores per task and round, from the events
    result.json      how the run ended; the last file written
    checkpoint/      task adapters and every client's LoRA after each round
    clients/         private folders of simulated clients
"""

import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilot_flwr.checkpoint import write_text
from pilot_flwr.errors import StateError

Event = dict[str, Any]

_TOKEN = ".token"


def select(events: Sequence[Event], kind: str, server_round: int | None = None) -> list[Event]:
    """Return the events of one kind, in order, and of one round if it is given."""
    return [
        event
        for event in events
        if event["event"] == kind and (server_round is None or event["round"] == server_round)
    ]


def read_events(folder: Path) -> list[Event]:
    """Read the events of a run folder, none if it has no ``metrics.jsonl``.

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
            event["event"]
            events.append(event)
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise StateError(f"{path}, line {number}, is no event of a run.") from None
    return events


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

    Attributes
    ----------
    token : str
        Random; the folder holds it, so that a simulated client can tell that it sees the same
        folder as the server.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        self._started = time.time()
        self.token = secrets.token_hex(16)
        self.write(_TOKEN, self.token)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoint"

    def record(self, event: str, **values: Any) -> None:
        """Append one event to ``metrics.jsonl``, at once; `elapsed` seconds are added."""
        entry = {"event": event, "elapsed": round(time.time() - self._started, 3), **values}
        self.events.append(entry)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def select(self, kind: str, server_round: int | None = None) -> list[Event]:
        """Return the events of one kind, in order, and of one round if it is given."""
        return select(self.events, kind, server_round)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder, atomically."""
        write_text(self.path / name, text)

    def finish(self, *, error: str | None) -> dict[str, Any]:
        """Write ``result.json`` and return it: status, error, failures, last scores."""
        failures = [
            {key: entry[key] for key in ("round", "phase", "client", "reason")}
            for entry in self.select("failure")
        ]
        result = {
            "status": "failed" if error else "completed",
            "error": error,
            "failures": failures,
            "scores": {entry["client"]: entry["score"] for entry in self.select("evaluate")},
            "seconds": round(time.time() - self._started, 3),
        }
        self.write("result.json", json.dumps(result, indent=2) + "\n")
        return result
