"""Where the seconds of a deployed exchange go, from the run's events and its processes' lives.

An exchange of one client is, one after the other::

    roster      the server asks who is there: a fresh process at the site answers
    dispatch    the order's way until the site's next process begins
    start       that process: Python, imports, fetching the order, reading the settings
    base        its turn without work: the base model, data, private state
    work        evaluation and training
    reply       what was trained is packed, sent and fetched; the server polls for it
    server      aggregation and events
    checkpoint  written before the next exchange begins

With several clients the parts of each are averaged, and what all of them wait for is larger: the
seconds without work of an exchange are its wall time less the time in which a client worked.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Event = dict[str, Any]
Lives = Mapping[str, Sequence[float]]
"""Client → when each of its processes began, in seconds since 1970."""

PARTS = ("roster", "dispatch", "start", "base", "work", "reply", "server", "checkpoint")


def measure_exchanges(events: Sequence[Event], began: float, lives: Lives) -> list[dict[str, Any]]:
    """Measure every exchange of a run.

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
        turns = [e for e in own if e["event"] == "train"]
        came = [began + turn["elapsed"] for turn in turns]
        clients = [
            _client(turn, scores.get(turn["client"], 0.0), called, began, lives) for turn in turns
        ]
        parts = {name: mean(client[name] for client in clients) for name in clients[0]}
        parts |= {"roster": called - begin, "server": ends[number] - max(came)}
        if checkpoint:
            parts["checkpoint"] = checkpoint[0]
        wall = closed["seconds"] + sum(checkpoint)
        work = _union([i for t in turns for i in _intervals(t, scores.get(t["client"], 0.0))])
        found.append(
            {
                "exchange": number,
                "clients": len(turns),
                "wall_seconds": round(wall, 2),
                "without_work_seconds": round(wall - work, 2),
                "parts_seconds": {n: round(parts[n], 2) for n in PARTS if n in parts},
            }
        )
    return found


def _client(
    turn: Event, evaluation: float, called: float, began: float, lives: Lives
) -> dict[str, float]:
    started, seconds = turn["started"], turn["turn_seconds"]
    process = max(moment for moment in lives[turn["client"]] if moment <= started)
    work = turn["seconds"] + evaluation
    return {
        "dispatch": process - called,
        "start": started - process,
        "base": seconds - work,
        "work": work,
        "reply": began + turn["elapsed"] - started - seconds,
    }


def _evaluated(event: Event, number: int) -> bool:
    return event["event"] == "evaluate" and event["round"] == number


def _intervals(turn: Event, evaluation: float) -> list[tuple[float, float]]:
    """Return when a client worked: training ends its turn, evaluation comes before it.

    The events do not say when the evaluation began; it is set right before the training.
    """
    ended = turn["started"] + turn["turn_seconds"]
    return [(ended - turn["seconds"] - evaluation, ended)]


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    """Return how long at least one of the intervals runs."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
