"""The router of CT-MoA: which task's expert each visual token is sent to.

This needs the clients' private states, which a simulation keeps in ``clients/`` of the run folder
and a real site only on its own disk, and the clients' images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pilot_flwr.algorithm.connector import CrossTaskMoA
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import Client, client_examples, padding_colour
from pilot_flwr.errors import PilotError
from pilot_flwr.formatting import headline
from pilot_flwr.inference.runs import Run, load_model, open_run, select_client
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_processor
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.report.history import RunData
from pilot_flwr.report.matrices import heat_map
from pilot_flwr.report.style import Figure, Panel, Table, short

MOST_EXAMPLES = 64
"""Evaluation examples of a client over which probabilities are averaged, at most."""

_BATCH = 16

IMAGES = 3
"""Images of a client that are shown with their heat maps."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Routed:
    """The probabilities that a client's router gives some of its own evaluation images."""

    client: str
    task: str
    tasks: tuple[str, ...]
    """The experts, the client's own task first."""

    mean: Floats
    """Shape (T,): mean probability over all tokens of `examples` images."""

    examples: int
    images: list[Floats]
    """Shape (height, width, 3), in [0, 1]: what the vision tower saw of the first ones."""

    maps: list[Floats]
    """Shape (side, side, T): the probability of every expert at every token of these."""


def router_figures(run: RunData, say: Callable[[str], None]) -> list[Figure]:
    """Return the figures of the router; if there are none, one whose text says why."""
    name, title = "router", "Router"
    try:
        routed = list(_routed(open_run(run.folder), say))
    except PilotError as error:
        text = f"The router's probabilities cannot be shown: {headline(str(error))}"
        return [Figure(name, title, text)]
    if not routed:
        text = (
            "No client of this run has a router: either the method has no stage 2, or no client "
            "has trained it yet, or their private states are not here: real sites keep their "
            "routers on their own disks."
        )
        return [Figure(name, title, text)]
    return [_means(run, routed), *_heat_maps(run, routed)]


def route(
    model: PilotModel, image_processor: Any, examples: Sequence[Example], *, shown: int
) -> tuple[Floats, list[Floats], list[Floats]]:
    """Send examples through the router of a model in stage 2.

    Returns the mean probability of each expert (T,) over all tokens, the first `shown` images
    (height, width, 3) in [0, 1], and their probabilities (side, side, T).
    """
    connector = model.connector
    assert isinstance(connector, CrossTaskMoA)
    uncached = replace(model.config.feature_cache, where="off")
    features = FeatureCache(uncached, namespace="", folder=Path())
    total, tokens = np.zeros(len(connector.tasks)), 0
    images: list[Floats] = []
    maps: list[Floats] = []
    visible = [example for example in examples if example.images]
    for start in range(0, len(visible), _BATCH):
        batch = visible[start : start + _BATCH]
        visual = features.encode(model, image_processor, batch)
        with torch.no_grad():
            logits = connector.router_logits(visual.features.to(model.device))
        probabilities = logits.softmax(-1).double().cpu().numpy()  # (rows, N, T)
        total += probabilities.sum((0, 1))
        tokens += probabilities.shape[0] * probabilities.shape[1]
        side = round(probabilities.shape[1] ** 0.5)
        first = 0  # row of the example's first image
        shapes = iter(visual.images)
        for example in batch:
            if len(images) < shown and side * side == probabilities.shape[1]:
                images.append(_as_seen(model, image_processor, example))
                maps.append(probabilities[first].reshape(side, side, -1))
            first += sum(next(shapes).rows for _ in example.images)
    return total / max(1, tokens), images, maps


def _routed(run: Run, say: Callable[[str], None]) -> Iterator[Routed]:
    processor = load_processor(run.config.model.path, run.config.model.revision).image_processor
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown_tasks: set[str] = set()
    for client in run.clients():
        if not (run.folder / "clients" / client.id).is_dir():
            continue
        who = select_client(run, client.id)
        if who.private is None or who.private.stage != 2:
            continue
        say(f"router of {client.id}")
        model = load_model(run, who, device=device)
        examples = _examples(run, client, processor)
        shown = 0 if client.task in shown_tasks else IMAGES
        mean, images, maps = route(model, processor, examples, shown=shown)
        shown_tasks.add(client.task)
        tasks = who.private.tasks
        yield Routed(client.id, client.task, tasks, mean, len(examples), images, maps)


def _examples(run: Run, client: Client, image_processor: Any) -> list[Example]:
    data = run.config.data
    examples = client_examples(
        data,
        client,
        "test",
        seed=run.config.seed,
        background=padding_colour(data, image_processor),
    )
    return [examples[index] for index in range(min(MOST_EXAMPLES, len(examples)))]


