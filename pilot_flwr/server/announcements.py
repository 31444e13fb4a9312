"""What the ServerApp says in its log of a run, for whoever follows it from another machine.

Flower brings the ServerApp's log to its command line and nothing else, so the progress of a run
and its verdict travel as lines of it: progress as people read it, behind `MARK`, and the verdict,
as the last such line, as JSON behind `VERDICT`. Both are written and read here alone.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot_flwr.launching.progress import Event, Progress
from pilot_flwr.wording import headline, plain

MARK = "| "
VERDICT = "Verdict: "
SHOWN_FAILURES = 5
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) *: {3,}")


@dataclass(frozen=True)
class Verdict:
    """How a run ended, as its ServerApp saw it.

    Attributes
    ----------
    folder : str
        The run folder on the server.
    status : str
        ``completed`` or ``failed``.
    error : str
        What stopped the run, or nothing.
    failures : int
        Number of clients' failures over all exchanges.
    reasons : tuple of str
        The first few of them, a line each.
    seconds : float
        Of the whole run, as ``result.json`` has it.
    """

    folder: str
    status: str
    error: str
    failures: int
    reasons: tuple[str, ...]
    seconds: float

    @property
    def succeeded(self) -> bool:
        """Whether the run came to its end and no client failed in it."""
        return self.status == "completed" and not self.error and self.failures == 0


class Announcer:
    """Says in a log what happens in a run.

    Parameters
    ----------
    log : callable
        Takes one line.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._progress = Progress()

    def event(self, event: Event) -> None:
        """Announce one event of the run, if it has words."""
        self._say(self._progress.lines(event))

    def end(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Announce the scores in a run folder, and the verdict from its ``result.json``."""
        summary = folder / "summary.md"
        if summary.is_file():
            self._say(["", *summary.read_text(encoding="utf-8").strip().splitlines()])
        self._log(VERDICT + json.dumps(asdict(verdict(str(folder), result))))

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._log(f"{MARK}{plain(line)}")


def verdict(folder: str, result: Mapping[str, Any]) -> Verdict:
    """Return the verdict of a run from its ``result.json``."""
    failures = result["failures"]
    return Verdict(
        folder=folder,
        status=result["status"],
        error=result["error"] or "",
        failures=len(failures),
        reasons=tuple(describe_failure(row) for row in failures[:SHOWN_FAILURES]),
        seconds=result["seconds"],
    )


def describe_failure(row: Mapping[str, Any]) -> str:
    """Return one failure of ``result.json`` as a line."""
    return (
        f"Client {row.get('client', '?')} failed in exchange {row.get('round', '?')} "
        f"({row.get('phase', '?')}): {headline(str(row.get('reason', '')))}"
    )


def read(line: str) -> str | Verdict | None:
    """Return what a line of the log announces: progress, the verdict, or neither.

    The words of `Announcer` are found behind the level that Flower's logger puts in front. A line
    that only looks like a verdict is none.
    """
    text = _LEVEL.sub("", plain(line), count=1)
    if text.startswith(MARK) or text == MARK.rstrip():
        return text[len(MARK) :]
    if not text.startswith(VERDICT):
        return None
    try:
        values = json.loads(text.removeprefix(VERDICT))
        values["reasons"] = tuple(map(str, values["reasons"]))
        found = Verdict(**values)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = (found.folder, str), (found.status, str), (found.error, str), (found.failures, int)
    return found if all(isinstance(value, kind) for value, kind in kinds) else None


def is_alarm(line: str) -> bool:
    """Return whether a line of the log is a warning or an error of Flower's logger."""
    return bool(re.match(r"(WARNING|ERROR|CRITICAL) *: {3,}", plain(line)))
