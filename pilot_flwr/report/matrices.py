"""Matrices between clients: LoRA distances and mixing weights.

Up to `MOST_CLIENTS` clients are drawn one by one and named. More are clustered within their task by
distance, and pooled into a picture of at most `_MOST_CELLS` cells a side, so that neither the page
nor the time to draw it grows with K². To describe another aggregation rule, add it to `_LORA_USE`
and `_MIXED`, and to `aggregation_lines`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import StateError
from pilot_flwr.formatting import count
from pilot_flwr.report.page import Figure, Panel, Table, short, some
from pilot_flwr.run.aggregations import Matrices, read_matrices
from pilot_flwr.run.history import RunData
from pilot_flwr.run.tables import MOST_CLIENTS, span

Floats = NDArray[np.float64]

MOST_EXCHANGES = 6
"""Maximum number of exchanges drawn."""

MOST_CLUSTERED = 2000
"""Maximum number of clients in a picture; beyond it, an evenly spaced sample of every task."""

_MOST_CELLS = 200
_SIDE = 3.5

_LORA_USE = {
    "task": "the server averages the LoRAs of a task's clients, weighted by their examples.",
    "global": "the server averages the LoRAs of all clients, weighted by their examples.",
    "exact": "the server averages the LoRAs of all clients, weighted by their examples.",
}

_MIXED = {
    "adaptive": "",
    "task": " All clients of a task receive the same LoRA, weighted by training examples.",
    "global": " All clients receive the same LoRA, weighted by training examples.",
    "exact": (
        " All clients receive the same LoRA, weighted by training examples. These are the weights "
        "of the factors A and B; the residual R, the rest of the mean product B A, is sent "
        "separately."
    ),
}


def distances(run: RunData) -> Figure:
    """Return one panel per exchange with ‖Θ_l,k − Θ_l,j‖₂ between every two clients."""
    strategy = run.config.strategy
    sent = _sent_matrix(run.config)
    text = (
        f"Euclidean distance ‖Θ_l,k − Θ_l,j‖₂ between {f'the matrices {sent} of ' * bool(sent)}the "
        "LoRAs that the clients sent, before aggregation; darker is closer. All panels share one "
        "colour scale. "
    )
    if strategy.distances == "sketch":
        text += "The distances are estimates from a sketch of every LoRA. "
    if strategy.lora == "adaptive":
        own = "the client itself and " if strategy.self_weight else ""
        others = f"its nearest clients (at most {strategy.num_neighbors:,})"
        if strategy.neighbors == "grouped":
            others = "the others of its group (clients whose LoRAs predict each other best)"
        text += (
            f"For each client the server mixes the LoRAs of {own}{others}, weighted by their "
            "numbers of examples and, for neighbours, by the inverse of this distance."
        )
    else:
        text += f"This method does not use them: {_LORA_USE[strategy.lora]}"
    title = "Distances between the clients' LoRAs"
    drawing = Drawing("distance", "viridis", "distances", np.mean)
    return _figure(run, "lora-distances", title, text, drawing)


def mixing_weights(run: RunData) -> Figure:
    """Return one panel per exchange with every client's weight in every client's LoRA."""
    config, sent = run.config, _sent_matrix(run.config)
    adam = config.strategy.server_optimizer.name == "adam"
    text = "Each row is the LoRA that the server sends to a client in the next exchange"
    if adam:
        text = "Each row is the aggregated LoRA of a client"
    text += (
        ", given as the weights of the clients' LoRAs in it. A row sums to 1; white is 0 and "
        f"darker is more.{_MIXED[config.strategy.lora]}"
    )
    if adam:
        text += " The server sends its own LoRA after a step of Adam towards it (FedAdam)."
    if sent:
        other = "B" if sent == "A" else "A"
        trained = other in config.train.lora_matrices
        fate = "stays on the client" if trained else "keeps its initial value"
        text += f" Only the matrices {sent} are sent and mixed; {other} {fate}."
    drawing = Drawing("share", "viridis_r", "weights", np.max, ceiling=1.0)
    return _figure(run, "mixing-weights", "Mixing weights", text, drawing)


def _sent_matrix(config: PilotConfig) -> str:
    """Return the one matrix of the LoRA that is sent, empty if both or none are."""
    sent = Sharing.of(config.strategy.sharing, config.train.lora_matrices).lora
    return sent if len(sent) == 1 else ""


def _no_matrices(config: PilotConfig) -> str:
    strategy = config.strategy
    if strategy.trained_by == "pooled":
        return (
            "One client trains on the data of all (`strategy.trained_by` is 'pooled'), so there "
            "are no LoRAs to compare."
        )
    if strategy.trained_by == "nobody":
        return "Nothing is trained (`strategy.trained_by` is 'nobody'), so no LoRA is sent."
    if strategy.sharing.lora == "none":
        return "The clients send no LoRA (`strategy.sharing.lora` is 'none')."
    return "No exchange aggregated the LoRAs of several clients."


@dataclass(frozen=True)
class Drawing:
    """How one of the two matrices is drawn; `pool` reduces the values of a cell of many clients."""

    label: str
    colours: str
    matrix: Literal["distances", "weights"]
    pool: Callable[..., Floats]
    ceiling: float | None = None

    def of(self, matrices: Matrices) -> Floats:
        """Return the matrix."""
        return matrices.distances if self.matrix == "distances" else matrices.weights

    def blank(self, cells: Floats) -> Floats:
        """Leave out the weights that are 0."""
        return cells if self.matrix == "distances" else np.where(cells == 0, np.nan, cells)


@dataclass(frozen=True)
class Picture:
    """A matrix ready to plot: each side of a cell is `per_cell` clients, whose tasks are `tasks`.

    `clients` are the names of the rows, empty if they are not drawn one by one.
    """

    cells: Floats
    tasks: list[str]
    clients: list[str]
    per_cell: int = 1


def as_array(matrix: Floats, known: list[str], clients: list[str]) -> Floats:
    """Return a matrix of the `known` clients in the order of `clients`, NaN for the others."""
    place = {client: index for index, client in enumerate(known)}
    found = np.array([place.get(client, -1) for client in clients])
    array: Floats = np.where(
        (found < 0)[:, None] | (found < 0), np.nan, matrix[np.ix_(found, found)]
    )
    return array


def cluster(distances: Floats) -> list[int]:
    """Return an order in which close clients are neighbours: average-linkage clustering."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(distances) < 3:
        return list(range(len(distances)))
    condensed = distances[np.triu_indices(len(distances), 1)]
    return [int(leaf) for leaf in leaves_list(linkage(condensed, "average"))]


