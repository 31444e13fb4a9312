"""Growing files, read by what is new in them: lines, and events as JSON lines.

Live output of a run: the lines of ``metrics.jsonl``, as text, while they are written.

The ServerApp appends one JSON object per line as things happen; `EventTail` reads what is new
and `Progress` words it: one line per client and exchange, under a heading per exchange. To show
another event, add a function to `Progress._words`. Unknown events and keys are passed over.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pilot_flwr.formatting import count, headline, human_bytes, human_seconds, plain


class EventTail:
    """Read a growing file of JSON lines.

    Attributes
    ----------
    unreadable : int
        Complete lines so far that were no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.unreadable = 0
        self._lines = LineTail(path)

    def read(self) -> list[dict[str, Any]]:
        """Return the events since the last call; a line still being written waits."""
        events = []
        for line in self._lines.read():
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                events.append(event)
            elif line.strip():
                self.unreadable += 1
        return events


class LineTail:
    """Read a growing text file by complete lines; the file need not exist yet.

    If another file takes its place, that is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._file: int | None = None

    def read(self) -> list[str]:
        """Return the lines completed since the last call, without their ends."""
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


Event = Any  # TODO: typed
LOSS_PARTS = ("ce", "difference", "balance", "z", "proximal")


class Progress:
    """Word events one after another; headings and columns follow from those before."""

    def __init__(self) -> None:
        self._exchange: int | None = None
        self._scores: dict[str, str] = {}
        self._client_width = 8
        self._task_width = 6

    def lines(self, event: Event) -> list[str]:
        """Return the lines to print for one event: none for an unknown or unusable one."""
        words = self._words().get(str(event.get("event")))
        return words(event) if words else []

    def _words(self) -> dict[str, Callable[[Event], list[str]]]:
        return {
            "roster": self._roster,
            "evaluate": self._evaluate,
            "train": self._train,
            "failure": self._failure,
            "update_norm": self._update_norm,
            "resume": self._resume,
            "repeat": self._repeat,
            "warning": self._warning,
            "aggregate": self._aggregate,
            "round": self._round,
        }

    def _heading(self, event: Event, about: str = "") -> list[str]:
        """Open a new exchange.

        Scores of the exchange before may arrive together with the training of the next: they
        say themselves which one they belong to, and never lead back to an old heading.
        """
        number = _integer(event, "round")
        if number is None or (self._exchange is not None and number <= self._exchange):
            return []
        self._exchange = number
        return ["", f"Exchange {number}{about}" if number else "Before training"]

    def _row(self, event: Event, *cells: str) -> str:
        client = str(event.get("client", "?")).ljust(self._client_width)
        task = str(event.get("task", "")).ljust(self._task_width)
        return f"  {client}  {task}  {'   '.join(cell for cell in cells if cell)}".rstrip()

    def _roster(self, event: Event) -> list[str]:
        clients = event.get("clients")
        rows = clients if isinstance(clients, list) else []
        rows = [row for row in rows if isinstance(row, dict)]
        names = [len(str(row.get("client", ""))) for row in rows]
        tasks = [len(str(row.get("task", ""))) for row in rows]
        self._client_width = max([self._client_width, *names])
        self._task_width = max([self._task_width, *tasks])
        stages = sorted({str(row["stage"]) for row in rows if row.get("stage") is not None})
        about = f": {count(len(rows), 'client')}"
        if stages:
            about += f", stage {' and '.join(stages)}"
        return self._heading(event, about)

    def _evaluate(self, event: Event) -> list[str]:
        """Keep the score of an incoming model for the client's training line; show a last one."""
        number = _integer(event, "round")
        score = _number(event, "score")
        cell = f"{event.get('metric', 'score')} {'?' if score is None else f'{score:.3f}'}"
        if number is not None and self._exchange is not None and number < self._exchange:
            self._scores[str(event.get("client"))] = cell
            return []
        when = "" if number is None else f"after exchange {number}"
        when = "before training" if number == 0 else when
        return [*self._heading(event), self._row(event, cell, when, *_effort(event))]

    def _train(self, event: Event) -> list[str]:
        heading = self._heading(event)
        loss = _number(event, "loss")
        parts = [(part, _number(event, f"loss_{part}")) for part in LOSS_PARTS]
        detail = ", ".join(
            f"{part} {value:.3g}" for part, value in parts if value is not None and value != 0
        )
        before = self._scores.pop(str(event.get("client")), "")
        row = self._row(
            event,
            f"{before} before," if before else "",
            _private(event) or f"loss {'?' if loss is None else f'{loss:.3f}'}",
            f"({detail})".ljust(40) if detail else "",
            *_effort(event),
            *_traffic(event),
        )
        return [*heading, row]

    def _failure(self, event: Event) -> list[str]:
        phase = event.get("phase", "?")
        row = self._row(event, f"FAILED in {phase}: {headline(str(event.get('reason', '')))}")
        return [*self._heading(event), row]

    def _resume(self, event: Event) -> list[str]:
        number = _integer(event, "round") or 0
        self._exchange, self._scores = number or None, {}
        where = f"after exchange {number}" if number else "from the beginning"
        passed_over = event.get("passed_over")
        reasons = passed_over if isinstance(passed_over, list) else []
        return ["", f"Resumed {where}", *(f"  passed over: {plain(str(r))}" for r in reasons)]

    def _repeat(self, event: Event) -> list[str]:
        number = _integer(event, "round")
        self._exchange = None if number is None else number - 1
        return [f"  {headline(str(event.get('reason', '')))} Waiting; the exchange is repeated."]

    def _update_norm(self, event: Event) -> list[str]:
        """Show what was done about a norm; what was rejected is a failure and shown as one."""
        if event.get("action") not in ("warned", "clipped"):
            return []
        action = str(event["action"]).upper()
        return [*self._heading(event), self._row(event, f"{action}: {event.get('reason', '')}")]

    def _warning(self, event: Event) -> list[str]:
        return [*self._heading(event), self._row(event, f"WARNING: {event.get('text', '')}")]

    def _aggregate(self, event: Event) -> list[str]:
        clients = _integer(event, "clients")
        what = "" if clients is None else f" {count(clients, 'client')}"
        return [*self._heading(event), f"  aggregated{what}{_lasting(event)}"]

    def _round(self, event: Event) -> list[str]:
        number, total = _integer(event, "round"), _integer(event, "exchanges")
        if number is None:
            return []
        of_total = "" if total is None else f" of {total}"
        return [*self._heading(event), f"  exchange {number}{of_total} done{_lasting(event)}"]


