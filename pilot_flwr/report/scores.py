"""Learning curves and losses of a run.

Scores are shown over exchanges, per task and client; losses by part, as each adds to the total and
alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
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
    math_text,
    title,
)
from pilot_flwr.run.events import Trained, select

_MOST_COLOURED = 8
"""Number of clients of a task drawn in separate colours; further ones are grey."""


def learning_curves(run: RunData) -> Figure:
    """Return one panel for the tasks and their mean, and one for the clients of each task."""
    name, heading = "learning-curves", "Learning curves"
    if not any(run.task_scores(task) for task in run.tasks):
        return Figure(name, heading, "No client was evaluated: there is no score.")
    one_metric = len({run.metric(task) for task in run.tasks}) == 1
    with_mean = one_metric and len(run.tasks) > 1
    mean = " The black line is the mean over tasks." if with_mean else ""
    text = (
        "Scores of the personalised models on the clients' evaluation data after each exchange; "
        f"0 is before any training (zero-shot).{mean} Exchange 1 trains stage 1; from its "
        "second exchange on a client trains stage 2, if the method has one."
    )
    panels = [Panel(partial(_tasks, run, one_metric, with_mean), _tasks_alt(run))]
    for task in run.tasks:
        alt = f"Scores of the clients of {task} over exchanges."
        panels.append(Panel(partial(_clients, run, task), alt))
    return Figure(name, heading, text, panels, [_score_table(run)])


def _tasks(run: RunData, one_metric: bool, with_mean: bool, axes: Axes) -> None:
    curves = {task: run.task_scores(task) for task in run.tasks}
    for task, scores in curves.items():
        axes.plot(list(scores), list(scores.values()), label=in_lines(task))
    if with_mean:
        _bold(axes, run.mean_scores(), "mean")
    top = max(_top(run, task) for task in run.tasks)
    numbers = {0}.union(*curves.values())
    _finish(axes, "all tasks", run.metric(run.tasks[0]) if one_metric else "score", top, numbers)


def _clients(run: RunData, task: str, axes: Axes) -> None:
    curves = {client: run.scores(client) for client in run.clients(task)}
    many = len(curves) > _MOST_COLOURED
    grey = {"color": GREY, "marker": "", "linestyle": "-", "linewidth": 0.8}
    for index, (client, scores) in enumerate(curves.items()):
        label = f"{len(curves)} clients" * (index == 0) if many else in_lines(client)
        style: Any = grey if many else {"linewidth": 1.4}
        axes.plot(list(scores), list(scores.values()), label=label, **style)
    _bold(axes, run.task_scores(task), "task")
    _finish(axes, task, run.metric(task), _top(run, task), {0}.union(*curves.values()))


def _bold(axes: Axes, scores: Mapping[int, float], label: str) -> None:
    axes.plot(list(scores), list(scores.values()), "-", color=INK, linewidth=2.6, label=label)


def _finish(axes: Axes, text: str, metric: str, top: float, numbers: Iterable[int]) -> None:
    title(axes, text)
    axes.set_ylabel(metric.replace("_", " "))
    axes.set_ylim(0, top * 1.04)
    exchange_axis(axes, sorted(numbers))


def _top(run: RunData, task: str) -> float:
    """Return the end of the score's axis: the metric's maximum, or just above the largest score."""
    highest = run.highest_score(task)
    if math.isfinite(highest) and highest <= 1:
        return highest
    seen = [score for client in run.clients(task) for score in run.scores(client).values()]
    return max([*seen, 0.0]) * 1.05 or 1.0


def _tasks_alt(run: RunData) -> str:
    """Describe each task's first and last score."""
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
"""Symbol and name of each part of the loss; other parts keep their own names."""

REST = "rest"
"""The total minus all parts."""

_DRAWN = {"proximal": r"$\mu/2\ \Vert\Theta-\Theta_{sent}\Vert^2$"}
"""Symbols that are more than a letter with an index."""


