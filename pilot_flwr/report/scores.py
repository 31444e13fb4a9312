"""Learning curves: scores over exchanges, per task and client.

Losses by part over exchanges: what each adds to the total, and each part by itself.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes

from pilot_flwr.config.schema import TrainConfig
from pilot_flwr.report.history import RunData
from pilot_flwr.report.style import (
    GREY,
    INK,
    Figure,
    Panel,
    Table,
    bar_edges,
    colour,
    exchange_axis,
    in_lines,
    legend_below,
    marker,
    math_text,
    panel_size,
    title,
)
from pilot_flwr.run.directory import Event, select

_MOST_COLOURED = 8
"""Clients of a task that have a colour of their own; more are drawn in grey."""


def learning_curves(run: RunData) -> Figure:
    """Return one panel for the tasks and their mean, and one for the clients of each task."""
    if not any(run.task_scores(task) for task in run.tasks):
        return Figure(
            "learning-curves", "Learning curves", "No client was evaluated: there is no score."
        )
    one = len({run.metric(task) for task in run.tasks}) == 1
    mean = " The black line is the mean over tasks." if len(run.tasks) > 1 and one else ""
    text = (
        "Scores of the personalised models on the clients' evaluation data after each exchange; "
        f"0 is before any training (zero-shot).{mean} Exchange 1 trains stage 1; a client trains "
        "stage 2 from its second exchange on, if the method has one."
    )
    names = [in_lines(task) for task in run.tasks] + ["mean"] * bool(mean)
    panels = [Panel(partial(_tasks, run, one), _tasks_alt(run), *panel_size(names))]
    for task in run.tasks:
        clients = run.clients(task)
        many = len(clients) > _MOST_COLOURED
        names = [f"{len(clients)} clients"] if many else [in_lines(client) for client in clients]
        alt = f"Scores of the clients of {task} over exchanges."
        panels.append(Panel(partial(_clients, run, task), alt, *panel_size([*names, "task"])))
    return Figure("learning-curves", "Learning curves", text, panels, [_score_table(run)])


def _tasks(run: RunData, with_mean: bool, axes: Axes) -> None:
    top, numbers = 0.0, {0}
    for index, task in enumerate(run.tasks):
        scores = run.task_scores(task)
        axes.plot(
            list(scores),
            list(scores.values()),
            color=colour(index),
            marker=marker(index),
            label=in_lines(task),
        )
        top, numbers = max(top, _top(run, task)), numbers | set(scores)
    mean = run.mean_scores()
    if with_mean and len(run.tasks) > 1:
        axes.plot(list(mean), list(mean.values()), color=INK, linewidth=2.6, label="mean")
    _finish(axes, "all tasks", "score" if not with_mean else run.metric(run.tasks[0]), top, numbers)


def _clients(run: RunData, task: str, axes: Axes) -> None:
    clients = run.clients(task)
    numbers = {0}
    many = len(clients) > _MOST_COLOURED
    for index, client in enumerate(clients):
        scores = run.scores(client)
        numbers |= set(scores)
        axes.plot(
            list(scores),
            list(scores.values()),
            color=GREY if many else colour(index),
            marker="" if many else marker(index),
            linewidth=0.8 if many else 1.4,
            label=f"{len(clients)} clients" * (index == 0) if many else in_lines(client),
        )
    mean = run.task_scores(task)
    axes.plot(list(mean), list(mean.values()), color=INK, linewidth=2.6, label="task")
    _finish(axes, task, run.metric(task), _top(run, task), numbers)


def _finish(axes: Axes, words: str, metric: str, top: float, numbers: set[int]) -> None:
    title(axes, words)
    axes.set_ylabel(metric.replace("_", " "))
    axes.set_ylim(0, top * 1.04)
    exchange_axis(axes, sorted(numbers))
    legend_below(axes)


def _top(run: RunData, task: str) -> float:
    """Return the end of the score's axis: the metric's maximum, or just above what was seen."""
    highest = run.highest_score(task)
    if math.isfinite(highest) and highest <= 1:
        return highest
    seen = [score for client in run.clients(task) for score in run.scores(client).values()]
    return max([*seen, 0.0]) * 1.05 or 1.0


def _tasks_alt(run: RunData) -> str:
    """Say in words how every task began and ended."""
    ends = []
    for task in run.tasks:
        scores = list(run.task_scores(task).values())
        ends += [f"{task} from {scores[0]:.3f} to {scores[-1]:.3f}"] if scores else []
    return f"Scores per task over exchanges: {', '.join(ends)}."


def _score_table(run: RunData) -> Table:
    numbers = sorted({n for client in run.task_of for n in run.scores(client)})
    rows = [["client", "task", *("zero-shot" if n == 0 else f"exchange {n}" for n in numbers)]]
    for client, task in run.task_of.items():
        scores = run.scores(client)
        cells = [f"{scores[n]:.3f}" if n in scores else "–" for n in numbers]
        rows.append([client, task, *cells])
    return Table("Score of every client after every exchange", rows)


NAMES = {
    "ce": "L_ce, cross-entropy",
    "difference": "L_d, difference",
    "balance": "L_b, load balance",
    "z": "L_z, router z",
    "proximal": "μ/2 ‖Θ − Θ_sent‖², proximal",
}
"""What the parts are called; others, of other methods, go by their own names."""

REST = "rest"
"""What the total has beyond the parts above."""

_DRAWN = {"proximal": r"$\mu/2\ \Vert\Theta-\Theta_{sent}\Vert^2$"}
"""Symbols that are more than a letter with an index."""


def losses(run: RunData) -> Figure:
    """Return one panel with the parts stacked to the total, and one for each part."""
    trained = [e for e in select(run.events, "train") if e.get("loss") is not None]
    title = "Losses by part"
    if not trained:
        return Figure("losses", title, "The clients sent no losses.")
    parts = [part for part in _parts(trained) if any(e.get(f"loss_{part}") for e in trained)]
    weights = loss_weights(run.config.train)
    text = (
        "Mean loss of local training in each exchange. On the left the parts as they add up to "
        "the total, each times its coefficient, mean over the clients; then each part without "
        f"its coefficient, mean over a task's clients.{_about(run.config.train, parts)}"
    )
    panels = [Panel(partial(_stacked, trained, weights), _alt(trained))]
    size = panel_size([in_lines(task) for task in run.tasks])
    panels += [
        Panel(
            partial(_part, run, trained, part),
            f"{NAMES.get(part, part)} per task over exchanges.",
            *size,
        )
        for part in parts
    ]
    return Figure("losses", title, text, panels, [_loss_table(trained, parts)])


def loss_weights(train: TrainConfig) -> dict[str, float]:
    """Return the coefficient of each part in the total."""
    return {
        "ce": 1.0,
        "difference": train.difference_loss.weight,
        "balance": train.balance_weight,
        "z": train.z_weight,
        "proximal": 1.0,  # the clients report it with its μ/2
    }


def _about(train: TrainConfig, parts: Sequence[str]) -> str:
    """Say what is special about the parts that a run has."""
    words = ""
    named = []
    if "difference" in parts:
        named.append("L_d is a loss of stage 1 alone")
    if {"balance", "z"} & set(parts):
        named.append("L_b and L_z are of stage 2")
    if named:
        words += f" {', '.join(named)}: where a stage does not have a part, there is no point."
    if "proximal" in parts:
        words += (
            " μ/2 ‖Θ − Θ_sent‖² is FedProx's pull back to what the server sent, over what is sent "
            f"and trained, shown with its coefficient: μ is {train.proximal_weight:g}."
        )
    if train.ditto.enabled:
        words += (
            " These are losses of the shared model; of the personal model v, which Ditto trains "
            "beside it, the clients report none."
        )
    return words


def _symbol(part: str) -> str:
    return _DRAWN.get(part) or math_text(NAMES.get(part, part).split(",")[0])


def contributions(event: Event, weights: Mapping[str, float]) -> dict[str, float]:
    """Return what each part adds to the total of one client's training; they sum to it.

    Parameters
    ----------
    event : dict
        A ``train`` event with a loss.
    weights : mapping
        `loss_weights` of the run.
    """
    added = {part: weight * (event.get(f"loss_{part}") or 0.0) for part, weight in weights.items()}
    rest = event["loss"] - sum(added.values())
    # float32 losses are means over steps: what is left of rounding is no part.
    return added | ({REST: rest} if abs(rest) > 1e-4 * max(1.0, abs(event["loss"])) else {})


def _parts(trained: Sequence[Event]) -> list[str]:
    keys = dict.fromkeys(key for event in trained for key in event if key.startswith("loss_"))
    return [key.removeprefix("loss_") for key in keys]


def _means(trained: Sequence[Event], weights: Mapping[str, float]) -> dict[int, dict[str, float]]:
    means: dict[int, dict[str, float]] = {}
    for number in sorted({event["round"] for event in trained}):
        rows = [contributions(e, weights) for e in trained if e["round"] == number]
        names = dict.fromkeys(name for row in rows for name in row)
        means[number] = {n: sum(row.get(n, 0.0) for row in rows) / len(rows) for n in names}
    return means


def _stacked(trained: Sequence[Event], weights: Mapping[str, float], axes: Axes) -> None:
    means = _means(trained, weights)
    floor = dict.fromkeys(means, 0.0)
    names = dict.fromkeys(name for row in means.values() for name in row)
    for index, name in enumerate(names):
        heights = [means[number].get(name, 0.0) for number in means]
        if not any(heights):
            continue
        weight = weights.get(name, 1.0)
        axes.bar(
            list(means),
            heights,
            width=0.65,
            bottom=list(floor.values()),
            color=colour(index),
            **bar_edges(len(means)),
            label=_symbol(name) if weight == 1 else f"{weight:g} {_symbol(name)}",
        )
        floor = {n: floor[n] + h for n, h in zip(means, heights, strict=True)}
    axes.set_ylim(0, max(floor.values()) * 1.08 or 1.0)
    axes.set_title("total loss")
    axes.set_ylabel("mean over clients")
    exchange_axis(axes, list(means), "exchange")
    axes.set_xlim(min(means) - 0.6, max(means) + 0.6)
    axes.grid(visible=False, axis="x")
    legend_below(axes)


def _part(run: RunData, trained: Sequence[Event], part: str, axes: Axes) -> None:
    numbers = sorted({event["round"] for event in trained})
    for index, task in enumerate(run.tasks):
        means = {}
        for number in numbers:
            values = [
                event[f"loss_{part}"]
                for event in trained
                if event["task"] == task and event["round"] == number and event.get(f"loss_{part}")
            ]
            if values:
                means[number] = sum(values) / len(values)
        axes.plot(
            list(means),
            list(means.values()),
            color=colour(index),
            marker=marker(index),
            label=in_lines(task),
        )
    _, *rest = NAMES.get(part, part).split(",")
    axes.set_title(",".join([_symbol(part), *rest]))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    exchange_axis(axes, numbers, "exchange")
    legend_below(axes)


def _alt(trained: Sequence[Event]) -> str:
    numbers = [event["round"] for event in trained]
    first, last = (
        [event["loss"] for event in trained if event["round"] == number]
        for number in (min(numbers), max(numbers))
    )
    return (
        f"Total loss, mean over clients: {sum(first) / len(first):.3f} in the first exchange, "
        f"{sum(last) / len(last):.3f} in the last."
    )


def _loss_table(trained: Sequence[Event], parts: Sequence[str]) -> Table:
    rows = [["exchange", "client", "stage", "total", *(NAMES.get(p, p) for p in parts)]]
    for event in trained:
        values = [event.get(f"loss_{part}") for part in parts]
        rows.append(
            [
                str(event["round"]),
                event["client"],
                str(event["stage"]),
                f"{event['loss']:.4f}",
                *(f"{value:.4g}" if value else "–" for value in values),
            ]
        )
    return Table("Losses of every client's training", rows)
