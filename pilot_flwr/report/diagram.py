"""The time line as a diagram: one panel per exchange with server, clients, and what travelled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pilot_flwr.errors import ModelError
from pilot_flwr.model.layout import layout_of
from pilot_flwr.report.drawing import Figure, Panel, colour, math_text, some, text_on
from pilot_flwr.report.gather import Exchange, RunData, symbol
from pilot_flwr.report.method import partly_sent, server_lines, sharing_of, symbols
from pilot_flwr.storage.run_folder import select
from pilot_flwr.wording import count, human_bytes, human_seconds

MOST_EXCHANGES = 9
"""Drawn at most: the first and last, and evenly spread ones between."""

GROUP_COLOURS = {
    "lora": 0,
    "own_task_adapter": 1,
    "client_adapter": 2,
    "cross_task_adapters": 3,
    "router": 4,
}

TRAVELS_AS = {"lora": "lora", "own_task_adapter": "task_adapters"}
"""What a group of parameters is called in a message."""

_STAGE_FILL = {1: "#EAF4FB", 2: "#FDF3E3"}
_LINE = "#555555"
_TOP, _BOTTOM = 0.82, 0.50
"""Where the arrows end at the server's box and at the clients'."""


def time_line(run: RunData) -> Figure:
    """Return one panel per exchange: stages, what trained, what travelled, how much."""
    title = "Time line"
    if not run.exchanges:
        return Figure("timeline", title, "No exchange has been completed.")
    by_number = {exchange.number: exchange for exchange in run.exchanges}
    shown = some(list(by_number), MOST_EXCHANGES)
    left_out = len(by_number) - len(shown)
    text = (
        "What was observed in each exchange. Boxes in colour are what the clients trained, with "
        "the number of parameters that had gradients on one client; an arrow in the box means "
        "that it was sent (how much of it, if not all), a ring that it stayed with the client. "
        "Arrows between server and clients are as thick as what travelled was large, and carry its "
        f"bytes summed over the clients. {symbols(_shown(run))}"
    )
    if run.config.train.ditto.enabled:
        text += " Beside it each client trains a personal model v, by which it is scored (Ditto)."
    if left_out:
        text += f" {count(left_out, 'exchange')} of {len(by_number)} not drawn."
    panels = [
        Panel(
            partial(_exchange, run, by_number[number]), _words(run, by_number[number]), height=3.1
        )
        for number in shown
    ]
    return Figure("timeline", title, text, panels)


def _shown(run: RunData) -> list[str]:
    """Return the groups and parts whose symbols the panels show."""
    names = [group for e in run.exchanges for groups in e.trained.values() for group in groups]
    names += [part for e in run.exchanges for way in (e.down, e.up) for part in way]
    known = {part: group for group, part in TRAVELS_AS.items()}
    return list(dict.fromkeys(known.get(name, name) for name in names))


def _exchange(run: RunData, exchange: Exchange, axes: Axes) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    seconds = "not closed" if exchange.seconds is None else human_seconds(exchange.seconds)
    total = select(run.events, "round", exchange.number)
    of_total = f" of {total[-1]['exchanges']}" if total else ""
    axes.set_title(f"exchange {exchange.number}{of_total}, {seconds}")
    _box(axes, 0.0, _TOP, 1.0, 1 - _TOP, "#F4F4F4")
    axes.text(0.03, 0.96, "server", weight="bold", va="top")
    done = "\n".join(server_lines(run.config.strategy, exchange))
    for name in ("Θ_l", "ψ_t"):
        done = done.replace(name, math_text(name))
    axes.text(0.97, 0.96, done, va="top", ha="right", fontsize=8, linespacing=1.25)
    largest = max(sum(way.values()) for e in run.exchanges for way in (e.down, e.up)) or 1
    _arrow(axes, 0.10, down=True, share=sum(exchange.down.values()) / largest)
    _arrow(axes, 0.58, down=False, share=sum(exchange.up.values()) / largest)
    for place, way, name in ((0.17, exchange.down, "down"), (0.65, exchange.up, "up")):
        words = _sizes(way) or f"nothing {name}"
        axes.text(place, (_TOP + _BOTTOM) / 2, words, va="center", fontsize=8.5)
    height = _BOTTOM / max(1, len(exchange.stages))
    for row, stage in enumerate(exchange.stages):
        bottom = _BOTTOM - (row + 1) * height
        _clients(axes, run, exchange, stage, bottom, height)


def _clients(
    axes: Axes, run: RunData, exchange: Exchange, stage: int, bottom: float, height: float
) -> None:
    """Draw the clients of one stage, with a chip for each group of parameters that trained."""
    _box(axes, 0.0, bottom, 1.0, height - 0.02, _STAGE_FILL.get(stage, "#F4F4F4"))
    failed = f", {count(exchange.failures, 'failure')}" if exchange.failures else ""
    clients = count(len(exchange.stages[stage]), "client")
    heading = f"stage {stage}: {clients}{failed}"
    axes.text(0.03, bottom + height - 0.05, heading, weight="bold", va="top")
    chips = [
        Chip(group, numbers, *_sent(run, exchange, group))
        for group, numbers in exchange.trained.get(stage, {}).items()
    ]
    places = _places(chips)
    room = height - 0.13
    tall = min(0.14, room / max(1, 1 + max((row for row, _ in places), default=0)))
    for chip, (row, column) in zip(chips, places, strict=True):
        left, low = 0.03 + 0.48 * column, bottom + room - (row + 1) * tall
        _chip(axes, chip, left, low, tall - 0.03)


@dataclass(frozen=True)
class Chip:
    """A group of parameters that trained: how many, least and most, and what of them was sent."""

    group: str
    numbers: tuple[int, int]
    sent: bool
    part: str = ""

    @property
    def width(self) -> float:
        """Two stand side by side, but one that says more has a row of its own."""
        return 0.94 if self.part else 0.46


def _sent(run: RunData, exchange: Exchange, group: str) -> tuple[bool, str]:
    """Return whether a group was sent, and how much of it if it was not all of it."""
    if TRAVELS_AS.get(group) not in exchange.up:
        return False, ""
    matrix = partly_sent(run.config) if group == "lora" else ""
    return True, f"{_parameters(run, matrix)} of " if matrix else ""


def _parameters(run: RunData, matrix: str) -> str:
    """Return how many parameters of the LoRA are sent; the base model's settings say it."""
    config = run.config
    try:
        layout = layout_of(
            config.model,
            tuple(config.data.tasks),
            sharing_of(config),
            stages=config.strategy.stages,
        )
    except ModelError:  # the base model is not on this machine
        return f"only {matrix}"
    return f"{matrix}: {sum(math.prod(shape) for shape in layout.sent['lora'].values()):,}"


