"""Learning curves and losses of a run.

Scores are drawn over exchanges, per task and client, or as a distribution if there are more than
`MOST_CLIENTS` clients; losses as parts stacked to the total, and separately.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pilot_flwr.config.train import TrainConfig
from pilot_flwr.metrics import METRICS
from pilot_flwr.report.page import (
    GREY,
    INK,
    Figure,
    Panel,
    Table,
    colour,
    exchange_axis,
    in_lines,
    math_text,
    stacked_bars,
    title,
)
from pilot_flwr.run.events import Trained, select
from pilot_flwr.run.history import MEAN, RunData, clients_per_task
from pilot_flwr.run.tables import MOST_CLIENTS, score_text

_MOST_COLOURED = 8
"""Maximum number of clients of a task in separate colours; more are drawn in grey."""


def learning_curves(run: RunData) -> Figure:
    """Return one panel for the tasks and their mean, and one for the clients of each task."""
    name, heading = "learning-curves", "Learning curves"
    if not run.curves:
        return Figure(name, heading, "No client was evaluated, so there are no scores.")
    one_metric = len({run.metric(task) for task in run.tasks}) == 1
    with_mean = one_metric and len(run.tasks) > 1
    mean = " The black line is the mean over tasks." if with_mean else ""
    text = (
        "Scores of the personalised models on the clients' evaluation data after each exchange; "
        f"0 is before any training (zero-shot).{mean} Exchange 1 trains stage 1; from its second "
        "exchange on, a client trains stage 2 if the method has one."
    )
    ends = [
        f"{task} from {scores[0]:.3f} to {scores[-1]:.3f}"
        for task in run.tasks
        if (scores := list(run.curves.get(task, {}).values()))
    ]
    alt = f"Scores per task over exchanges: {', '.join(ends)}."
    panels = [Panel(partial(_tasks, run, one_metric, with_mean), alt)]
    many = len(run.task_of) > MOST_CLIENTS
    if many:
        text += (
            " Of the clients of each task that have a score, the panels show the median, the "
            "middle half (dark) and the range (light)."
        )
    for task in run.tasks:
        alt = f"Scores of the clients of {task} over exchanges."
        panels.append(Panel(partial(_spread if many else _clients, run, task), alt))
    return Figure(name, heading, text, panels, [_score_table(run)])


def _tasks(run: RunData, one_metric: bool, with_mean: bool, axes: Axes) -> None:
    for task in run.tasks:
        _line(axes, run.curves.get(task, {}), in_lines(task))
    if with_mean:
        _line(axes, run.curves.get(MEAN, {}), "mean", **_BOLD)
    top = max(_top(run, task) for task in run.tasks)
    metric = run.metric(run.tasks[0]) if one_metric else "score"
    _finish(axes, "all tasks", metric, top, {0}.union(*run.curves.values()))


def _distribution(run: RunData, task: str) -> dict[int, list[float]]:
    """Return exchange → the scores of a task's clients, sorted."""
    found: dict[int, list[float]] = {}
    for client in run.clients(task):
        for number, score in run.scores(client).items():
            found.setdefault(number, []).append(score)
    return {number: sorted(found[number]) for number in sorted(found)}


def _spread(run: RunData, task: str, axes: Axes) -> None:
    scores = _distribution(run, task)
    numbers = list(scores)
    levels = np.array([np.quantile(found, _QUANTILES) for found in scores.values()]).T
    for low, high, alpha in ((0, 4, 0.18), (1, 3, 0.4)):
        style: Any = {"color": colour(0), "alpha": alpha, "linewidth": 0}
        axes.fill_between(numbers, levels[low], levels[high], **style)
    middle = dict(zip(numbers, levels[2].tolist(), strict=True))
    _line(axes, middle, "median client", color=colour(0), marker="", linewidth=1.4)
    _line(axes, run.curves.get(task, {}), "task", **_BOLD)
    _finish(axes, task, run.metric(task), _top(run, task), {0, *scores})


_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _clients(run: RunData, task: str, axes: Axes) -> None:
    curves = {client: run.scores(client) for client in run.clients(task)}
    many = len(curves) > _MOST_COLOURED
    grey = {"color": GREY, "marker": "", "linestyle": "-", "linewidth": 0.8}
    for index, (client, scores) in enumerate(curves.items()):
        label = f"{len(curves)} clients" * (index == 0) if many else in_lines(client)
        _line(axes, scores, label, **(grey if many else {"linewidth": 1.4}))
    _line(axes, run.curves.get(task, {}), "task", **_BOLD)
    _finish(axes, task, run.metric(task), _top(run, task), {0}.union(*curves.values()))


_BOLD = {"color": INK, "marker": "", "linestyle": "-", "linewidth": 2.6}