def losses(run: RunData) -> Figure:
    """Return one panel with the parts stacked to the total, and one for each part."""
    trained = [event for event in select(run.events, Trained) if event.loss is not None]
    heading = "Losses by part"
    if not trained:
        return Figure("losses", heading, "The clients sent no losses.")
    names = dict.fromkeys(name for event in trained for name in event.losses if name != "total")
    parts = [part for part in names if any(event.losses.get(part) for event in trained)]
    text = (
        "Mean loss of local training in each exchange. On the left the parts as they add up to "
        "the total, each times its coefficient, mean over the clients; then each part without "
        f"its coefficient, mean over a task's clients.{_about(run.config.train, parts)}"
    )
    panels = [Panel(partial(_stacked, trained, loss_weights(run.config.train)), _alt(trained))]
    panels += [
        Panel(
            partial(_part, run.tasks, trained, part),
            f"{NAMES.get(part, part)} per task over exchanges.",
        )
        for part in parts
    ]
    return Figure("losses", heading, text, panels, [_loss_table(trained, parts)])


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
    """Describe the parts that only some runs or stages have."""
    text = ""
    named = ["L_d is a loss of stage 1 only"] if "difference" in parts else []
    named += ["L_b and L_z are losses of stage 2"] if {"balance", "z"} & set(parts) else []
    if named:
        text += f" {', '.join(named)}: a stage without a part has no point in its panel."
    if "proximal" in parts:
        text += (
            " μ/2 ‖Θ − Θ_sent‖² is FedProx's proximal term over the parameters that are sent and "
            f"trained, shown with its coefficient: μ is {train.proximal_weight:g}."
        )
    if train.ditto.enabled:
        text += (
            " These are losses of the shared model; the clients report none of the personal model "
            "v, which Ditto trains beside it."
        )
    return text


def _symbol(part: str) -> str:
    return _DRAWN.get(part) or math_text(NAMES.get(part, part).split(",")[0])


def contributions(event: Trained, weights: Mapping[str, float]) -> dict[str, float]:
    """Return what each part adds to the total loss of one client's training.

    `weights` are the run's `loss_weights`; what they do not explain of the total is `REST`.
    """
    assert event.loss is not None
    added = {part: weight * (event.losses.get(part) or 0.0) for part, weight in weights.items()}
    rest = event.loss - sum(added.values())
    # float32 losses are means over steps: what rounding leaves is not a part.
    return added | ({REST: rest} if abs(rest) > 1e-4 * max(1.0, abs(event.loss)) else {})


def _stacked(trained: Sequence[Trained], weights: Mapping[str, float], axes: Axes) -> None:
    means: dict[int, dict[str, float]] = {}
    for number in sorted({event.exchange for event in trained}):
        added = [contributions(event, weights) for event in trained if event.exchange == number]
        names = dict.fromkeys(name for row in added for name in row)
        means[number] = {n: sum(row.get(n, 0.0) for row in added) / len(added) for n in names}
    floor = np.zeros(len(means))
    for index, name in enumerate(dict.fromkeys(name for row in means.values() for name in row)):
        heights = np.array([row.get(name, 0.0) for row in means.values()])
        if not heights.any():
            continue
        weight = weights.get(name, 1.0)
        axes.bar(
            list(means),
            heights,
            width=0.65,
            bottom=floor,
            color=colour(index),
            **bar_edges(len(means)),
            label=_symbol(name) if weight == 1 else f"{weight:g} {_symbol(name)}",
        )
        floor += heights
    axes.set_ylim(0, floor.max() * 1.08 or 1.0)
    axes.set_title("total loss")
    axes.set_ylabel("mean over clients")
    exchange_axis(axes, list(means), "exchange")
    axes.set_xlim(min(means) - 0.6, max(means) + 0.6)
    axes.grid(visible=False, axis="x")


def _part(tasks: Sequence[str], trained: Sequence[Trained], part: str, axes: Axes) -> None:
    for task in tasks:
        values: dict[int, list[float]] = {}
        for event in trained:
            if event.task == task and (value := event.losses.get(part)):
                values.setdefault(event.exchange, []).append(value)
        means = {number: sum(values[number]) / len(values[number]) for number in sorted(values)}
        axes.plot(list(means), list(means.values()), label=in_lines(task))
    _, *rest = NAMES.get(part, part).split(",")
    axes.set_title(",".join([_symbol(part), *rest]))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    exchange_axis(axes, [event.exchange for event in trained], "exchange")


def _alt(trained: Sequence[Trained]) -> str:
    numbers = [event.exchange for event in trained]
    first, last = (
        [event.losses["total"] or 0.0 for event in trained if event.exchange == number]
        for number in (min(numbers), max(numbers))
    )
    return (
        f"Total loss, mean over clients: {sum(first) / len(first):.3f} in the first exchange, "
        f"{sum(last) / len(last):.3f} in the last."
    )


def _loss_table(trained: Sequence[Trained], parts: Sequence[str]) -> Table:
    rows = [["exchange", "client", "stage", "total", *(NAMES.get(p, p) for p in parts)]]
    for event in trained:
        values = [event.losses.get(part) for part in parts]
        cells = [f"{value:.4g}" if value else "–" for value in values]
        rows.append(
            [str(event.exchange), event.client, str(event.stage), f"{event.loss:.4f}", *cells]
        )
    return Table("Losses of every client's training", rows)
