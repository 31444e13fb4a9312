"""The time line as a diagram, and bytes and seconds of every exchange.

The diagram has one panel per exchange: server, clients, and the messages between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter

from pilot_flwr.errors import ModelError
from pilot_flwr.formatting import count, human_bytes, human_seconds
from pilot_flwr.model.shapes import layout_of
from pilot_flwr.report.history import (
    Exchange,
    RunData,
    partly_sent,
    sharing_of,
    symbols,
)
from pilot_flwr.report.style import (
    GREY,
    INK,
    Figure,
    Panel,
    Table,
    bar_edges,
    colour,
    exchange_axis,
    math_text,
    some,
    text_on,
)
from pilot_flwr.run.events import ExchangeClosed, Trained, select, symbol

MOST_EXCHANGES = 9
"""Exchanges drawn at most."""

GROUP_COLOURS = {
    "lora": 0,
    "own_task_adapter": 1,
    "client_adapter": 2,
    "cross_task_adapters": 3,
    "router": 4,
}

TRAVELS_AS = {"lora": "lora", "own_task_adapter": "task_adapters"}
"""Group of parameters → the part of a message that carries it."""

_STAGE_FILL = {1: "#EAF4FB", 2: "#FDF3E3"}
_LINE = "#555555"

_TOP, _BOTTOM = 0.82, 0.50
"""The arrows' ends at the server's box and at the clients'."""


