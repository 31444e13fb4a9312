"""The router's probabilities, by client and over images.

They need the base model, the clients' images and private states, which a simulation keeps in
``clients/`` of the run folder and a real site only on its own disk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pilot_flwr.errors import PilotError
from pilot_flwr.formatting import count, headline
from pilot_flwr.report.matrices import heat_map
from pilot_flwr.report.page import Figure, Panel, Table, short, some
from pilot_flwr.run.history import RunData
from pilot_flwr.run.tables import MOST_CLIENTS

if TYPE_CHECKING:  # heavy imports stay in the functions that compute with them
    from pilot_flwr.data.examples import Example
    from pilot_flwr.model.pilot_model import PilotModel
    from pilot_flwr.model.processor import Processor

Floats = NDArray[np.float64]

MOST_EXAMPLES = 64
"""Maximum number of a client's evaluation examples over which probabilities are averaged."""

IMAGES = 3
"""Number of images of a client shown with their heat maps."""

_BATCH = 16


@dataclass(frozen=True)
class Routed:
    """The router's probabilities for some of a client's evaluation images.

    `tasks` are the T experts, the client's own first, and `mean` (T,) the mean probabilities over
    all tokens of `examples` images. The first `images` (height, width, 3) are as the vision tower
    sees them, in [0, 1]; their `maps` (side, side, T) have the probabilities of every token.
    """

    client: str
    task: str
    tasks: tuple[str, ...]
    mean: Floats
    examples: int
    images: list[Floats]
    maps: list[Floats]


def router_figures(run: RunData, say: Callable[[str], None]) -> list[Figure]:
    """Return the router's figures; if there are none, one whose text explains why."""
    try:
        routed = list(_routed(run, say))
    except PilotError as error:
        text = f"The router's probabilities cannot be shown: {headline(str(error))}"
        return [Figure("router", "Router", text)]
    if not routed:
        text = (
            "No router is available: the method has no stage 2, no client has reached it, or the "
            "private states are not here (real sites keep them on their own disks)."
        )
        return [Figure("router", "Router", text)]
    return [_means(run, routed), *_heat_maps(run, routed)]


def route(
    model: "PilotModel", processor: "Processor", examples: Sequence["Example"], *, shown: int
) -> tuple[Floats, list[Floats], list[Floats]]:
    """Send examples through the router of a model in stage 2.

    Return the mean probability of each expert (T,) over all tokens, the first `shown` images
    (height, width, 3) in [0, 1], and their probabilities (side, side, T). A vision tower that packs
    the patches of several images gives no images and no probabilities of them.
    """
    import torch

    from pilot_flwr.algorithm.connector import CrossTaskMoA
    from pilot_flwr.model.feature_cache import FeatureCache

    connector = model.connector
    assert isinstance(connector, CrossTaskMoA)
    uncached = replace(model.config.feature_cache, where="off")
    features = FeatureCache(uncached)
    total, tokens = np.zeros(len(connector.tasks)), 0
    images: list[Floats] = []
    maps: list[Floats] = []
    visible = [example for example in examples if example.images]
    for start in range(0, len(visible), _BATCH):
        batch = visible[start : start + _BATCH]
        visual = features.encode(model, processor, batch)
        with torch.no_grad():
            logits = connector.router_logits(visual.features.to(model.device))
        probabilities = logits.softmax(-1).double().cpu().numpy()  # (rows, S, T) or (S, T)
        total += probabilities.reshape(-1, len(total)).sum(0)
        tokens += probabilities.size // len(total)
        if probabilities.ndim == 2:  # packed patches, in the tower's order
            continue
        side = round(probabilities.shape[1] ** 0.5)
        first = 0  # row of the example's first image
        rows = iter(visual.images)
        for example in batch:
            counts = [next(rows) for _ in example.images]
            if len(images) < shown and side * side == probabilities.shape[1]:
                whole = range(counts[0])[model.spec.whole]
                images.append(_as_seen(processor, example, whole))
                maps.append(probabilities[first + whole].reshape(side, side, -1))
            first += sum(counts)
    return total / max(1, tokens), images, maps


def _routed(finished: RunData, say: Callable[[str], None]) -> Iterator[Routed]:
    import torch

    from pilot_flwr.data.federation import client_examples, padding_colour
    from pilot_flwr.inference.runs import load_model, open_run, select_client
    from pilot_flwr.model.loading import load_processor

    run = open_run(finished.folder)
    model_config, data = run.config.model, run.config.data
    processor = load_processor(model_config.path, model_config.revision)
    colour = padding_colour(data, processor.image_processor)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown_tasks: set[str] = set()
    events = (event for exchange in finished.exchanges for event in exchange.trained)
    reached = {event.client for event in events if event.stage == 2}
    folders = run.folder / "clients"
    here = [c for c in run.clients() if c.id in reached and (folders / c.id).is_dir()]
    for client in some(here, MOST_CLIENTS):  # loading one takes seconds
        selected = select_client(run, client.id)
        if selected.private is None or selected.private.stage != 2:
            continue
        say(f"router of {client.id}")
        model = load_model(run, selected, device=device)
        split = client_examples(data, client, "test", seed=run.config.seed, background=colour)
        examples = [split[index] for index in range(min(MOST_EXAMPLES, len(split)))]
        shown = 0 if client.task in shown_tasks else IMAGES
        mean, images, maps = route(model, processor, examples, shown=shown)
        shown_tasks.add(client.task)
        tasks = selected.private.tasks
        yield Routed(client.id, client.task, tasks, mean, len(examples), images, maps)