def _places(chips: Sequence[Chip]) -> list[tuple[int, int]]:
    """Return row and column of every chip."""
    places, row, column = [], 0, 0
    for chip in chips:
        if column and chip.part:
            row, column = row + 1, 0
        places.append((row, column))
        row, column = (row, 1) if column == 0 and not chip.part else (row + 1, 0)
    return places


def _chip(axes: Axes, chip: Chip, left: float, low: float, height: float) -> None:
    shade = colour(GROUP_COLOURS.get(chip.group, 7))
    _box(axes, left, low, chip.width, height, shade, edge=shade)
    least, most = chip.numbers
    numbers = f"{most:,}" if least == most else f"{least:,}–{most:,}"
    style: Any = {"color": text_on(shade), "va": "center"}
    middle = low + height / 2
    words = f"{math_text(symbol(chip.group))}  {chip.part}{numbers}"
    axes.text(left + 0.02, middle, words, fontsize=8.5, **style)
    mark = "↑" if chip.sent else "○"
    right = left + chip.width - 0.015
    axes.text(right, middle, mark, ha="right", weight="bold", fontsize=9, **style)


def _sizes(way: dict[str, int]) -> str:
    sizes = (f"{math_text(symbol(n))}  {human_bytes(size)}" for n, size in way.items())
    return "\n".join(sizes)


def _box(
    axes: Axes, left: float, bottom: float, width: float, height: float, fill: str, edge: str = ""
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left + 0.01, bottom + 0.01),
            width - 0.02,
            height - 0.02,
            boxstyle="round,pad=0.005,rounding_size=0.015",
            facecolor=fill,
            edgecolor=edge or "#BBBBBB",
            linewidth=0.8,
            clip_on=False,
        )
    )


def _arrow(axes: Axes, x: float, *, down: bool, share: float) -> None:
    start, end = (_TOP, _BOTTOM) if down else (_BOTTOM, _TOP)
    if share <= 0:
        return
    head, tail = 8 + 8 * share, 1 + 9 * share
    axes.add_patch(
        FancyArrowPatch(
            (x, start),
            (x, end),
            arrowstyle=f"simple,head_length=7,head_width={head},tail_width={tail}",
            color=_LINE,
            linewidth=0,
        )
    )


def _words(run: RunData, exchange: Exchange) -> str:
    """Say in words what a panel shows."""
    stages = "; ".join(
        f"stage {stage}, {count(len(clients), 'client')} trained "
        + ", ".join(f"{symbol(g)} ({n[1]:,})" for g, n in exchange.trained.get(stage, {}).items())
        for stage, clients in exchange.stages.items()
    )
    down, up = (
        ", ".join(f"{symbol(name)} {human_bytes(size)}" for name, size in way.items()) or "nothing"
        for way in (exchange.down, exchange.up)
    )
    server = "; ".join(server_lines(run.config.strategy, exchange))
    return f"Exchange {exchange.number}: {stages}. Down: {down}. Up: {up}. Server: {server}."
