"""Live output of a run: the lines of ``metrics.jsonl`` as text, while they are written.

`EventTail` reads new events, `Progress` formats them under a heading per exchange, and
`ProgressPrinter` prints them. Up to `MOST_CLIENTS` clients have a line each; of more, `Crowd` shows
a bar of the replies, then one line per task, and names the slow and the failed ones. To show
another kind of event, add a case to `Progress.lines`.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pilot_flwr.formatting import count, headline, human_bytes, human_seconds, plain
from pilot_flwr.protocol import LOSSES
from pilot_flwr.run.events import (
    Aggregated,
    ClientFailed,
    ClientWarning,
    Evaluated,
    EvaluationClosed,
    Event,
    ExchangeClosed,
    ExchangeRepeated,
    InstructionSent,
    NormChecked,
    Resumed,
    RosterCalled,
    Trained,
    parse_event,
)
from pilot_flwr.run.tables import MOST_CLIENTS, aggregation_lines, names


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


@dataclass
class Crowd:
    """The replies of an exchange to more clients than are shown one by one.

    `since` and `shown` are the events' times of its beginning and of its last line.
    """

    expected: int = 0
    since: float = 0.0
    shown: float = 0.0
    tenths: int = 0
    trained: list[Trained] = field(default_factory=list)
    scores: list[Evaluated] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Client → reason."""
    warned: dict[str, str] = field(default_factory=dict)

    RAREST_LINE_SECONDS = 30.0

    def replied(self, now: float) -> list[str]:
        """Return a line of progress at each tenth of the replies, and at least every 30 s."""
        done = len(self.trained) or len(self.scores)
        tenths = 10 * done // max(1, self.expected)
        if tenths == self.tenths and now - self.shown < self.RAREST_LINE_SECONDS:
            return []
        self.tenths, self.shown = tenths, now
        return [self._replies(done, now)]

    def _replies(self, done: int, now: float) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        elapsed = human_seconds(max(0.0, now - self.since))
        bar = "█" * (10 * done // max(1, self.expected))
        return f"  {bar:░<10}  {done} of {self.expected} replied{failed}, {elapsed}"

    def lines(self, when: str, now: float) -> list[str]:
        """Return a line per task, then the slow, the warned and the failed clients by name."""
        done = len(self.trained) or len(self.scores)
        lines = [self._replies(done, now)] if done < self.expected else []
        tasks = sorted({e.task for e in self.trained} | {e.task for e in self.scores})
        width = max(map(len, tasks), default=0)
        lines += [f"  {task.ljust(width)}  {self._task(task, when)}" for task in tasks]
        seconds = {e.client: s for e in self.trained if (s := e.session_seconds or e.seconds)}
        if seconds:
            middle = statistics.median(seconds.values())
            slow = sorted((c for c in seconds if seconds[c] > 2 * middle), key=seconds.__getitem__)
            if slow:
                shown = [f"{client} {human_seconds(seconds[client])}" for client in reversed(slow)]
                lines.append(f"  slow (over twice the median): {names(shown)}")
        for title, found in (("warned", self.warned), ("failed", self.failed)):
            if found:
                shown = [f"{client} ({reason})" for client, reason in found.items()]
                lines.append(f"  {title}: {names(shown)}")
        return lines

    def _task(self, task: str, when: str) -> str:
        """Return a task's spread: median and range of score, loss and seconds, over how many."""
        trained = [event for event in self.trained if event.task == task]
        scores = [event for event in self.scores if event.task == task]
        losses = [event.loss for event in trained if event.loss is not None]
        clients = len({e.client for e in trained} | {e.client for e in scores})
        cells = [count(clients, "client")]
        for name, values, after in (
            (scores[0].metric if scores else "", [e.score for e in scores], f" {when}"),
            ("loss", losses, ""),
        ):
            if values:
                over = f" of {len(values)}" if len(values) < clients else ""
                cells.append(f"{name} {_spread(values, '.3f')}{over}{after}")
        if seconds := [s for e in trained if (s := e.session_seconds or e.seconds)]:
            cells.append(f"{_spread(seconds, '.1f')} s")
        if spent := [(e.epsilon, e.delta) for e in trained if e.epsilon is not None]:
            epsilon, delta = max(spent)
            cells.append(f"ε <= {epsilon:.4g} at δ {delta:g}")
        if trained:
            down, up = (sum(getattr(e, way) for e in trained) for way in ("bytes_down", "bytes_up"))
            cells.append(f"down {human_bytes(down)}   up {human_bytes(up)}")
        return "   ".join(cells)


def _spread(values: Sequence[float], form: str) -> str:
    """Return the median of values and their range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


class Progress:
    """Format events one after another; headings and column widths follow from earlier ones."""

    def __init__(self) -> None:
        self._exchange: int | None = None
        self._scores: dict[str, str] = {}
        self._client_width = 8
        self._task_width = 6
        self._crowd: Crowd | None = None
        self._troubled: set[str] = set()

    def lines(self, event: Event) -> list[str]:
        """Return the lines to print for an event, none if its kind is not shown."""
        match event:
            case RosterCalled():
                return self._roster(event)
            case InstructionSent():
                return self._instructed(event)
            case Evaluated():
                return self._evaluated(event)
            case Trained() if self._crowd:
                self._crowd.trained.append(event)
                return self._crowd.replied(event.elapsed)
            case Trained():
                return [*self._heading(event.exchange), self._trained(event)]
            case ClientFailed() | NormChecked(action="warned" | "clipped") | ClientWarning():
                return self._problem(event)  # a rejected update is a failure
            case Aggregated():
                done = f"{count(event.clients, 'client')} in {human_seconds(event.seconds)}"
                line = f"  aggregated {done}: {'; '.join(aggregation_lines(event))}"
                return [*self._heading(event.exchange), *self._end(event), line]
            case ExchangeRepeated():
                lines = self._end(event)
                self._exchange = event.exchange - 1
                return [*lines, f"  {headline(event.reason)} Waiting; the exchange is repeated."]
            case ExchangeClosed():
                done = f"exchange {event.exchange} of {event.exchanges} done"
                lines = [*self._heading(event.exchange), *self._end(event)]
                return [*lines, f"  {done} in {human_seconds(event.seconds)}"]
            case EvaluationClosed():
                return self._end(event, f"after exchange {event.exchange}")
            case Resumed():
                number = event.exchange
                self._exchange = number or None
                self._scores, self._crowd, self._troubled = {}, None, set()
                where = f"after exchange {number}" if number else "from the beginning"
                reasons = [f"  not usable: {plain(reason)}" for reason in event.passed_over]
                return ["", f"Resumed {where}", *reasons]
            case _:
                return []

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
        if event.available:
            about += f" of {sum(event.available.values())}"
        if stages := sorted({str(entry.stage) for entry in event.clients}):
            about += f", stage {' and '.join(stages)}"
        if len(event.clients) > MOST_CLIENTS:
            self._crowd = Crowd(len(event.clients), event.elapsed, event.elapsed)
        return self._heading(event.exchange, about)

    def _instructed(self, event: InstructionSent) -> list[str]:
        """Expect the replies of many: the closing evaluation has no roster of its own."""
        if self._crowd is None and event.asked > MOST_CLIENTS:
            self._crowd = Crowd(event.asked, event.elapsed, event.elapsed)
            return [f"  evaluating the models after exchange {event.exchange - 1}"]
        return []

    def _problem(self, event: ClientFailed | NormChecked | ClientWarning) -> list[str]:
        """Return the line of a failure or a warning, unless there are too many."""
        match event:
            case ClientFailed():
                text = f"FAILED in {event.phase}: {headline(event.reason)}"
            case NormChecked():
                text = f"{event.action.upper()}: {event.reason}"
            case ClientWarning():
                text = f"WARNING: {event.text}"
        if self._crowd:
            failed = isinstance(event, ClientFailed)
            reason = headline(event.reason) if isinstance(event, ClientFailed) else text
            (self._crowd.failed if failed else self._crowd.warned).setdefault(event.client, reason)
            return self._crowd.replied(event.elapsed)
        self._troubled.add(event.client)
        if len(self._troubled) > MOST_CLIENTS:  # before the roster of many is known
            return []
        return [*self._heading(event.exchange), self._row(event.client, "", text)]

    def _end(self, event: Event, when: str = "before") -> list[str]:
        """Return what a crowd did in an exchange, once."""
        crowd, self._crowd = self._crowd, None
        more = len(self._troubled) - MOST_CLIENTS
        self._troubled = set()
        lines = [f"  and {count(more, 'client')} more with a failure or a warning"] * (more > 0)
        return [*lines, *(crowd.lines(when, event.elapsed) if crowd else [])]

    def _evaluated(self, event: Evaluated) -> list[str]:
        """Keep the score of an incoming model for the client's training line; show a last one."""
        if self._crowd:
            self._crowd.scores.append(event)
            return self._crowd.replied(event.elapsed)
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