def clustered(matrices: Matrices, task_of: dict[str, str]) -> list[int]:
    """Return the indices of the clients to draw: by task, clustered within it, sampled if many."""
    by_task: dict[str, list[int]] = {task: [] for task in task_of.values()}
    for place, client in enumerate(matrices.clients):
        by_task.setdefault(task_of[client], []).append(place)
    share = min(1.0, MOST_CLUSTERED / len(matrices.clients))
    order = []
    for places in by_task.values():
        if places:
            drawn = np.array(some(places, max(1, int(share * len(places)))))
            order += drawn[
                cluster(np.nan_to_num(matrices.distances[np.ix_(drawn, drawn)]))
            ].tolist()
    return order


def pooled(array: Floats, pool: Callable[..., Floats]) -> tuple[Floats, int]:
    """Reduce a matrix to at most `_MOST_CELLS` cells a side; return it and the clients per cell."""
    per_cell = -(-len(array) // _MOST_CELLS)
    missing = -len(array) % per_cell
    padded = np.pad(array, (0, missing), mode="edge")
    side = len(padded) // per_cell
    return pool(padded.reshape(side, per_cell, side, per_cell), axis=(1, 3)), per_cell


def _of(matrices: Matrices, places: list[int]) -> Matrices:
    """Return the matrices of some of the clients."""
    square = np.ix_(places, places)
    clients = [matrices.clients[place] for place in places]
    return Matrices(clients, matrices.distances[square], matrices.weights[square])


def _matrices(run: RunData) -> tuple[dict[int, Matrices], list[str]]:
    """Return the matrices of the exchanges to draw, and notes on the others."""
    mixed = {
        e.number: e.aggregated
        for e in run.exchanges
        if e.aggregated and (e.aggregated.file or e.aggregated.neighbors)
    }
    if all(event.clients < 2 for event in mixed.values()):
        return {}, []
    found, notes = {}, []
    shown = some(list(mixed), MOST_EXCHANGES)
    if len(shown) < len(mixed):
        notes.append(f"{count(len(mixed) - len(shown), 'exchange')} of {len(mixed)} not drawn.")
    for number in shown:
        try:
            matrices = read_matrices(run.folder, mixed[number])
        except StateError as error:
            notes.append(f"Exchange {number} is not drawn: {error}")
            continue
        if matrices is None:
            continue
        known = [i for i, client in enumerate(matrices.clients) if client in run.task_of]
        if unknown := len(matrices.clients) - len(known):
            notes.append(f"Exchange {number} has {count(unknown, 'client')} that are on no roster.")
            matrices = _of(matrices, known)
        if len(known) > 1:
            found[number] = matrices
    return found, notes


def _picture(run: RunData, matrices: Matrices, clients: list[str], drawing: Drawing) -> Picture:
    """Return an exchange's picture; `clients` are those of all exchanges."""
    task_of, array = run.task_of, drawing.of(matrices)
    here = set(matrices.clients)
    few = [c for c in clients if len(clients) <= MOST_CLIENTS or c in here]
    if len(few) <= MOST_CLIENTS:
        shown = drawing.blank(as_array(array, matrices.clients, few))
        return Picture(shown, [task_of[client] for client in few], few)
    order = clustered(matrices, task_of)
    cells, per_cell = pooled(array[np.ix_(order, order)], drawing.pool)
    tasks = [task_of[matrices.clients[place]] for place in order]
    return Picture(drawing.blank(cells), tasks, [], per_cell)


def _figure(run: RunData, name: str, title: str, text: str, drawing: Drawing) -> Figure:
    found, notes = _matrices(run)
    if not found:
        return Figure(name, title, " ".join(notes) or _no_matrices(run.config))
    if run.config.train.ditto.enabled:
        text += (
            " This is the shared model; a client is scored by its personal model v, which is "
            "trained towards the shared one and never sent (Ditto)."
        )
    seen = {client for matrices in found.values() for client in matrices.clients}
    clients = [client for client in run.task_of if client in seen]
    pictures = {number: _picture(run, m, clients, drawing) for number, m in found.items()}
    text = " ".join([text, *_about(found, pictures, drawing), *notes])
    high = drawing.ceiling or max(float(np.nanmax(p.cells)) for p in pictures.values())

    def draw(number: int, axes: Axes) -> None:
        picture = pictures[number]
        heat_map(axes, picture.cells, high or 1.0, drawing.colours, drawing.label)
        _name_clients(axes, picture)
        axes.set_title(f"exchange {number}")

    panels = [
        Panel(
            partial(draw, number),
            f"{title} after exchange {number}: {len(m.clients)} by {len(m.clients)} clients.",
            height=_SIDE,
            continuous=True,
        )
        for number, m in found.items()
    ]
    tables = [
        Table(f"Exchange {number}", _rows(picture.clients, picture.cells))
        if picture.clients
        else Table(*_task_rows(run, number, found[number], drawing))
        for number, picture in pictures.items()
    ]
    if drawing.matrix == "weights" and run.config.strategy.neighbors != "fixed":
        tables.append(_neighbors(run, found, clients))
    return Figure(name, title, text, panels, tables)


def _neighbors(run: RunData, found: dict[int, Matrices], clients: list[str]) -> Table:
    """Return how many other clients each client's LoRA has; of many clients, the span by task."""
    others = [
        dict(zip(m.clients, (m.weights > 0).sum(axis=1) - (m.weights.diagonal() > 0), strict=True))
        for m in found.values()
    ]
    groups = {client: [client] for client in clients}
    if len(clients) > MOST_CLIENTS:
        groups = {task: [c for c in clients if run.task_of[c] == task] for task in run.tasks}
    rows = [["", *(f"exchange {number}" for number in found)]]
    for name, members in groups.items():
        drawn = [[int(n[c]) for c in members if c in n] for n in others]
        rows.append([name, *(span((min(n), max(n))) if n else "–" for n in drawn)])
    return Table("Neighbours in each client's LoRA", rows)


def _about(found: dict[int, Matrices], pictures: dict[int, Picture], drawing: Drawing) -> list[str]:
    """Describe pictures of many clients."""
    many = [number for number, picture in pictures.items() if not picture.clients]
    if not many:
        return []
    notes = [
        "Clients are ordered by task and, within a task and an exchange, by hierarchical "
        "clustering of their distances (average linkage)."
    ]
    largest = max(many, key=lambda number: len(found[number].clients))
    drawn, clients = len(pictures[largest].tasks), len(found[largest].clients)
    if drawn < clients:
        notes.append(f"{drawn:,} of {clients:,} clients are shown, evenly spaced within each task.")
    if (per_cell := pictures[largest].per_cell) > 1:
        value = "the mean distance" if drawing.matrix == "distances" else "the largest share"
        notes.append(f"A cell is {value} of up to {per_cell} × {per_cell} clients.")
    return notes


def heat_map(
    axes: Axes,
    array: Floats,
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


def _name_clients(axes: Axes, picture: Picture) -> None:
    """Name the clients at both axes, or the tasks of many clients; draw lines between tasks."""
    clients, tasks = picture.clients, picture.tasks
    names: dict[float, str] = {place: short(client) for place, client in enumerate(clients)}
    size = 8.0 if len(clients) <= 12 else 6.0
    if not clients:
        places = {t: [i for i, task in enumerate(tasks) if task == t] for t in tasks}
        ends = ((short(task), p[0], p[-1]) for task, p in places.items())
        names = {((a + b + 1) / 2 / picture.per_cell - 0.5): task for task, a, b in ends}
        size = 8.5
    axes.set_xticks(list(names), list(names.values()), rotation=90, fontsize=size)
    axes.set_yticks(list(names), list(names.values()), fontsize=size)
    for place in range(1, len(tasks)):
        if tasks[place] != tasks[place - 1]:
            for line in (axes.axhline, axes.axvline):
                style: Any = {"color": "#666666", "linewidth": 0.9, "linestyle": "-", "marker": ""}
                line(place / picture.per_cell - 0.5, **style)


def _rows(clients: list[str], array: Floats) -> list[list[str]]:
    rows = [["", *clients]]
    for client, values in zip(clients, array, strict=True):
        rows.append([client, *("–" if np.isnan(value) else f"{value:.3f}" for value in values)])
    return rows


def _task_rows(
    run: RunData, number: int, matrices: Matrices, drawing: Drawing
) -> tuple[str, list[list[str]]]:
    """Return a table of many clients by task: mean distance, or mean sum of the shares."""
    tasks = np.array([run.task_of[client] for client in matrices.clients])
    groups = {task: np.flatnonzero(tasks == task) for task in run.tasks if task in tasks}
    array, rows = drawing.of(matrices), [["", *groups]]
    for task, mine in groups.items():
        blocks = [(array[np.ix_(mine, theirs)], theirs) for theirs in groups.values()]
        if drawing.matrix == "weights":
            values = [float(block.sum(axis=1).mean()) for block, _ in blocks]
        else:  # the distance of a client to itself does not count
            pairs = [block.size - (theirs is mine) * len(mine) for block, theirs in blocks]
            values = [
                float(b.sum()) / n if n else np.nan for (b, _), n in zip(blocks, pairs, strict=True)
            ]
        rows.append([task, *("–" if np.isnan(value) else f"{value:.3f}" for value in values)])
    mean = "mean distance" if drawing.matrix == "distances" else "mean share of each task's clients"
    return f"Exchange {number}, {count(len(matrices.clients), 'client')}: {mean}, by task", rows
