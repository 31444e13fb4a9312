"""A run's tables, as rows and as Markdown: the timeline and the scores.

All figures are observations: clients count the parameters that had a gradient, bytes are those of
the serialised arrays in the messages, and aggregations are described from what they returned.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.formatting import count, human_bytes
from pilot_flwr.metrics import METRICS
from pilot_flwr.run.aggregations import mixing
from pilot_flwr.run.events import (
    Aggregated,
    AggregationMethod,
    Evaluated,
    EvaluationClosed,
    Event,
    ExchangeClosed,
    InstructionSent,
    RosterCalled,
    Trained,
    select,
)
from pilot_flwr.run.history import (
    MEAN,
    clients_by_task,
    gradients,
    observe,
    observe_all,
    score_curves,
    scores_by_task,
)

PART_GROUPS = {"lora": "lora", "task_adapters": "own_task_adapter", "residual": "residual"}
"""Part of a message → the group of parameters that it carries."""

MOST_CLIENTS = 20
"""Maximum number of clients shown one by one; more are summarised by task."""

MOST_NAMED = 5
"""Maximum number of clients named in a line."""

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
    observed = observe_all(events)
    for closed in select(events, ExchangeClosed):
        seen = observed[closed.exchange]
        clients = [f"stage {n}: {len(trained)} clients" for n, trained in seen.stages.items()]
        clients += [f"failed: {seen.failures}"] * bool(seen.failures)
        cells = [
            clients,
            [f"{symbol(group)} {span(n)}" for group, n in gradients(seen.trained).items()],
            _bytes(seen.down),
            [*_bytes(seen.up), *_privacy(seen.trained)],
            aggregation_lines(seen.aggregated, method),
        ]
        name = f"{seen.number} of {closed.exchanges}"
        rows.append([name, *map("\n".join, cells), f"{closed.seconds:.1f}"])
    for ended in select(events, EvaluationClosed):
        # In earlier exchanges, clients that do not train only evaluate.
        seen = observe(events, ended.exchange + 1)
        sent = f"{len(select(events, InstructionSent, seen.number))} clients"
        scores = f"{len(select(events, Evaluated, ended.exchange))} scores"
        down = "\n".join(_bytes(seen.down))
        rows.append(["evaluation", sent, "none", down, scores, "", f"{ended.seconds:.1f}"])
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
    """Return one row per task with its score after each exchange, and one for their mean.

    Rows follow the order of `tasks`, further ones are sorted. A score of only some of the task's
    clients has their number beside it. Without scores there are no rows, and an exchange in which a
    task of the run has no score has no mean.
    """
    evaluated = select(events, Evaluated)
    if not evaluated:
        return []
    numbers = sorted({event.exchange for event in evaluated})
    header = ["task", "metric", "test examples"]
    observed = observe_all(events)
    for number in numbers:
        stages = " and ".join(map(str, observed[number].stages)) if number in observed else ""
        title = f"exchange {number}" + (f" (stage {stages})" if stages else "")
        header.append(title if number else "zero-shot")
    rows = [header]
    curves = score_curves(events)
    by_task = scores_by_task(events)
    clients = clients_by_task(events)
    for task in [*(t for t in tasks if t in by_task), *sorted(by_task.keys() - set(tasks))]:
        mine = by_task[task]
        all_mine = [event for found in mine.values() for event in found]
        metric = all_mine[0].metric + " (approximate)" * any(e.approximate for e in all_mine)
        examples = sum(event.examples for event in mine.get(numbers[0], []))
        cells = _scores(curves.get(task, {}), numbers)
        for place, number in enumerate(numbers):
            scored = len({event.client for event in mine.get(number, [])})
            if 0 < scored < len(clients[task]):
                cells[place] += f" ({scored} of {len(clients[task])})"
        rows.append([task, metric, str(examples), *cells])
    return [*rows, [MEAN, "", "", *_scores(curves.get(MEAN, {}), numbers)]]


def summary_notes(events: Sequence[Event]) -> list[str]:
    """Return remarks on the scores."""
    evaluated = select(events, Evaluated)
    if not evaluated:
        if any(event.epsilon is not None for event in select(events, Trained)):
            return ["No evaluation: a private run without `privacy.send_metrics` sends no scores."]
        return ["No evaluation."]
    notes = []
    if len({METRICS[event.metric].maximum for event in evaluated}) > 1:
        notes.append("The metrics have different ranges: their mean is not comparable.")
    if any(event.available for event in select(events, RosterCalled)):
        notes.append(f"Scores are of the clients drawn: {_coverage(events)}.")
    last = max(event.exchange for event in evaluated)
    if cut := sum(event.cut for event in evaluated if event.exchange == last):
        notes.append(
            f"{cut} answers of the last evaluation were cut off at `evaluation.max_new_tokens`."
        )
    return notes


def _coverage(events: Sequence[Event]) -> str:
    """Return how many clients the scores after each exchange cover, and how many there are."""
    known = [sum((e.available or {}).values()) for e in select(events, RosterCalled)]
    scored = Counter(event.exchange for event in select(events, Evaluated))
    parts = (
        f"{n} after exchange {number}" if number else f"{n} in zero-shot"
        for number, n in sorted(scored.items())
    )
    return ", ".join(parts) + f", of {max(known)} clients available"


def aggregation_lines(
    event: Aggregated | None,
    method: AggregationMethod | None = None,
    *,
    width: int | None = None,
) -> list[str]:
    """Describe what the server did with the updates of an exchange.

    `method` is the run's, for an event that does not record it. With a `width`, several groups are
    listed by their sizes, in at most that many characters, instead of by name.
    """
    mixed = None if event is None else mixing(event)
    if event is None or not (event.tasks or mixed):
        return ["no aggregation"]
    method = event.method or method
    adam = method is not None and method.optimizer == "adam"
    if method is not None and method.trained_by == "pooled" and not adam:
        return ["takes the pooled client's parameters"]
    verb = "steps by Adam:" if adam else "averages"
    lora = symbol("lora")
    lines = []
    if event.tasks:
        lines.append(f"{verb} {symbol('task_adapters')} {_groups(event.tasks, width)}")
    if mixed and (method is None or method.lora == "adaptive" or not mixed.groups):
        others = "–".join(map(str, sorted({mixed.fewest_others, mixed.most_others})))
        mixes = "mixes" if method else "combines"
        verb = f"steps by Adam: {mixes} of" if adam else mixes
        lines.append(f"{verb} {mixed.loras} {lora}, each with {others} others")
    elif mixed and method is not None:
        matrices = {"A": "A of ", "B": "B of "}.get(method.matrices, "")
        rest = f", the rest in {symbol('residual')}" if method.lora == "exact" else ""
        members = _sizes(mixed.groups, 10 if width is None else width)
        lines.append(f"{verb} {matrices}{lora} {members}{rest}")
    return lines


def _groups(groups: Mapping[str, Sequence[str]], width: int | None) -> str:
    if width is None and len(groups) > 1:
        return "per task: " + ", ".join(f"{task} of {len(c)}" for task, c in groups.items())
    return _sizes([len(clients) for clients in groups.values()], width or 0)


def _sizes(groups: Sequence[int], width: int) -> str:
    if len(groups) == 1:
        return f"of {count(groups[0], 'client')}"
    sizes = ", ".join(map(str, groups))
    return f"per task, of {sizes} clients" if len(sizes) <= width else f"in {len(groups)} tasks"


def names(shown: Sequence[str]) -> str:
    """Return a list as text, of many the first `MOST_NAMED` and the number of the others."""
    more = f", and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
    return ", ".join(shown[:MOST_NAMED]) + more


def symbol(name: str) -> str:
    """Return the symbol of a group of parameters or of a part of a message, else its name."""
    symbols: dict[str, str] = {group: row.symbol for group, row in GROUPS.items()}
    return symbols.get(PART_GROUPS.get(name, name), name)


def span(numbers: tuple[int, int]) -> str:
    """Return the fewest and the most of something as text."""
    low, high = numbers
    return f"{high:,}" if low == high else f"{low:,}–{high:,}"


def score_text(score: float | None) -> str:
    """Format a score, or that there is none."""
    return "–" if score is None else f"{score:.3f}"


def _scores(curve: Mapping[int, float], numbers: Sequence[int]) -> list[str]:
    return [score_text(curve.get(number)) for number in numbers]


def _bytes(sizes: dict[str, int]) -> list[str]:
    shown = {"lora": 0, "task_adapters": 0} | sizes
    return [f"{symbol(part)} {human_bytes(size)}" for part, size in shown.items()]


def _privacy(trained: Sequence[Trained]) -> list[str]:
    """Return the largest ε that a client has spent in the run, if uploads were privatised."""
    spent = [(e.epsilon, e.delta) for e in trained if e.epsilon is not None and e.delta is not None]
    return [f"ε <= {max(spent)[0]:.4g} at δ {max(spent)[1]:g}"] if spent else []
