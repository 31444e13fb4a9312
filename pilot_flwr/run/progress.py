"""Live output of a run: the lines of ``metrics.jsonl`` as text, while they are written.

The ServerApp appends one JSON object per event. `EventTail` reads what is new, and `Progress` words
it: one line per client and exchange, under a heading per exchange. To show another kind of event,
add a method to `Progress` and to its table. Unknown kinds and keys are ignored.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pilot_flwr.formatting import count, headline, human_bytes, human_seconds, plain
from pilot_flwr.run.events import (
    LOSS_PARTS,
    Aggregated,
    ClientFailed,
    ClientWarning,
    Evaluated,
    Event,
    ExchangeClosed,
    ExchangeRepeated,
    NormChecked,
    Resumed,
    RosterCalled,
    Trained,
    aggregation_lines,
    parse_event,
)


class LineTail:
    """Read a growing text file by complete lines; the file need not exist yet.

    If another file replaces it, that one is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._file: int | None = None

    def read(self) -> list[str]:
        """Return the lines completed since the last call, without line ends."""
        try:
            with self._path.open("rb") as stream:
                file = os.fstat(stream.fileno()).st_ino
                self._position = self._position if self._file in (None, file) else 0
                self._file = file
                stream.seek(self._position)
                data = stream.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        return complete.decode("utf-8", errors="replace").splitlines()


class EventTail:
    """Read a growing file of events; `unreadable` counts the complete lines that were none."""

    def __init__(self, path: Path) -> None:
        self.unreadable = 0
        self._lines = LineTail(path)

    def read(self) -> list[Event]:
        """Return the events since the last call; an incomplete line waits."""
        events = []
        for line in filter(str.strip, self._lines.read()):
            try:
                events.append(parse_event(line))
            except ValueError:
                self.unreadable += 1
        return events


