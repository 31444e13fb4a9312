"""Decide whether a run succeeded, and explain a failure in a few lines.

Flower calls a run completed even if clients failed. A run has succeeded if Flower's status is
``finished:completed`` and the ServerApp reported ``completed`` without failures at its end: in
``result.json``, or in its log if the run folder is on another machine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilot_flwr.formatting import headline, plain
from pilot_flwr.run.events import ClientFailed, failure_line, select
from pilot_flwr.run.progress import EventTail

COMPLETED = "finished:completed"
SHOWN_FAILURES = 5
TAIL_LINES = 15


@dataclass(frozen=True)
class RunStatus:
    """Flower's status of a run.

    `status` is for instance ``running`` or ``finished:failed``, empty if unknown; `details` is
    Flower's explanation or the launcher's observation; `lost` means that a process died.
    """

    status: str
    details: str = ""
    lost: bool = False

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return self.status.startswith("finished")


@dataclass(frozen=True)
class RunResult:
    """How a run ended, as its ServerApp reports it.

    `folder` is the run folder on the server, `status` is ``completed`` or ``failed``, `failures`
    counts the clients' failures in all exchanges and `reasons` has one line for each of the first.
    """

    folder: str
    status: str
    error: str
    failures: int
    reasons: tuple[str, ...]
    seconds: float

    @classmethod
    def of(cls, folder: Path, result: Mapping[str, Any]) -> "RunResult":
        """Return the result of a ``result.json``, in which any key may be missing."""
        rows = result.get("failures")
        rows = rows if isinstance(rows, list) else []
        seconds = result.get("seconds")
        return cls(
            folder=str(folder),
            status=str(result.get("status")),
            error=str(result.get("error") or ""),
            failures=len(rows),
            reasons=tuple(_describe(row) for row in rows[:SHOWN_FAILURES]),
            seconds=seconds if isinstance(seconds, int | float) else 0.0,
        )


@dataclass(frozen=True)
class Outcome:
    """Success, or failure with the lines that explain it.

    `restartable` means that a process died, so that the run may resume from its last checkpoint.
    """

    succeeded: bool
    explanation: tuple[str, ...] = ()
    restartable: bool = False


def evaluate_outcome(status: RunStatus, folder: Path) -> Outcome:
    """Decide from Flower's last status and the files of the run folder."""
    content, defect = _read(folder / "result.json")
    result = RunResult.of(folder, content)
    explained = bool(result.failures or result.error or "exception" in status.details)
    if defect and not result.failures:  # fall back to the failures among the events
        failed = select(EventTail(folder / "metrics.jsonl").read(), ClientFailed)
        lines = tuple(event.line for event in failed[:SHOWN_FAILURES])
        result = replace(result, failures=len(failed), reasons=lines)
    log = folder / "logs" / "flower.log"
    outcome = evaluate_result(status, result, f"Full log: {log}", defect=defect)
    if outcome.succeeded:
        return outcome
    explanation = outcome.explanation
    if not explained:  # earlier failures of clients do not explain why a run died
        tail = _tail(log) or _tail(log.with_name("superlink.log"))
        explanation = (*explanation[:-1], *tail, explanation[-1])
    restartable = status.lost or content.get("restartable") is True
    return Outcome(False, explanation, restartable)


def evaluate_result(
    status: RunStatus, result: RunResult | None, full_log: str, *, defect: str = ""
) -> Outcome:
    """Decide from Flower's last status and the ServerApp's result, None if it sent none.

    `full_log` is the explanation's last line; `defect` is why the result cannot be trusted.
    """
    if result is None:
        result = RunResult("", "", "", 0, (), 0.0)
        defect = defect or "The ServerApp's log has no result: it did not reach its end."
    error = _reason(result.error)
    reasons = [error] if error else []
    details = _reason(status.details).removeprefix("Simulation failed with exception: ")
    if details not in ("", "N/A") and details not in error:  # the app's error says it already
        reasons.append(details)
    if status.status != COMPLETED:
        reasons.append(f"Flower's status of the run: {status.status or 'unknown'}.")
    if defect:
        reasons.append(defect)
    elif result.status != "completed":
        reasons.append(f"The ServerApp's result is {result.status!r}, not 'completed'.")
    if not reasons and not result.failures:
        return Outcome(succeeded=True)
    lines = list(result.reasons)
    if (more := result.failures - len(lines)) > 0:
        lines.append(f"... and {more} more failures.")
    return Outcome(False, tuple(dict.fromkeys([*lines, *reasons, full_log])))


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Return the result, and the file's defect or an empty string."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "The ServerApp wrote no result.json: it did not reach its end."
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path} cannot be read: {error}."
    if not isinstance(result, dict):
        return {}, f"{path} is not a JSON object."
    if not isinstance(result.get("failures"), list):
        return result, f"{path} has no list of `failures`."
    return result, ""


def _describe(row: object) -> str:
    row = row if isinstance(row, dict) else {"reason": row}
    return failure_line(*(row.get(key, "?") for key in ("client", "round", "phase", "reason")))


def _reason(text: str) -> str:
    """Return a short reason unchanged, and the `headline` of a traceback or long text."""
    text = plain(text).strip()
    return headline(text) if 'File "' in text or text.count("\n") > TAIL_LINES else text


def _tail(path: Path) -> list[str]:
    """Return the end of a log, indented; empty if there is no log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in plain(text).splitlines() if line.strip()]
    if not lines:
        return []
    return [f"The end of {path.name}:", *(f"  | {line}" for line in lines[-TAIL_LINES:])]