def _as_seen(model: PilotModel, image_processor: Any, example: Example) -> Floats:
    """Return the first row of an example's first image as the vision tower sees it, in RGB."""
    images = [image.read() for image in example.images]
    pixels = model.spec.crops(image_processor, images)[0][0].double().numpy()
    mean = np.array(image_processor.image_mean)[:, None, None]
    std = np.array(image_processor.image_std)[:, None, None]
    seen: Floats = (pixels * std + mean).clip(0, 1).transpose(1, 2, 0)
    return seen


def _means(run: RunData, routed: list[Routed]) -> Figure:
    examples = max(row.examples for row in routed)
    text = (
        "Mean probability that the router gives to each task's expert, over all visual tokens of "
        f"at most {examples} evaluation images of the client, after the run's last exchange. A row "
        "sums to 1. A uniform router gives every expert the same probability; a router that uses "
        "only its own task's expert has 1 on that task, which is framed."
    )
    tasks = run.tasks
    rows = [["client", *tasks]]
    rows += [[r.client, *(f"{_of(r, task):.3f}" for task in tasks)] for r in routed]
    height = 1.3 + 0.24 * len(routed)
    panel = Panel(
        partial(_mean_matrix, routed, tasks),
        "Mean router probability of every client for every task.",
        height=max(2.4, min(height, 12.0)),
        continuous=True,
    )
    title = "Router: mean probability per task"
    return Figure("router", title, text, [panel], [Table("Mean probabilities", rows)])


def _of(row: Routed, task: str) -> float:
    return float(row.mean[row.tasks.index(task)]) if task in row.tasks else float("nan")


def _mean_matrix(routed: list[Routed], tasks: list[str], axes: Axes) -> None:
    array = np.array([[_of(row, task) for task in tasks] for row in routed])
    heat_map(axes, array, 1.0, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks, rotation=20 if len(tasks) > 3 else 0)
    axes.set_yticks(range(len(routed)), [short(row.client) for row in routed])
    for index, row in enumerate(routed):
        corner = (tasks.index(row.task) - 0.47, index - 0.44)
        axes.add_patch(Rectangle(corner, 0.94, 0.88, fill=False, edgecolor="white", linewidth=1.4))
        for place, value in enumerate(array[index]):
            shade = "white" if value < 0.6 else "black"
            text = f"{value:.2f}"
            axes.text(place, index, text, ha="center", va="center", fontsize=8, color=shade)
    axes.set_title("experts by client")


def _heat_maps(run: RunData, routed: list[Routed]) -> list[Figure]:
    shown = [row for row in routed if row.images]
    if not shown:
        return []
    side = shown[0].maps[0].shape[0]
    text = (
        "The probability of each task's expert at every visual token, over the image as the "
        "vision tower saw it, for evaluation images of one client of each task. An image is "
        f"{side} × {side} tokens. All maps share the scale on the right; the image is shown in "
        "grey below them. The client's own task is in bold."
    )
    panels = [
        Panel(
            partial(_heat_map, row, index, run.tasks),
            f"{row.client}, image {index + 1}: router probabilities of {', '.join(run.tasks)} over "
            "the image.",
            width=3.6 if len(run.tasks) <= 3 else 3.6 * (len(run.tasks) + 1) / 4,
            height=1.35,
            plot=(0.0, 0.0),
            continuous=True,
        )
        for row in shown
        for index in range(len(row.images))
    ]
    return [Figure("router-heat-maps", "Router: probability per visual token", text, panels)]


def _heat_map(row: Routed, index: int, tasks: list[str], axes: Axes) -> None:
    """Draw the image, and beside it the map of each expert over the image in grey."""
    axes.set_axis_off()
    axes.text(0, 1, f"{row.client}, image {index + 1}", weight="bold", va="top")
    image, probabilities = row.images[index], row.maps[index]
    height, width = image.shape[:2]
    grey = 0.2 + 0.6 * (
        image @ np.array([0.299, 0.587, 0.114])
    )  # faint, so that colours stay readable
    columns = ["image", *[task for task in tasks if task in row.tasks]]
    scale: Any = None
    for place, task in enumerate(columns):
        part = axes.inset_axes((place / len(columns), 0, 0.95 / len(columns), 0.7))
        part.set_axis_off()
        extent = (0.0, float(width), float(height), 0.0)
        if place == 0:
            part.imshow(image, extent=extent, interpolation="nearest")
        else:
            part.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            own = probabilities[:, :, row.tasks.index(task)]
            scale = part.imshow(own, extent=extent, vmin=0, vmax=1, alpha=0.62, cmap="viridis")
        weight = "bold" if task == row.task else "normal"
        part.set_title(task, fontsize=7.5, weight=weight, pad=2, loc="left")
    if scale is not None:
        bar = axes.figure.colorbar(scale, ax=axes, aspect=12, pad=0.01, ticks=[0, 0.5, 1])
        bar.solids.set_alpha(1)  # type: ignore[union-attr]
        bar.ax.tick_params(labelsize=7)
