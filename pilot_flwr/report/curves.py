"""Learning curves: scores over exchanges, per task and client."""

import math
from functools import partial

from matplotlib.axes import Axes

from pilot_flwr.report.drawing import (
    GREY,
    INK,
    Figure,
    Panel,
    Table,
    colour,
    exchange_axis,
    marker,
)
from pilot_flwr.report.fitting import in_lines, legend_below, panel_size, title
from pilot_flwr.report.gather import RunData

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
    return Figure("learning-curves", "Learning curves", text, panels, [_table(run)])


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


def _table(run: RunData) -> Table:
    numbers = sorted({n for client in run.task_of for n in run.scores(client)})
    rows = [["client", "task", *("zero-shot" if n == 0 else f"exchange {n}" for n in numbers)]]
    for client, task in run.task_of.items():
        scores = run.scores(client)
        cells = [f"{scores[n]:.3f}" if n in scores else "–" for n in numbers]
        rows.append([client, task, *cells])
    return Table("Score of every client after every exchange", rows)