def _line(axes: Axes, values: Mapping[int, float], label: str, **style: Any) -> None:
    axes.plot(list(values), list(values.values()), label=label, **style)


def _finish(axes: Axes, text: str, metric: str, top: float, numbers: Iterable[int]) -> None:
    title(axes, text)
    axes.set_ylabel(metric.replace("_", " "))
    axes.set_ylim(0, top * 1.04)
    exchange_axis(axes, sorted(numbers))


def _top(run: RunData, task: str) -> float:
    """Return the score axis's limit: the metric's maximum, or just above the largest score."""
    metric = METRICS.get(run.metric(task))
    if metric and metric.maximum <= 1:
        return metric.maximum
    seen = [score for client in run.clients(task) for score in run.scores(client).values()]
    return max([*seen, 0.0]) * 1.05 or 1.0


def _score_table(run: RunData) -> Table:
    if len(run.task_of) > MOST_CLIENTS:
        return _distribution_table(run)
    curves = {client: run.scores(client) for client in run.task_of}
    numbers = sorted(set().union(*curves.values()))
    rows = [["client", "task", *("zero-shot" if n == 0 else f"exchange {n}" for n in numbers)]]
    for client, curve in curves.items():
        rows.append([client, run.task_of[client], *(score_text(curve.get(n)) for n in numbers)])
    return Table("Score of every client after every exchange", rows)


def _distribution_table(run: RunData) -> Table:
    rows = [["task", "after exchange", "clients with a score", *_SPREAD]]
    totals = clients_per_task(run.events)
    for task in run.tasks:
        for number, scores in _distribution(run, task).items():
            cells = [f"{value:.3f}" for value in np.quantile(scores, _QUANTILES)]
            rows.append(
                [task, str(number or "zero-shot"), f"{len(scores)} of {totals[task]}", *cells]
            )
    return Table("Scores of the clients of each task: smallest, quartiles, largest", rows)


_SPREAD = ("smallest", "lower quartile", "median", "upper quartile", "largest")

NAMES = {
    "ce": "L_ce, cross-entropy",
    "difference": "L_d, difference",
    "balance": "L_b, load balance",
    "z": "L_z, router z",
    "proximal": "μ/2 ‖Θ − Θ_sent‖², proximal",
    "distillation": "β T² KL, distillation",
}
"""Symbol and name of each part of the loss."""

REST = "rest"
"""The total minus all parts."""

_DRAWN = {
    "proximal": r"$\mu/2\ \Vert\Theta-\Theta_{sent}\Vert^2$",
    "distillation": r"$\beta\ T^2\ KL$",
}
"""Symbols for which `math_text` is not enough."""


def losses(run: RunData) -> Figure:
    """Return one panel with the parts stacked to the total, and one for each part."""
    trained = [event for event in select(run.events, Trained) if event.loss is not None]
    heading = "Losses by part"
    if not trained:
        return Figure("losses", heading, "The clients sent no losses.")
    names = dict.fromkeys(name for event in trained for name in event.losses if name != "total")
    parts = [part for part in names if any(event.losses.get(part) for event in trained)]
    text = (
        "Mean loss of local training in each exchange. Left: the parts stacked to the total, each "
        "multiplied by its coefficient, averaged over all clients. Right: each part without its "
        f"coefficient, averaged over a task's clients.{_about(run.config.train, parts)}"
    )
    panels = [Panel(partial(_stacked, trained, loss_weights(run.config.train)), _alt(trained))]
    panels += [
        Panel(
            partial(_part, run.tasks, trained, part),
            f"{NAMES.get(part, part)} per task over exchanges.",
        )
        for part in parts
    ]
    return Figure("losses", heading, text, panels, [_loss_table(run.tasks, trained, parts)])


def loss_weights(train: TrainConfig) -> dict[str, float]:
    """Return the coefficient of each part in the total."""
    return {
        "ce": 1.0,
        "difference": train.difference_loss.weight,
        "balance": train.balance_weight,
        "z": train.z_weight,
        "proximal": 1.0,  # reported with its μ/2
        "distillation": 1.0,  # and with its β T²
    }


def _about(train: TrainConfig, parts: Sequence[str]) -> str:
    """Describe the parts that only some runs or stages have."""
    text = ""
    named = ["L_d is a loss of stage 1 only"] if "difference" in parts else []
    named += ["L_b and L_z are losses of stage 2"] if {"balance", "z"} & set(parts) else []
    if named:
        text += f" {', '.join(named)}; a stage without a part has no point in its panel."
    if "proximal" in parts:
        text += (
            " μ/2 ‖Θ − Θ_sent‖² is FedProx's proximal term over the parameters that are sent and "
            f"trained, shown with its coefficient; μ is {train.proximal_weight:g}."
        )
    if "distillation" in parts:
        text += (
            " β T² KL is the divergence from the personal model's probabilities, shown with its "
            f"coefficient; β is {train.personal.distillation:g}."
        )
    if train.personal.model != "none":
        text += " These are losses of the shared model; the personal model v reports none."
    return text


