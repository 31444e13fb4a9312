"""Tables of a run from its events: the timeline and the scores, as rows and as Markdown.

Everything here was observed: clients count the parameters that had a gradient, bytes are those of
the serialised arrays in the messages, and what the server did is what its aggregation returned.
"""

from collections import Counter
from collections.abc import Sequence

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.formatting import human_bytes
from pilot_flwr.metrics import METRICS
from pilot_flwr.run.events import (
    Aggregated,
    AggregationMethod,
    ClientFailed,
    Evaluated,
    EvaluationClosed,
    Event,
    ExchangeClosed,
    InstructionSent,
    Trained,
    aggregation_lines,
    bytes_down,
    bytes_up,
    mean_over_tasks,
    select,
    symbol,
    task_scores,
    tasks_of,
)

Rows = list[list[str]]
"""The header first; a cell may have several lines."""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, columns aligned; the first row is the header."""
    cells = [[cell.replace("\n", "<br>") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def timeline(events: Sequence[Event], method: AggregationMethod | None = None) -> str:
    """Return `timeline_rows` as Markdown, under a heading."""
    return (
        "# What happened\n\nOne row per exchange, from what the run observed. "
        "Bytes are those of the arrays, summed over the clients.\n\n"
        + markdown(timeline_rows(events, method))
    )


def timeline_rows(events: Sequence[Event], method: AggregationMethod | None = None) -> Rows:
    """Return one row per exchange, and one for the closing evaluation.

    `method` is the run's, for aggregations that do not record theirs.
    """
    header = ["exchange", "stage: clients", "parameters with gradients, per client"]
    rows = [[*header, "sent down", "sent up", "server", "seconds"]]
    for closed in select(events, ExchangeClosed):
        number = closed.exchange
        trained = select(events, Trained, number)
        failed = select(events, ClientFailed, number)
        aggregated = select(events, Aggregated, number)
        stages = sorted(Counter(event.stage for event in trained).items())
        rows.append(
            [
                f"{number} of {closed.exchanges}",
                "\n".join(
                    [f"stage {stage}: {clients} clients" for stage, clients in stages]
                    + [f"failed: {len(failed)}"] * bool(failed)
                ),
                "\n".join(_gradients(trained)),
                "\n".join(_bytes(bytes_down(events, number))),
                "\n".join([*_bytes(bytes_up(events, number)), *_spent(trained)]),
                "\n".join(aggregation_lines(aggregated[-1] if aggregated else None, method)),
                f"{closed.seconds:.1f}",
            ]
        )
    for ended in select(events, EvaluationClosed):
        # In earlier exchanges it is the clients that do not train that only evaluate.
        sent = [e for e in select(events, InstructionSent) if e.exchange > ended.exchange]
        scores = f"{len(select(events, Evaluated, ended.exchange))} scores"
        down = "\n".join(_bytes(bytes_down(sent)))
        clients = f"{len(sent)} clients"
        rows.append(["evaluation", clients, "none", down, scores, "", f"{ended.seconds:.1f}"])
    return rows


def summary(events: Sequence[Event], tasks: Sequence[str] = ()) -> str:
    """Return `summary_rows` as Markdown, the mean in bold, with `summary_notes` below."""
    notes = "\n".join(f"{note}\n" for note in summary_notes(events))
    rows = summary_rows(events, tasks)
    if not rows:
        return notes
    rows[-1] = [cell if cell in ("", "–") else f"**{cell}**" for cell in rows[-1]]
    return "\n".join(filter(None, (markdown(rows), notes)))


def summary_rows(events: Sequence[Event], tasks: Sequence[str] = ()) -> Rows:
    """Return the scores: a row per task, the last for their mean, and a column per exchange.

    Rows follow the order of `tasks`, further ones are sorted; there are none without a score. An
    exchange in which a task of the run has no score has no mean.
    """
    evaluated = sorted(select(events, Evaluated), key=lambda event: event.client)
    numbers = sorted({event.exchange for event in evaluated})
    if not numbers:
        return []
    scores = {number: task_scores(evaluated, number) for number in numbers}
    scored = {event.task for event in evaluated}
    header = ["task", "metric", "test examples"]
    for number in numbers:
        stages = sorted({str(event.stage) for event in select(events, Trained, number)})
        title = f"exchange {number}" + (f" (stage {' and '.join(stages)})" if stages else "")
        header.append(title if number else "zero-shot")
    rows = [header]
    for task in [*(t for t in tasks if t in scored), *sorted(scored - set(tasks))]:
        mine = [event for event in evaluated if event.task == task]
        metric = mine[0].metric + " (approximate)" * any(event.approximate for event in mine)
        examples = sum(event.examples for event in mine if event.exchange == numbers[0])
        rows.append([task, metric, str(examples), *(_score(scores[n].get(task)) for n in numbers)])
    means = (mean_over_tasks(scores[number], tasks_of(events)) for number in numbers)
    return [*rows, ["mean over tasks", "", "", *map(_score, means)]]


def summary_notes(events: Sequence[Event]) -> list[str]:
    """Return what has to be said about the scores."""
    evaluated = select(events, Evaluated)
    if not evaluated:
        if any(event.epsilon is not None for event in select(events, Trained)):
            return ["No evaluation: a private run without `privacy.send_metrics` sends no scores."]
        return ["No evaluation."]
    notes = []
    if len({METRICS[event.metric].maximum for event in evaluated}) > 1:
        notes.append("The metrics have different ranges: their mean is not comparable.")
    last = max(event.exchange for event in evaluated)
    if cut := sum(event.cut for event in evaluated if event.exchange == last):
        notes.append(f"Of the last answers {cut} were cut off at `evaluation.max_new_tokens`.")
    return notes


def _score(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"


def _gradients(trained: Sequence[Trained]) -> list[str]:
    """Return the groups with the fewest and most parameters that had a gradient on a client."""
    lines = []
    for group, row in GROUPS.items():
        counts = [event.gradients.get(group, 0) for event in trained]
        if any(counts):
            low, high = min(counts), max(counts)
            lines.append(
                f"{row.symbol} {high:,}" if low == high else f"{row.symbol} {low:,}–{high:,}"
            )
    return lines


def _bytes(sizes: dict[str, int]) -> list[str]:
    shown = {"lora": 0, "task_adapters": 0} | sizes
    return [f"{symbol(part)} {human_bytes(size)}" for part, size in shown.items()]


def _spent(trained: Sequence[Trained]) -> list[str]:
    """Return the largest ε that a client has spent in the run, if uploads were made private."""
    spent = [(e.epsilon, e.delta) for e in trained if e.epsilon is not None and e.delta is not None]
    return [f"ε <= {max(spent)[0]:.4g} at δ {max(spent)[1]:g}"] if spent else []
