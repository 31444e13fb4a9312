"""Time parts alternately, so that other load on the machine affects all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Times = dict[str, dict[str, list[float]]]
"""``wall`` and ``cpu`` → part → seconds of each of its runs."""


def take_turns(
    parts: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    synchronize: Callable[[], None] = lambda: None,
) -> Times:
    """Run all parts one after the other, `repeats` times over, after one warm-up round.

    Parameters
    ----------
    parts : mapping
        Functions to time, by name.
    repeats : int
        Timed runs of each part.
    synchronize : callable
        Waits for the device; called before the clock is read.
    """
    times: Times = {clock: {name: [] for name in parts} for clock in ("wall", "cpu")}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            part()
            synchronize()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repeat > 0:
                times["wall"][name].append(wall)
                times["cpu"][name].append(cpu)
    return times


def summarize(times: Times, ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return median seconds of the parts, and medians and ranges of the ratios in each turn.

    Parameters
    ----------
    times : Times
        From `take_turns`.
    ratios : mapping
        Name of a ratio → its numerator and denominator.
    """
    summary = {}
    for clock, seconds in times.items():
        found = {
            name: [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
            for name, (above, below) in ratios.items()
        }
        summary[clock] = {
            "median_seconds": {n: _short(statistics.median(v)) for n, v in seconds.items()},
            "ratio": {n: _short(statistics.median(v)) for n, v in found.items()},
            "ratio_range": {n: [_short(min(v)), _short(max(v))] for n, v in found.items()},
        }
    return summary


def _short(value: float) -> float:
    return float(f"{value:.4g}")