def time_line(run: RunData) -> Figure:
    """Return one panel per exchange: stages, trained groups, messages and their bytes."""
    title = "Time line"
    if not run.exchanges:
        return Figure("timeline", title, "No exchange has been completed.")
    by_number = {exchange.number: exchange for exchange in run.exchanges}
    shown = some(list(by_number), MOST_EXCHANGES)
    left_out = len(by_number) - len(shown)
    text = (
        "What was observed in each exchange. Coloured boxes are the parameters that the clients "
        "trained, with the number of those that had gradients on one client; an arrow in the box "
        "means that they were sent (how many, if not all), a ring that they stayed with the "
        "client. Arrows between server and clients are labelled with the bytes sent, summed over "
        f"the clients, and their width shows the share of the largest. {symbols(_shown(run))}"
    )
    if run.config.train.ditto.enabled:
        text += " Each client also trains a personal model v, by which it is scored (Ditto)."
    if left_out:
        text += f" {count(left_out, 'exchange')} of {len(by_number)} not drawn."
    panels = [
        Panel(partial(_exchange, run, by_number[number]), _alt(run, by_number[number]), height=3.1)
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
    closed = select(run.events, ExchangeClosed, exchange.number)
    of_total = f" of {closed[-1].exchanges}" if closed else ""
    axes.set_title(f"exchange {exchange.number}{of_total}, {seconds}")
    _box(axes, 0.0, _TOP, 1.0, 1 - _TOP, "#F4F4F4")
    axes.text(0.03, 0.96, "server", weight="bold", va="top")
    done = "\n".join(run.server_lines(exchange))
    for name in ("Θ_l", "ψ_t"):
        done = done.replace(name, math_text(name))
    axes.text(0.97, 0.96, done, va="top", ha="right", fontsize=8, linespacing=1.25)
    largest = max(sum(way.values()) for e in run.exchanges for way in (e.down, e.up)) or 1
    _arrow(axes, 0.10, down=True, share=sum(exchange.down.values()) / largest)
    _arrow(axes, 0.58, down=False, share=sum(exchange.up.values()) / largest)
    for place, way, name in ((0.17, exchange.down, "down"), (0.65, exchange.up, "up")):
        sizes = "\n".join(f"{math_text(symbol(n))}  {human_bytes(size)}" for n, size in way.items())
        axes.text(
            place, (_TOP + _BOTTOM) / 2, sizes or f"nothing {name}", va="center", fontsize=8.5
        )
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
    places = _chip_places(chips)
    room = height - 0.13
    tall = min(0.14, room / max(1, 1 + max((row for row, _ in places), default=0)))
    for chip, (row, column) in zip(chips, places, strict=True):
        left, low = 0.03 + 0.48 * column, bottom + room - (row + 1) * tall
        _chip(axes, chip, left, low, tall - 0.03)


@dataclass(frozen=True)
class Chip:
    """A group of parameters that trained: least and most per client, and what of them was sent."""

    group: str
    numbers: tuple[int, int]
    sent: bool
    part: str = ""

    @property
    def width(self) -> float:
        """Two chips stand side by side; one with a part has its own row."""
        return 0.94 if self.part else 0.46


def _sent(run: RunData, exchange: Exchange, group: str) -> tuple[bool, str]:
    """Return whether a group was sent, and, if only partly, how much of it."""
    if TRAVELS_AS.get(group) not in exchange.up:
        return False, ""
    matrix = partly_sent(run.config) if group == "lora" else ""
    return True, f"{_parameters(run, matrix)} of " if matrix else ""


def _parameters(run: RunData, matrix: str) -> str:
    """Return how many parameters of the LoRA are sent, by the base model's settings."""
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


def _chip_places(chips: Sequence[Chip]) -> list[tuple[int, int]]:
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
    text = f"{math_text(symbol(chip.group))}  {chip.part}{numbers}"
    axes.text(left + 0.02, middle, text, fontsize=8.5, **style)
    mark = "↑" if chip.sent else "○"
    right = left + chip.width - 0.015
    axes.text(right, middle, mark, ha="right", weight="bold", fontsize=9, **style)


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


def _alt(run: RunData, exchange: Exchange) -> str:
    """Describe a panel."""
    stages = "; ".join(
        f"stage {stage}, {count(len(clients), 'client')} trained "
        + ", ".join(f"{symbol(g)} ({n[1]:,})" for g, n in exchange.trained.get(stage, {}).items())
        for stage, clients in exchange.stages.items()
    )
    down, up = (
        ", ".join(f"{symbol(name)} {human_bytes(size)}" for name, size in way.items()) or "nothing"
        for way in (exchange.down, exchange.up)
    )
    server = "; ".join(run.server_lines(exchange))
    return f"Exchange {exchange.number}: {stages}. Down: {down}. Up: {up}. Server: {server}."


def traffic(run: RunData) -> Figure:
    """Return a panel of the bytes and one of the seconds."""
    title = "Bytes and seconds per exchange"
    if not run.exchanges:
        return Figure("bytes-and-seconds", title, "No exchange has been completed.")
    down, up = (
        sum(sum(getattr(e, way).values()) for e in run.all_orders) for way in ("down", "up")
    )
    text = (
        "Bytes are those of the arrays in all messages of the run, summed over the clients: "
        f"{human_bytes(down)} down and {human_bytes(up)} up in all. "
    )
    if run.closing:
        closing = human_bytes(sum(run.closing.down.values()))
        text += f"The closing evaluation after the last exchange accounts for {closing} down. "
    text += (
        "Seconds are wall time on the server; the thin bars are the clients' sessions, which "
        "overlap where clients work at the same time. The first exchange includes the start of "
        "the clients' processes."
    )
    sums = ((_name(run, e), sum(e.down.values()), sum(e.up.values())) for e in run.all_orders)
    sizes = "; ".join(f"{n}: {human_bytes(d)} down, {human_bytes(u)} up" for n, d, u in sums)
    closed = (e for e in run.all_orders if e.seconds is not None)
    seconds = "; ".join(f"{_name(run, e)}: {e.seconds:.1f}" for e in closed)
    panels = [
        Panel(partial(_bytes, run), f"Bytes per exchange: {sizes}."),
        Panel(partial(_seconds, run), f"Seconds per exchange: {seconds}."),
    ]
    return Figure("bytes-and-seconds", title, text, panels, [_table(run)])


def _exchange_places(run: RunData) -> dict[float, Exchange]:
    """Return the exchanges by place on the axis, the closing evaluation at a distance."""
    places = {float(exchange.number): exchange for exchange in run.exchanges}
    if run.closing:
        first, last = run.exchanges[0].number, run.exchanges[-1].number
        places[last + max(1.2, 0.15 * (last - first))] = run.closing
    return places


def _bytes(run: RunData, axes: Axes) -> None:
    names = dict.fromkeys(n for e in run.all_orders for way in (e.down, e.up) for n in way)
    places = _exchange_places(run)
    for shift, way in ((-0.2, "down"), (0.2, "up")):
        floor = np.zeros(len(places))
        for index, name in enumerate(names):
            heights = np.array([getattr(e, way).get(name, 0) for e in places.values()])
            if not heights.any():
                continue
            axes.bar(
                [place + shift for place in places],
                heights,
                width=0.36,
                bottom=floor,
                color=colour(index),
                alpha=1.0 if way == "down" else 0.6,
                label=f"{math_text(symbol(name))} {way}",
                **bar_edges(2 * len(places)),
            )
            floor += heights
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    _finish(run, axes, "bytes", places)


def _seconds(run: RunData, axes: Axes) -> None:
    places = _exchange_places(run)
    closed = {place: e.seconds for place, e in places.items() if e.seconds is not None}
    sessions = {place: _session_seconds(run, places[place]) for place in closed}
    bars = [
        (place - 0.36 + 0.72 / len(seconds) * (index + 0.5), 0.72 / len(seconds), height)
        for place, seconds in sessions.items()
        for index, height in enumerate(seconds)
    ]
    if bars:
        x, width, height = zip(*bars, strict=True)
        axes.bar(
            x, height, width=width, color=colour(5), label="a client's session",
            **bar_edges(len(bars)),
        )  # fmt: skip
    if closed:
        ends = [place - 0.4 for place in closed], [place + 0.4 for place in closed]
        axes.hlines(list(closed.values()), *ends, color=INK, linewidth=2.4, label="the exchange")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    _finish(run, axes, "seconds", places)


def _session_seconds(run: RunData, exchange: Exchange) -> list[float]:
    """Return how long the clients' training sessions took, in the order in which they began."""
    trained = sorted(
        select(run.events, Trained, exchange.number), key=lambda event: event.started or 0.0
    )
    return [event.session_seconds or event.seconds for event in trained]


def _finish(run: RunData, axes: Axes, title: str, places: Mapping[float, Exchange]) -> None:
    axes.set_title(title)
    exchange_axis(axes, [exchange.number for exchange in run.exchanges], "exchange")
    if run.closing:
        low, high = run.exchanges[0].number, run.exchanges[-1].number
        named = {n: f"{n:g}" for n in axes.get_xticks() if low <= n <= high}
        named[max(places)] = "closing"
        axes.set_xticks(list(named), list(named.values()))
        axes.set_xlabel("exchange, and the closing evaluation")
    axes.set_xlim(min(places) - 0.6, max(places) + 0.6)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", color=GREY)


def _name(run: RunData, exchange: Exchange) -> str:
    return "closing evaluation" if exchange is run.closing else str(exchange.number)


def _table(run: RunData) -> Table:
    names = list(dict.fromkeys(n for e in run.all_orders for way in (e.down, e.up) for n in way))
    header = ["exchange", "seconds"]
    header += [f"{symbol(name)} {way}" for way in ("down", "up") for name in names]
    rows = [header]
    for exchange in run.all_orders:
        sizes = [way.get(name, 0) for way in (exchange.down, exchange.up) for name in names]
        seconds = "–" if exchange.seconds is None else f"{exchange.seconds:.1f}"
        rows.append([_name(run, exchange), seconds, *(f"{size:,}" for size in sizes)])
    return Table("Bytes and seconds of every exchange", rows)
