"""Matrices between clients: LoRA distances and mixing weights, exchange by exchange."""

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pilot_flwr.formatting import count
from pilot_flwr.report.history import (
    Matrix,
    RunData,
    distance_words,
    mixing_words,
    nothing_to_compare,
)
from pilot_flwr.report.style import Figure, Panel, Table, short, some

MOST_EXCHANGES = 6
"""Drawn at most, as in the time line."""

_MOST_NAMED = 20
"""Clients up to which each has its name at the axes; of more, only the tasks are named."""

_SIDE = 3.5


def distances(run: RunData) -> Figure:
    """Return one panel per exchange with ‖Θ_l,k − Θ_l,j‖₂ between every two clients."""
    name, title = "lora-distances", "Distances between the clients' LoRAs"
    matrices = {e.number: e.distances for e in run.exchanges if len(e.distances) > 1}
    if not matrices:
        return Figure(name, title, nothing_to_compare(run.config))
    text = distance_words(run.config)
    return _figure(run, name, title, text, matrices, "distance", "viridis")


def mixing_weights(run: RunData) -> Figure:
    """Return one panel per exchange with every client's share in every client's LoRA."""
    name, title = "mixing-weights", "Mixing weights"
    matrices = {e.number: e.weights for e in run.exchanges if len(e.weights) > 1}
    if not matrices:
        return Figure(name, title, nothing_to_compare(run.config))
    text = mixing_words(run.config)
    return _figure(run, name, title, text, matrices, "share", "viridis_r", ceiling=1.0)


def as_array(matrix: Matrix, clients: list[str]) -> NDArray[np.float64]:
    """Return a matrix in the clients' order, NaN where it has no value."""
    rows = [[matrix.get(k, {}).get(j, np.nan) for j in clients] for k in clients]
    return np.array(rows, dtype=np.float64)


def _figure(
    run: RunData,
    name: str,
    title: str,
    text: str,
    matrices: dict[int, Matrix],
    label: str,
    colours: str,
    ceiling: float | None = None,
) -> Figure:
    clients = [client for client in run.task_of if any(client in m for m in matrices.values())]
    shown = some(list(matrices), MOST_EXCHANGES)
    if len(shown) < len(matrices):
        text += f" {count(len(matrices) - len(shown), 'exchange')} of {len(matrices)} not drawn."
    arrays = {number: as_array(matrices[number], clients) for number in matrices}
    high = ceiling or max(float(np.nanmax(array)) for array in arrays.values())
    panels = [
        Panel(
            partial(_matrix, run, clients, arrays[number], number, label, colours, high),
            f"{title} after exchange {number}: {len(clients)} by {len(clients)} clients.",
            height=_SIDE,
            continuous=True,
        )
        for number in shown
    ]
    tables = [
        Table(f"Exchange {number}", _rows(clients, arrays[number]))
        for number in shown
        if len(clients) <= _MOST_NAMED
    ]
    return Figure(name, title, text, panels, tables)


def _matrix(
    run: RunData,
    clients: list[str],
    array: NDArray[np.float64],
    number: int,
    label: str,
    colours: str,
    high: float,
    axes: Axes,
) -> None:
    image = axes.imshow(array, vmin=0, vmax=high or 1.0, cmap=colours)
    places = range(len(clients))
    tasks = [run.task_of[client] for client in clients]
    if len(clients) <= _MOST_NAMED:
        size = 8.0 if len(clients) <= 12 else 6.0
        names = [short(client) for client in clients]
        axes.set_xticks(places, names, rotation=90, fontsize=size)
        axes.set_yticks(places, names, fontsize=size)
    else:
        middles = {t: (tasks.index(t) + len(tasks) - 1 - tasks[::-1].index(t)) / 2 for t in tasks}
        axes.set_xticks(list(middles.values()), [short(task) for task in middles], rotation=90)
        axes.set_yticks(list(middles.values()), [short(task) for task in middles])
    for place in places[1:]:
        if tasks[place] != tasks[place - 1]:  # a line between the tasks
            axes.axhline(place - 0.5, color="#666666", linewidth=0.9)
            axes.axvline(place - 0.5, color="#666666", linewidth=0.9)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_title(f"exchange {number}")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=18, pad=0.03)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def _rows(clients: list[str], array: NDArray[np.float64]) -> list[list[str]]:
    rows = [["", *clients]]
    for client, values in zip(clients, array, strict=True):
        rows.append([client, *("–" if np.isnan(value) else f"{value:.3f}" for value in values)])
    return rows