def _as_seen(processor: "Processor", example: "Example", row: int) -> Floats:
    """Return row `row` of an example's first image as the vision tower sees it, in RGB."""
    inputs = processor.inputs(example.images[0].read(), alone=len(example.images) == 1)
    rows = inputs["pixel_values"].flatten(0, -4).double().numpy()
    settings = processor.image_processor
    mean = np.array(settings.image_mean)[:, None, None]
    std = np.array(settings.image_std)[:, None, None]
    pixels = rows[row]
    seen: Floats = (pixels * std + mean).clip(0, 1).transpose(1, 2, 0)
    return seen


def _means(run: RunData, routed: list[Routed]) -> Figure:
    tasks = run.tasks
    array = np.array(
        [
            [row.mean[row.tasks.index(task)] if task in row.tasks else np.nan for task in tasks]
            for row in routed
        ]
    )

    def draw(axes: Axes) -> None:
        heat_map(axes, array, 1.0, aspect="auto")
        axes.set_xticks(range(len(tasks)), tasks, rotation=20 if len(tasks) > 3 else 0)
        axes.set_yticks(range(len(routed)), [short(row.client) for row in routed])
        for index, row in enumerate(routed):
            corner = (tasks.index(row.task) - 0.47, index - 0.44)
            frame: Any = {"fill": False, "edgecolor": "white", "linewidth": 1.4}
            axes.add_patch(Rectangle(corner, 0.94, 0.88, **frame))
            for place, value in enumerate(array[index]):
                style: Any = {"fontsize": 8, "color": "white" if value < 0.6 else "black"}
                axes.text(place, index, f"{value:.2f}", ha="center", va="center", **style)
        axes.set_title("experts by client")

    text = (
        "Mean probability of each task's expert over all visual tokens of at most "
        f"{max(row.examples for row in routed)} evaluation images per client, after the last "
        "exchange. A row sums to 1; the client's own task is framed."
    )
    if len(routed) < len(run.task_of):
        text += f" {len(routed)} of {count(len(run.task_of), 'client')} are shown."
    rows = [["client", *tasks]]
    for row, values in zip(routed, array, strict=True):
        rows.append([row.client, *(f"{value:.3f}" for value in values)])
    alt = "Mean router probability of every client for every task."
    height = max(2.4, min(1.3 + 0.24 * len(routed), 12.0))
    panel = Panel(draw, alt, height=height, continuous=True)
    title = "Router: mean probability per task"
    return Figure("router", title, text, [panel], [Table("Mean probabilities", rows)])


def _heat_maps(run: RunData, routed: list[Routed]) -> list[Figure]:
    shown = [row for row in routed if row.images]
    if not shown:
        return []
    side = shown[0].maps[0].shape[0]
    text = (
        "Probability of each task's expert at every visual token, for evaluation images of one "
        f"client per task as its vision tower sees them: {side} × {side} tokens over the image in "
        "grey. All maps share the scale on the right; the client's own task is in bold."
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
    style: Any = {"extent": (0.0, float(width), float(height), 0.0)}
    luminance = image @ np.array([0.299, 0.587, 0.114])
    grey = 0.2 + 0.6 * luminance  # low contrast, to keep the colours readable
    columns = ["image", *[task for task in tasks if task in row.tasks]]
    scale: Any = None
    for place, task in enumerate(columns):
        part = axes.inset_axes((place / len(columns), 0, 0.95 / len(columns), 0.7))
        part.set_axis_off()
        if place == 0:
            part.imshow(image, interpolation="nearest", **style)
        else:
            part.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest", **style)
            own = probabilities[:, :, row.tasks.index(task)]
            scale = part.imshow(own, vmin=0, vmax=1, alpha=0.62, cmap="viridis", **style)
        weight = "bold" if task == row.task else "normal"
        part.set_title(task, fontsize=7.5, weight=weight, pad=2, loc="left")
    if scale is not None:
        bar = axes.figure.colorbar(scale, ax=axes, aspect=12, pad=0.01, ticks=[0, 0.5, 1])
        bar.solids.set_alpha(1)  # type: ignore[union-attr]
        bar.ax.tick_params(labelsize=7)
