"""Split the time of a deployed exchange into parts, from the run's events and processes.

The parts of an exchange with one client, in order::

    roster      the server queries the clients: a fresh process at the site answers
    dispatch    the instruction travels until the site's next process begins
    start       that process: Python, imports, fetching the instruction, reading the settings
    base        the rest of its session: base model, data, private state
    work        evaluation and training
    reply       the result is packed, sent and fetched; the server polls for it
    server      aggregation and events
    checkpoint  written before the next exchange begins

With several clients each part is their mean. The seconds without work are an exchange's wall time
minus the time in which at least one client worked.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Event = dict[str, Any]
Lives = Mapping[str, Sequence[float]]
"""Client → start of each of its processes, in seconds since 1970."""

PARTS = ("roster", "dispatch", "start", "base", "work", "reply", "server", "checkpoint")


def measure_exchanges(events: Sequence[Event], began: float, lives: Lives) -> list[dict[str, Any]]:
    """Split every exchange of a run.

    Parameters
    ----------
    events : sequence of dict
        The run's.
    began : float
        Seconds since 1970 from which `elapsed` counts.
    lives : Lives
        The clients' processes.
    """
    ends = {e["round"]: began + e["elapsed"] for e in events if e["event"] == "round"}
    found = []
    for closed in (e for e in events if e["event"] == "round"):
        number = closed["round"]
        own = [e for e in events if e.get("round") == number]
        scores = {e["client"]: e["seconds"] for e in events if _evaluated(e, number - 1)}
        begin = ends[number] - closed["seconds"]
        following = [e for e in events if e["event"] == "round" and e["round"] == number + 1]
        checkpoint = [ends[number + 1] - e["seconds"] - ends[number] for e in following]
        called = began + next(e["elapsed"] for e in own if e["event"] == "roster")
        sessions = [e for e in own if e["event"] == "train"]
        came = [began + session["elapsed"] for session in sessions]
        clients = [
            _client(session, scores.get(session["client"], 0.0), called, began, lives)
            for session in sessions
        ]
        parts = {name: mean(client[name] for client in clients) for name in clients[0]}
        parts |= {"roster": called - begin, "server": ends[number] - max(came)}
        if checkpoint:
            parts["checkpoint"] = checkpoint[0]
        wall = closed["seconds"] + sum(checkpoint)
        work = _union([i for s in sessions for i in _intervals(s, scores.get(s["client"], 0.0))])
        found.append(
            {
                "exchange": number,
                "clients": len(sessions),
                "wall_seconds": round(wall, 2),
                "without_work_seconds": round(wall - work, 2),
                "parts_seconds": {n: round(parts[n], 2) for n in PARTS if n in parts},
            }
        )
    return found


def _client(
    session: Event, evaluation: float, called: float, began: float, lives: Lives
) -> dict[str, float]:
    started, seconds = session["started"], session["turn_seconds"]
    process = max(moment for moment in lives[session["client"]] if moment <= started)
    work = session["seconds"] + evaluation
    return {
        "dispatch": process - called,
        "start": started - process,
        "base": seconds - work,
        "work": work,
        "reply": began + session["elapsed"] - started - seconds,
    }


def _evaluated(event: Event, number: int) -> bool:
    return event["event"] == "evaluate" and event["round"] == number


def _intervals(session: Event, evaluation: float) -> list[tuple[float, float]]:
    """Return when a client worked: training ends its session, evaluation precedes it.

    The events do not record when the evaluation began; it is assumed directly before the training.
    """
    ended = session["started"] + session["turn_seconds"]
    return [(ended - session["seconds"] - evaluation, ended)]


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the length of the intervals' union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
