"""Matrices between clients: LoRA distances and mixing weights, exchange by exchange."""

from functools import partial
from typing import Literal

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
"""Exchanges drawn at most."""

_MOST_NAMED = 20
"""Clients that are named at the axes at most; of more, only the tasks are named."""

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
    tasks = [run.task_of[client] for client in clients]

    def draw(number: int, axes: Axes) -> None:
        heat_map(axes, arrays[number], high or 1.0, colours, label)
        _name_clients(axes, clients, tasks)
        axes.set_title(f"exchange {number}")

    panels = [
        Panel(
            partial(draw, number),
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


def heat_map(
    axes: Axes,
    array: NDArray[np.float64],
    high: float,
    colours: str = "viridis",
    label: str = "",
    aspect: Literal["equal", "auto"] = "equal",
) -> None:
    """Draw a matrix of values from 0 to `high`, with its scale beside it."""
    image = axes.imshow(array, vmin=0, vmax=high, cmap=colours, aspect=aspect)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=18, pad=0.03)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)


def _name_clients(axes: Axes, clients: list[str], tasks: list[str]) -> None:
    """Name the clients at both axes, or of many their tasks, and separate the tasks by lines."""
    names: dict[float, str] = {place: short(client) for place, client in enumerate(clients)}
    size = 8.0 if len(clients) <= 12 else 6.0
    if len(clients) > _MOST_NAMED:
        places = {t: [i for i, task in enumerate(tasks) if task == t] for t in tasks}
        names = {(p[0] + p[-1]) / 2: short(task) for task, p in places.items()}
        size = 8.5
    axes.set_xticks(list(names), list(names.values()), rotation=90, fontsize=size)
    axes.set_yticks(list(names), list(names.values()), fontsize=size)
    for place in range(1, len(clients)):
        if tasks[place] != tasks[place - 1]:
            axes.axhline(place - 0.5, color="#666666", linewidth=0.9, linestyle="-", marker="")
            axes.axvline(place - 0.5, color="#666666", linewidth=0.9, linestyle="-", marker="")


def _rows(clients: list[str], array: NDArray[np.float64]) -> list[list[str]]:
    rows = [["", *clients]]
    for client, values in zip(clients, array, strict=True):
        rows.append([client, *("–" if np.isnan(value) else f"{value:.3f}" for value in values)])
    return rows