class Progress:
    """Word events one after another; headings and columns follow from those before."""

    def __init__(self) -> None:
        self._exchange: int | None = None
        self._scores: dict[str, str] = {}
        self._client_width = 8
        self._task_width = 6
        self._words: dict[type[Event], Callable[[Any], list[str]]] = {
            RosterCalled: self._roster,
            Evaluated: self._evaluated,
            Trained: self._trained,
            ClientFailed: self._failed,
            NormChecked: self._norm_checked,
            ClientWarning: self._warning,
            Aggregated: self._aggregated,
            ExchangeRepeated: self._repeated,
            ExchangeClosed: self._closed,
            Resumed: self._resumed,
        }

    def lines(self, event: Event) -> list[str]:
        """Return the lines to print for an event, none if its kind is not shown."""
        words = self._words.get(type(event))
        return words(event) if words else []

    def _heading(self, number: int, about: str = "") -> list[str]:
        """Open a new exchange.

        Scores of the exchange before may arrive together with the training of the next: they
        say themselves which one they belong to, and never return to an old heading.
        """
        if self._exchange is not None and number <= self._exchange:
            return []
        self._exchange = number
        return ["", f"Exchange {number}{about}" if number else "Before training"]

    def _row(self, client: str, task: str, *cells: str) -> str:
        names = f"  {client.ljust(self._client_width)}  {task.ljust(self._task_width)}"
        return f"{names}  {'   '.join(filter(None, cells))}".rstrip()

    def _roster(self, event: RosterCalled) -> list[str]:
        for entry in event.clients:
            self._client_width = max(self._client_width, len(entry.client))
            self._task_width = max(self._task_width, len(entry.task))
        about = f": {count(len(event.clients), 'client')}"
        if stages := sorted({str(entry.stage) for entry in event.clients}):
            about += f", stage {' and '.join(stages)}"
        return self._heading(event.exchange, about)

    def _evaluated(self, event: Evaluated) -> list[str]:
        """Keep the score of an incoming model for the client's training line; show a last one."""
        cell = f"{event.metric} {event.score:.3f}"
        if self._exchange is not None and event.exchange < self._exchange:
            self._scores[event.client] = cell
            return []
        when = f"after exchange {event.exchange}" if event.exchange else "before training"
        effort = f"{event.examples} examples", human_seconds(event.seconds)
        heading = self._heading(event.exchange)
        return [*heading, self._row(event.client, event.task, cell, when, *effort)]

    def _trained(self, event: Trained) -> list[str]:
        heading = self._heading(event.exchange)
        parts = ((part, event.losses.get(part)) for part in LOSS_PARTS)
        detail = ", ".join(f"{part} {loss:.3g}" for part, loss in parts if loss)
        before = self._scores.pop(event.client, "")
        shown = "loss withheld" if event.loss is None else f"loss {event.loss:.3f}"
        if event.epsilon is not None and event.delta is not None:
            shown = f"ε {event.epsilon:.4g} at δ {event.delta:g}, {shown}"
        row = self._row(
            event.client,
            event.task,
            f"{before} before," if before else "",
            shown,
            f"({detail})".ljust(40) if detail else "",
            f"{event.examples} examples",
            f"{event.steps} steps",
            human_seconds(event.seconds),
            f"down {human_bytes(event.bytes_down)}",
            f"up {human_bytes(event.bytes_up)}",
        )
        return [*heading, row]

    def _failed(self, event: ClientFailed) -> list[str]:
        row = self._row(event.client, "", f"FAILED in {event.phase}: {headline(event.reason)}")
        return [*self._heading(event.exchange), row]

    def _norm_checked(self, event: NormChecked) -> list[str]:
        """Show a norm above its bound; a rejected update is a failure and shown as one."""
        if event.action not in ("warned", "clipped"):
            return []
        row = self._row(event.client, "", f"{event.action.upper()}: {event.reason}")
        return [*self._heading(event.exchange), row]

    def _warning(self, event: ClientWarning) -> list[str]:
        row = self._row(event.client, "", f"WARNING: {event.text}")
        return [*self._heading(event.exchange), row]

    def _aggregated(self, event: Aggregated) -> list[str]:
        done = f"  aggregated {count(event.clients, 'client')} in {human_seconds(event.seconds)}: "
        return [*self._heading(event.exchange), done + "; ".join(aggregation_lines(event))]

    def _repeated(self, event: ExchangeRepeated) -> list[str]:
        self._exchange = event.exchange - 1
        return [f"  {headline(event.reason)} Waiting; the exchange is repeated."]

    def _closed(self, event: ExchangeClosed) -> list[str]:
        done = f"exchange {event.exchange} of {event.exchanges} done"
        heading = self._heading(event.exchange)
        return [*heading, f"  {done} in {human_seconds(event.seconds)}"]

    def _resumed(self, event: Resumed) -> list[str]:
        self._exchange, self._scores = event.exchange or None, {}
        where = f"after exchange {event.exchange}" if event.exchange else "from the beginning"
        return ["", f"Resumed {where}", *(f"  passed over: {plain(r)}" for r in event.passed_over)]


class ProgressPrinter:
    """Print a run's events, and the lines of a log if one is given, as their files grow.

    While neither does, a sign of life is printed at growing intervals.
    """

    FIRST_SIGN_SECONDS = 60.0
    RAREST_SIGN_SECONDS = 960.0

    def __init__(self, metrics: Path, log: Path | None, out: Callable[[str], None]) -> None:
        self._events = EventTail(metrics)
        self._log = LineTail(log) if log else None
        self._out = out
        self._progress = Progress()
        self._begins = ""
        self._last_news = time.monotonic()
        self._patience = self.FIRST_SIGN_SECONDS

    def begin_with(self, flower_run: str) -> None:
        """Skip all events before the `Resumed` event with this Flower run id."""
        self._begins = flower_run

    def show(self) -> None:
        """Print what is new."""
        lines = [plain(line) for line in self._log.read()] if self._log else []
        for event in self._events.read():
            if self._begins:
                if not (isinstance(event, Resumed) and event.flower_run == self._begins):
                    continue
            self._begins = ""
            lines += self._progress.lines(event)
        for line in lines:
            self._out(line)
        silent = time.monotonic() - self._last_news
        if lines:
            self._last_news = time.monotonic()
            self._patience = self.FIRST_SIGN_SECONDS
        elif silent > self._patience:
            self._out(f"  ... running, no news for {human_seconds(silent)}")
            self._patience = min(2 * self._patience, self._patience + self.RAREST_SIGN_SECONDS)

    def finish(self) -> None:
        """Print the rest, and how many lines could not be read."""
        self.show()
        if self._events.unreadable:
            self._out(f"  {count(self._events.unreadable, 'line')} of metrics.jsonl unreadable")
