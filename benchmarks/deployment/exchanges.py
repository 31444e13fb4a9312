"""Split the time of a deployed exchange into parts, from events, processes and a SuperNode's log.

The parts of an exchange with one client, in order::

    roster      the server queries the clients: a fresh process at the site answers
    poll        the instruction waits until the SuperNode asks for it, every 3 s
    launch      Flower's SuperExec, which asks for tasks at an interval, starts a process; meanwhile
                the SuperNode downloads the instruction
    python      that process: Python, Flower's imports
    app         it fetches the instruction, unpacks the bundle and imports the app; then it hands
                over to the warm service or, without one, imports torch
    base        the rest of the session: base model or switch to this client, data, private state
    work        evaluation and training
    reply       the result is packed and given to the SuperNode, which looks every 0.5 s
    upload      the SuperNode sends it; the server polls for it
    server      aggregation and events
    checkpoint  written before the next exchange begins

With several clients each part is their mean. The seconds without work are an exchange's wall time
minus the time in which at least one client worked.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Event = dict[str, Any]
Moments = Mapping[str, Sequence[tuple[float, str]]]
"""Client → (seconds since 1970, what) of its SuperNode and processes, see `MARKS`."""

PARTS = (
    "roster",
    "poll",
    "launch",
    "python",
    "app",
    "base",
    "work",
    "reply",
    "upload",
    "server",
    "checkpoint",
)

MARKS = {
    "receiving": "Receiving: train message",
    "running": "Start `flwr-clientapp` process",
    "sending": "Sending: train message",
}
"""Moments of a SuperNode's log, by its words; ``process`` is the start of a ClientApp's process."""


def measure_exchanges(
    events: Sequence[Event], began: float, moments: Moments
) -> list[dict[str, Any]]:
    """Split every exchange of a run.

    Parameters
    ----------
    events : sequence of dict
        The run's.
    began : float
        Seconds since 1970 from which `elapsed` counts.
    moments : Moments
        What happened at the clients.
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
            _client(s, scores.get(s["client"], 0.0), called, began, moments[s["client"]])
            for s in sessions
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
    session: Event,
    evaluation: float,
    called: float,
    began: float,
    moments: Sequence[tuple[float, str]],
) -> dict[str, float]:
    started = session["started"]
    ended = started + session["turn_seconds"]
    work = session["seconds"] + evaluation
    process = max(when for when, what in moments if what == "process" and when <= started)
    running = min(when for when, what in moments if what == "running" and when >= process)
    # A log is read a little late, and the process may start within these milliseconds.
    receiving = max(when for when, what in moments if what == "receiving" and when <= running)
    sending = min(when for when, what in moments if what == "sending" and when >= ended)
    return {
        "poll": receiving - called,
        "launch": process - receiving,
        "python": running - process,
        "app": started - running,
        "base": session["turn_seconds"] - work,
        "work": work,
        "reply": sending - ended,
        "upload": began + session["elapsed"] - sending,
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
