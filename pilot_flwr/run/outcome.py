"""Whether a run succeeded, and if not, who failed where and why, in a few lines.

Flower calls a run completed whatever its clients did, so that its word alone is not enough:
a run has succeeded if Flower says ``finished:completed`` and the ServerApp, as its last act,
wrote a ``result.json`` that says ``completed`` and names no failure.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot_flwr.formatting import headline, plain
from pilot_flwr.run.progress import EventTail

COMPLETED = "finished:completed"
SHOWN_FAILURES = 5
TAIL_LINES = 15


@dataclass(frozen=True)
class RunStatus:
    """What Flower says about a run.

    Parameters
    ----------
    status : str
        Flower's word, for instance ``running`` or ``finished:failed``; empty if unknown.
    details : str
        Flower's explanation, or what the launcher itself saw.
    lost : bool
        Whether a process of the simulation has gone without a word.
    """

    status: str
    details: str = ""
    lost: bool = False

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.status.startswith("finished")


@dataclass(frozen=True)
class Outcome:
    """Success or not, with the lines that explain a failure.

    `restartable` says that a process died, so that the run may go on from its last checkpoint.
    """

    succeeded: bool
    explanation: tuple[str, ...] = ()
    restartable: bool = False


def evaluate_outcome(status: RunStatus, folder: Path) -> Outcome:
    """Decide from Flower's status and the run folder whether a run can be trusted.

    Parameters
    ----------
    status : RunStatus
        The last one that was seen.
    folder : Path
        The run folder.

    Returns
    -------
    Outcome
        Of a failure, `explanation` has the reasons first and the logs' places last.
    """
    result, defect = _read_result(folder / "result.json")
    failures = _failures(result.get("failures"))
    reasons: list[str] = []
    explained = bool(failures or result.get("error") or "exception" in status.details)
    error = _reason(str(result.get("error") or ""))
    details = _reason(status.details).removeprefix("Simulation failed with exception: ")
    reasons += [error] if error else []
    if details not in ("", "N/A") and details not in error:  # the app's error says it already
        reasons.append(details)
    if status.status != COMPLETED:
        reasons.append(f"Flower's status of the run: {status.status or 'unknown'}.")
    if defect:
        reasons.append(defect)
        failures = failures or _reported(folder / "metrics.jsonl")
    elif result.get("status") != "completed":
        reasons.append(f"result.json says {result.get('status')!r}, not 'completed'.")
    if not isinstance(result.get("failures", []), list):
        reasons.append("result.json: `failures` is not a list.")
    if not reasons and not failures:
        return Outcome(succeeded=True)
    lines = [*_describe(failures), *dict.fromkeys(reasons)]
    if not explained:
        lines += _tail(folder / "logs" / "flower.log") or _tail(folder / "logs" / "superlink.log")
    restartable = status.lost or result.get("restartable") is True
    return Outcome(False, (*lines, f"Full log: {folder / 'logs' / 'flower.log'}"), restartable)


def _read_result(path: Path) -> tuple[dict[str, Any], str]:
    """Return the result, and what is wrong with the file (or nothing)."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "The ServerApp wrote no result.json: it did not reach its end."
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read: {error}."
    if not isinstance(result, dict):
        return {}, f"{path} is not a JSON object."
    if "failures" not in result:
        return result, f"{path} has no list of `failures`."
    return result, ""


def _failures(value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        return []
    return [row if isinstance(row, dict) else {"reason": str(row)} for row in value]


def _reported(metrics: Path) -> list[Mapping[str, Any]]:
    """Failures that were reported as they happened, for a run that left no result."""
    return [event for event in EventTail(metrics).read() if event.get("event") == "failure"]


def _describe(failures: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"Client {row.get('client', '?')} failed in exchange {row.get('round', '?')} "
        f"({row.get('phase', '?')}): {headline(str(row.get('reason', '')))}"
        for row in failures[:SHOWN_FAILURES]
    ]
    if len(failures) > SHOWN_FAILURES:
        lines.append(f"... and {len(failures) - SHOWN_FAILURES} more failures.")
    return lines


def _reason(text: str) -> str:
    """Keep a short reason whole; of a traceback or a long text keep the line that matters."""
    text = plain(text).strip()
    return headline(text) if 'File "' in text or text.count("\n") > TAIL_LINES else text


def _tail(path: Path) -> list[str]:
    """Return the end of a log, indented, or nothing if there is no log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in plain(text).splitlines() if line.strip()]
    if not lines:
        return []
    return [f"The end of {path.name}:", *(f"  | {line}" for line in lines[-TAIL_LINES:])]