def _symbol(part: str) -> str:
    return _DRAWN.get(part) or math_text(NAMES.get(part, part).split(",")[0])


def contributions(event: Trained, weights: Mapping[str, float]) -> dict[str, float]:
    """Return each part's share of the total loss of one client's training.

    `weights` are the run's `loss_weights`; a difference to the total is `REST`.
    """
    assert event.loss is not None
    added = {part: weight * (event.losses.get(part) or 0.0) for part, weight in weights.items()}
    rest = event.loss - sum(added.values())
    # Losses are float32 means over steps; a rounding error is not a part.
    return added | ({REST: rest} if abs(rest) > 1e-4 * max(1.0, abs(event.loss)) else {})


def _stacked(trained: Sequence[Trained], weights: Mapping[str, float], axes: Axes) -> None:
    added: dict[int, list[dict[str, float]]] = {}
    for event in sorted(trained, key=lambda event: event.exchange):
        added.setdefault(event.exchange, []).append(contributions(event, weights))
    series = {}
    for name in dict.fromkeys(name for rows in added.values() for row in rows for name in row):
        weight = weights.get(name, 1.0)
        label = _symbol(name) if weight == 1 else f"{weight:g} {_symbol(name)}"
        series[label] = [fmean(row.get(name, 0.0) for row in rows) for rows in added.values()]
    heights = stacked_bars(axes, list(added), series, width=0.65, bars=len(added))
    axes.set_ylim(0, heights.max() * 1.08 or 1.0)
    axes.set_title("total loss")
    axes.set_ylabel("mean over clients")
    exchange_axis(axes, list(added), "exchange")
    axes.set_xlim(min(added) - 0.6, max(added) + 0.6)
    axes.grid(visible=False, axis="x")


def _part(tasks: Sequence[str], trained: Sequence[Trained], part: str, axes: Axes) -> None:
    for task in tasks:
        values: dict[int, list[float]] = {}
        for event in trained:
            if event.task == task and (value := event.losses.get(part)):
                values.setdefault(event.exchange, []).append(value)
        means = {number: fmean(values[number]) for number in sorted(values)}
        _line(axes, means, in_lines(task))
    _, *rest = NAMES.get(part, part).split(",")
    axes.set_title(",".join([_symbol(part), *rest]))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    exchange_axis(axes, [event.exchange for event in trained], "exchange")


def _alt(trained: Sequence[Trained]) -> str:
    numbers = [event.exchange for event in trained]
    first, last = (
        fmean(event.loss or 0.0 for event in trained if event.exchange == number)
        for number in (min(numbers), max(numbers))
    )
    return (
        f"Total loss, mean over clients: {first:.3f} in the first exchange, {last:.3f} in the last."
    )


def _loss_table(tasks: Sequence[str], trained: Sequence[Trained], parts: Sequence[str]) -> Table:
    names = [NAMES.get(part, part) for part in parts]
    if len({event.client for event in trained}) > MOST_CLIENTS:
        return _loss_table_by_task(tasks, trained, parts)
    rows = [["exchange", "client", "stage", "total", *names]]
    for event in trained:
        values = [event.losses.get(part) for part in parts]
        cells = [f"{value:.4g}" if value else "–" for value in values]
        rows.append(
            [str(event.exchange), event.client, str(event.stage), f"{event.loss:.4f}", *cells]
        )
    return Table("Losses of every client's training", rows)


def _loss_table_by_task(
    tasks: Sequence[str], trained: Sequence[Trained], parts: Sequence[str]
) -> Table:
    names = [NAMES.get(part, part) for part in parts]
    rows = [["exchange", "task", "clients", "total: median", "range", *names]]
    groups: dict[tuple[int, str], list[Trained]] = {}
    for event in trained:
        groups.setdefault((event.exchange, event.task), []).append(event)
    for (number, task), found in sorted(
        groups.items(), key=lambda g: (g[0][0], tasks.index(g[0][1]))
    ):
        totals = [event.loss for event in found if event.loss is not None]
        spread = f"{min(totals):.4f}–{max(totals):.4f}"
        means = [[v for e in found if (v := e.losses.get(part))] for part in parts]
        cells = [f"{fmean(values):.4g}" if values else "–" for values in means]
        rows.append([str(number), task, str(len(found)), f"{median(totals):.4f}", spread, *cells])
    return Table("Losses by task: median and range of the total, mean of each part", rows)
