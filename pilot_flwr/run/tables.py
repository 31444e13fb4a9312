"""Tables of a run, made from its events: the timeline and the scores.

Everything here was observed: which parameters had a gradient is counted by the clients, bytes
are those of the serialised arrays in the messages, and what the server did is what its
aggregation returned.
"""

from collections import defaultdict
from collections.abc import Sequence

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.formatting import human_bytes
from pilot_flwr.metrics.registry import METRICS
from pilot_flwr.metrics.score import mean_of_all
from pilot_flwr.run.directory import Event, select, tasks_of


def timeline(events: Sequence[Event]) -> str:
    """Return a Markdown table with one row per exchange.

    Parameters
    ----------
    events : sequence of dict
        Lines of ``metrics.jsonl``.
    """
    rows = [
        [
            "exchange",
            "stage: clients",
            "parameters with gradients, per client",
            "sent down",
            "sent up",
            "server",
            "seconds",
        ]
    ]
    for closed in select(events, "round"):
        number = closed["round"]
        trained = select(events, "train", number)
        orders = select(events, "order", number)
        failures = select(events, "failure", number)
        rows.append(
            [
                f"{number} of {closed['exchanges']}",
                "<br>".join(_stages(trained)) + (f"<br>failed: {len(failures)}" * bool(failures)),
                "<br>".join(_gradients(trained)),
                "<br>".join(_bytes(orders, "down")),
                "<br>".join([*_bytes([*trained, *failures], "up"), *_spent(trained)]),
                "<br>".join(_server(select(events, "aggregate", number))),
                f"{closed['seconds']:.1f}",
            ]
        )
    for closed in select(events, "closing_evaluation"):
        # In earlier exchanges it is the clients that do not train that only evaluate.
        orders = [e for e in select(events, "order") if e["round"] > closed["round"]]
        scores = len(select(events, "evaluate", closed["round"]))
        down = "<br>".join(_bytes(orders, "down"))
        what = f"{len(orders)} clients"
        rows.append(
            ["evaluation", what, "none", down, f"{scores} scores", "", f"{closed['seconds']:.1f}"]
        )
    return (
        "# What happened\n\nOne row per exchange, from what the run observed. "
        "Bytes are those of the arrays, summed over the clients.\n\n" + markdown(rows)
    )


def summary(events: Sequence[Event], tasks: Sequence[str] = ()) -> str:
    """Return a Markdown table of scores: a row per task and their mean, a column per round.

    It does not depend on the order in which scores came in. There is no mean of a round in which
    a task of the run has no score.

    Parameters
    ----------
    events : sequence of dict
        Lines of ``metrics.jsonl``.
    tasks : sequence of str
        The rows' order; further tasks follow by name.
    """
    evaluated = sorted(select(events, "evaluate"), key=lambda event: str(event["client"]))
    if not evaluated:
        if any("epsilon" in event for event in select(events, "train")):
            return "No evaluation: a private run without `privacy.send_metrics` sends no scores.\n"
        return "No evaluation.\n"
    rounds = sorted({event["round"] for event in evaluated})
    scored = {event["task"] for event in evaluated}
    ordered = [*(task for task in tasks if task in scored), *sorted(scored - set(tasks))]
    header = ["task", "metric", "test examples"]
    for number in rounds:
        stages = sorted({str(event["stage"]) for event in select(events, "train", number)})
        title = f"exchange {number}" + (f" (stage {' and '.join(stages)})" if stages else "")
        header.append("zero-shot" if number == 0 else title)
    rows = [header]
    by_round: dict[int, dict[str, float]] = {number: {} for number in rounds}
    for task in ordered:
        mine = [event for event in evaluated if event["task"] == task]
        row = [
            task,
            _metric(mine),
            str(sum(e["examples"] for e in mine if e["round"] == rounds[0])),
        ]
        for number in rounds:
            score = _weighted_score([e for e in mine if e["round"] == number])
            row.append("–" if score is None else f"{score:.3f}")
            if score is not None:
                by_round[number][task] = score
        rows.append(row)
    means = [mean_of_all(by_round[number], tasks_of(events)) for number in rounds]
    cells = ("–" if mean is None else f"**{mean:.3f}**" for mean in means)
    rows.append(["**mean over tasks**", "", "", *cells])
    ranges = {METRICS[event["metric"]].maximum for event in evaluated}
    notes = []
    if len(ranges) > 1:
        notes.append("The metrics have different ranges: their mean is no figure to compare.")
    if cut := sum(event.get("cut", 0) for event in evaluated if event["round"] == rounds[-1]):
        notes.append(f"Of the last answers {cut} were cut off at `evaluation.max_new_tokens`.")
    return markdown(rows) + "".join(f"\n{note}\n" for note in notes)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, columns aligned; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _metric(events: Sequence[Event]) -> str:
    approximate = any(event.get("approximate") for event in events)
    return str(events[0]["metric"]) + (" (approximate)" if approximate else "")


def _weighted_score(events: Sequence[Event]) -> float | None:
    examples = sum(event["examples"] for event in events)
    if not examples:
        return None
    return float(sum(event["score"] * event["examples"] for event in events) / examples)


def _stages(trained: Sequence[Event]) -> list[str]:
    by_stage: dict[int, int] = defaultdict(int)
    for event in trained:
        by_stage[event["stage"]] += 1
    return [f"stage {stage}: {count} clients" for stage, count in sorted(by_stage.items())]


def _gradients(trained: Sequence[Event]) -> list[str]:
    """Return groups with the least and most parameters that had a gradient on a client."""
    seen: dict[str, list[int]] = {
        group: [event["gradients"].get(group, 0) for event in trained] for group in GROUPS
    }
    lines = []
    for group, row in GROUPS.items():
        counts = seen[group]
        if counts and max(counts) > 0:
            low, high = min(counts), max(counts)
            lines.append(
                f"{row.symbol} {high:,}" if low == high else f"{row.symbol} {low:,}–{high:,}"
            )
    return lines


def _bytes(events: Sequence[Event], way: str) -> list[str]:
    names = {"lora": "Θ_l", "task_adapters": "ψ_t", "residual": "R"}
    sums = {name: sum(e[way].get(name, 0) for e in events if way in e) for name in names}
    if not sums["residual"]:
        del sums["residual"]
    return [f"{names[name]} {human_bytes(size)}" for name, size in sums.items()]


def _spent(trained: Sequence[Event]) -> list[str]:
    """Return the largest ε that a client has spent in the run, if uploads were made private."""
    private = [event for event in trained if event.get("epsilon") is not None]
    if not private:
        return []
    most = max(private, key=lambda event: float(event["epsilon"]))
    return [f"ε <= {most['epsilon']:.4g} at δ {most['delta']:g}"]


def _server(aggregated: Sequence[Event]) -> list[str]:
    lines = []
    for event in aggregated:
        tasks = ", ".join(f"{task} of {len(c)}" for task, c in event["tasks"].items())
        others = sorted({len({*s} - {c}) for c, s in event["neighbors"].items()})
        if event["tasks"]:
            lines.append(f"averaged ψ_t: {tasks}")
        if event["neighbors"]:
            with_others = "–".join(map(str, others))
            lines.append(f"mixed {len(event['neighbors'])} Θ_l, each with {with_others} others")
    return lines
