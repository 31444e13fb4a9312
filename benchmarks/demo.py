"""Record a demo run's scores, timeline, and share of time without any client at work.

Goal: at most 15 % of every exchange after the first one, which also starts Ray and loads torch and
the base in every worker. The rest is roster, messages, Flower's scheduling, the swap of adapters,
the clients' files, aggregation and checkpoint.

Run ``python benchmarks/demo.py RUN_FOLDER`` on the folder of a finished run to update
``benchmarks/results/demo.json``, or ``--quick`` without a folder for a smoke test. The closing
evaluation belongs to no exchange and is not counted.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from _record import RESULTS, write_record

Event = dict[str, Any]
Interval = tuple[float, float]

RESULT = RESULTS / "demo.json"


def read_events(folder: Path) -> list[Event]:
    """Read the events of a finished run.

    Raises
    ------
    SystemExit
        The run has not completed.
    """
    result = folder / "result.json"
    if not result.exists() or json.loads(result.read_text())["status"] != "completed":
        raise SystemExit(f"{folder} holds no completed run.")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def union_seconds(intervals: Sequence[Interval]) -> float:
    """Return the length of the intervals' union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def busy_intervals(turn: Event, evaluation: Event | None) -> list[Interval]:
    """Return when a client evaluated and trained in its session, in seconds since 1970.

    The events say how long; a turn is loading, evaluation, swap, training, saving, in this order.
    Evaluation is set at the turn's beginning and training at its end: the time between them is
    what neither of them took.
    """
    started, ended = turn["started"], turn["started"] + turn["turn_seconds"]
    intervals = [(ended - turn["seconds"], ended)]
    if evaluation is not None:
        intervals.append((started, started + evaluation["seconds"]))
    return intervals


def measure_exchange(events: Sequence[Event], number: int) -> dict[str, Any]:
    """Compare one exchange's wall time with the clients' busy times."""
    (closed,) = (e for e in events if e["event"] == "round" and e["round"] == number)
    sessions = [e for e in events if e["event"] == "train" and e["round"] == number]
    # In an exchange a client evaluates the model of the previous one.
    scores = {
        e["client"]: e for e in events if e["event"] == "evaluate" and e["round"] == number - 1
    }
    busy = [i for e in sessions for i in busy_intervals(e, scores.get(e["client"]))]
    inside = [(e["started"], e["started"] + e["turn_seconds"]) for e in sessions]
    wall = closed["seconds"]
    (aggregation,) = (e for e in events if e["event"] == "aggregate" and e["round"] == number)
    return {
        "exchange": number,
        "clients": len(sessions),
        "wall_seconds": round(wall, 3),
        "idle_share": round(1 - union_seconds(busy) / wall, 4),
        "outside_turns_share": round(1 - union_seconds(inside) / wall, 4),
        "before_first_and_after_last_turn_seconds": round(
            wall - (max(last for _, last in inside) - min(first for first, _ in inside)), 3
        ),
        "aggregation_seconds": round(aggregation["seconds"], 3),
        "mean_busy_workers": round(sum(last - first for first, last in busy) / wall, 3),
    }


def measure(folder: Path) -> dict[str, Any]:
    """Measure all exchanges of a run."""
    events = read_events(folder)
    numbers = sorted(e["round"] for e in events if e["event"] == "round")
    exchanges = [measure_exchange(events, number) for number in numbers]
    later = exchanges[1:]
    wall = sum(e["wall_seconds"] for e in later)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return {
        "run": {"name": config["name"], "seed": config["seed"], "exchanges": len(exchanges)},
        "summary": (folder / "summary.md").read_text(),
        "timeline": (folder / "timeline.md").read_text(),
        "goals": {"idle_share_after_first": 0.15},
        "first_exchange": exchanges[0],
        "later_exchanges": later,
        "idle_share_after_first": {
            "overall": round(sum(e["idle_share"] * e["wall_seconds"] for e in later) / wall, 4),
            "largest": max(e["idle_share"] for e in later),
        },
    }


def make_example(folder: Path) -> None:
    """Write a run of two exchanges of 10 s: 8 s busy, in the second one two clients at a time."""
    events: list[Event] = []
    for number, starts in ((1, (100.0, 104.0)), (2, (111.0, 111.0))):
        for client, start in zip("ab", starts, strict=True):
            share = {"event": "train", "round": number, "client": client, "started": start}
            seconds = 4.0 * number
            events.append(share | {"turn_seconds": seconds, "seconds": 0.75 * seconds})
            events.append(
                {
                    "event": "evaluate",
                    "round": number - 1,
                    "client": client,
                    "seconds": 0.25 * seconds,
                }
            )
        events.append({"event": "aggregate", "round": number, "seconds": 0.5})
        events.append({"event": "round", "round": number, "seconds": 10.0})
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "result.json").write_text('{"status": "completed"}')
    (folder / "config.yaml").write_text("name: example\nseed: 0\n")
    for table in ("summary", "timeline"):
        (folder / f"{table}.md").write_text(f"# {table}\n\n| a |\n|---|\n")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="folder of a finished run")
    parser.add_argument("--quick", action="store_true", help="a made-up run, write nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.quick:
        with tempfile.TemporaryDirectory() as name:
            make_example(Path(name))
            results = measure(Path(name))
    elif options.folder is None:
        parser.error("give the folder of a finished run, or --quick")
    else:
        results = measure(options.folder)
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(options.output, results, packages=["flwr", "ray", "torch"])
    return results


if __name__ == "__main__":
    main()
