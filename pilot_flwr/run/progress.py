"""Live output of a run: the lines of ``metrics.jsonl`` as text, while they are written.

`EventTail` reads new events, `Progress` formats them, one line per client and exchange under a
heading per exchange, and `ProgressPrinter` prints them. To show another kind of event, add a case
to `Progress.lines`.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from pilot_flwr.formatting import count, headline, human_bytes, human_seconds, plain
from pilot_flwr.protocol import LOSSES
from pilot_flwr.run.events import (
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
    parse_event,
)
from pilot_flwr.run.tables import aggregation_lines


class LineTail:
    """Read complete lines of a growing text file, which need not exist yet.

    If the file is replaced, the new one is read from its beginning.
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
    """Read a growing file of events; `unreadable` counts the lines that are not events."""

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
    """Format events one after another; headings and column widths follow from earlier ones."""

    def __init__(self) -> None:
        self._exchange: int | None = None
        self._scores: dict[str, str] = {}
        self._client_width = 8
        self._task_width = 6

    def lines(self, event: Event) -> list[str]:
        """Return the lines to print for an event, none if its kind is not shown."""
        match event:
            case RosterCalled():
                return self._roster(event)
            case Evaluated():
                return self._evaluated(event)
            case Trained():
                return [*self._heading(event.exchange), self._trained(event)]
            case ClientFailed():
                text = f"FAILED in {event.phase}: {headline(event.reason)}"
            case NormChecked(action="warned" | "clipped"):  # a rejected update is a failure
                text = f"{event.action.upper()}: {event.reason}"
            case ClientWarning():
                text = f"WARNING: {event.text}"
            case Aggregated():
                done = f"{count(event.clients, 'client')} in {human_seconds(event.seconds)}"
                lines = f"  aggregated {done}: {'; '.join(aggregation_lines(event))}"
                return [*self._heading(event.exchange), lines]
            case ExchangeRepeated():
                self._exchange = event.exchange - 1
                return [f"  {headline(event.reason)} Waiting; the exchange is repeated."]
            case ExchangeClosed():
                done = f"exchange {event.exchange} of {event.exchanges} done"
                heading = self._heading(event.exchange)
                return [*heading, f"  {done} in {human_seconds(event.seconds)}"]
            case Resumed():
                self._exchange, self._scores = event.exchange or None, {}
                number = event.exchange
                where = f"after exchange {number}" if number else "from the beginning"
                reasons = [f"  not usable: {plain(reason)}" for reason in event.passed_over]
                return ["", f"Resumed {where}", *reasons]
            case _:
                return []
        return [*self._heading(event.exchange), self._row(event.client, "", text)]

    def _heading(self, number: int, about: str = "") -> list[str]:
        """Return the heading of a new exchange.

        Scores of the previous exchange may arrive during the training of the next. They do not
        repeat its heading, because their lines name the exchange.
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

    def _trained(self, event: Trained) -> str:
        parts = ((part, event.losses.get(part)) for part in LOSSES if part != "total")
        detail = ", ".join(f"{part} {loss:.3g}" for part, loss in parts if loss)
        before = self._scores.pop(event.client, "")
        shown = "loss withheld" if event.loss is None else f"loss {event.loss:.3f}"
        if event.epsilon is not None and event.delta is not None:
            shown = f"ε {event.epsilon:.4g} at δ {event.delta:g}, {shown}"
        return self._row(
            event.client,
            event.task,
            f"{before} before," if before else "",
            shown,
            f"({detail})".ljust(40) if detail else "",
            f"{event.examples} examples",
            *([f"{event.steps} steps", human_seconds(event.seconds)] if event.steps else []),
            f"down {human_bytes(event.bytes_down)}",
            f"up {human_bytes(event.bytes_up)}",
        )


class ProgressPrinter:
    """Print a run's events, and the lines of a log if given, as their files grow.

    While neither grows, print at increasing intervals that the run is alive.
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
        """Print new events."""
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
            self._out(f"  ... running, nothing new for {human_seconds(silent)}")
            self._patience = min(2 * self._patience, self._patience + self.RAREST_SIGN_SECONDS)

    def finish(self) -> None:
        """Print the rest, and how many lines could not be read."""
        self.show()
        if self._events.unreadable:
            self._out(f"  {count(self._events.unreadable, 'line')} of metrics.jsonl unreadable")