class ProgressPrinter:
    """Print a run's progress as its files grow, and a sign of life when they do not.

    Parameters
    ----------
    metrics : Path
        The run's ``metrics.jsonl``.
    log : Path or None
        A log to show line by line as well.
    out : callable
        Takes one line.
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
        """Pass over all events before the ``resume`` event of a run with this id of Flower's."""
        self._begins = flower_run

    def show(self) -> None:
        """Print what is new."""
        lines = [plain(line) for line in self._log.read()] if self._log else []
        for event in self._events.read():
            if self._begins and str(event.get("flower_run")) != self._begins:
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


def _private(event: Event) -> str:
    """Return what a private upload has cost, with the loss if there is any."""
    epsilon, delta, loss = (_number(event, key) for key in ("epsilon", "delta", "loss"))
    if epsilon is None or delta is None:
        return ""
    shown = "loss withheld" if loss is None else f"loss {loss:.3f}"
    return f"ε {epsilon:.4g} at δ {delta:g}, {shown}"


def _effort(event: Event) -> list[str]:
    counts = [(key, _integer(event, key)) for key in ("examples", "steps")]
    cells = [f"{count} {key}" for key, count in counts if count is not None]
    seconds = _finite(event, "seconds")
    return cells if seconds is None else [*cells, human_seconds(seconds)]


def _traffic(event: Event) -> list[str]:
    sizes = [(way, _finite(event, f"bytes_{way}")) for way in ("down", "up")]
    return [f"{way} {human_bytes(size)}" for way, size in sizes if size is not None]


def _lasting(event: Event) -> str:
    seconds = _finite(event, "seconds")
    return "" if seconds is None else f" in {human_seconds(seconds)}"


def _number(event: Event, key: str) -> float | None:
    """Return a number, NaN included: a loss that is NaN must be seen."""
    value = event.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond floating point
        return None


def _finite(event: Event, key: str) -> float | None:
    value = _number(event, key)
    return None if value is None or not math.isfinite(value) else value


def _integer(event: Event, key: str) -> int | None:
    value = _finite(event, key)
    return None if value is None else int(value)
