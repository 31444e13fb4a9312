"""The timeline as a diagram, and bytes and seconds of every exchange.

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

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.errors import ModelError
from pilot_flwr.formatting import count, human_bytes, human_seconds
from pilot_flwr.model.shapes import layout_of
from pilot_flwr.report.page import (
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
    stacked_bars,
    text_on,
)
from pilot_flwr.run.events import AggregationMethod
from pilot_flwr.run.history import Exchange, RunData, gradients
from pilot_flwr.run.tables import MOST_CLIENTS, PART_GROUPS, aggregation_lines, span, symbol

MOST_EXCHANGES = 9
"""Maximum number of exchanges drawn."""

GROUP_COLOURS = {
    "lora": 0,
    "own_task_adapter": 1,
    "client_adapter": 2,
    "cross_task_adapters": 3,
    "router": 4,
}

SYMBOLS = {
    "lora": "Θ_l is the LoRA",
    "own_task_adapter": "ψ_t a task adapter",
    "client_adapter": "ψ_s the client adapter",
    "cross_task_adapters": "ψ_c the cross-task adapters",
    "router": "φ the router",
    "residual": (
        "R the difference between the mean product B A and the product of the mean factors, which "
        "the server sends and clients add to the frozen base (FedEx-LoRA)"
    ),
}
"""Explanation of the symbols, by group of parameters."""

_STAGE_FILL = {1: "#EAF4FB", 2: "#FDF3E3"}

_TOP, _BOTTOM = 0.82, 0.50
"""Ends of the arrows at the server's and the clients' boxes."""

_HEIGHT = 3.1
"""Height of a panel whose clients are in one stage; another stage adds the share `_BOTTOM`."""


def time_line(run: RunData) -> Figure:
    """Return one panel per exchange: stages, trained groups, messages and their bytes."""
    if not run.exchanges:
        return Figure("timeline", "Timeline", "No exchange has been completed.")
    by_number = {exchange.number: exchange for exchange in run.exchanges}
    shown = some(list(by_number), MOST_EXCHANGES)
    groups = {group for e in run.exchanges for group in gradients(e.trained)}
    groups |= {PART_GROUPS.get(part, part) for e in run.exchanges for part in (*e.down, *e.up)}
    text = (
        "What was observed in each exchange. Coloured boxes are the groups of parameters that the "
        "clients trained, with the number that had gradients on one client; an arrow in the box "
        "means that they were sent (how many, if not all), a ring that they stayed on the client. "
        "Arrows between server and clients are labelled with the bytes sent, summed over the "
        "clients; their width is relative to the largest. "
        f"{', '.join(text for group, text in SYMBOLS.items() if group in groups)}."
    )
    if run.config.train.personal.model != "none":
        text += " Each client also trains a personal model v, by which it is scored."
    if left_out := len(by_number) - len(shown):
        text += f" {count(left_out, 'exchange')} of {len(by_number)} not drawn."
    exchanges = [by_number[number] for number in shown]
    floor = _BOTTOM - _BOTTOM * max(1, *(len(exchange.stages) for exchange in exchanges))
    panels = [
        Panel(partial(_exchange, run, one, floor), _alt(run, one), height=_HEIGHT * (1 - floor))
        for one in exchanges
    ]
    return Figure("timeline", "Timeline", text, panels)


def _server_lines(run: RunData, exchange: Exchange) -> list[str]:
    return aggregation_lines(
        exchange.aggregated, AggregationMethod.of(run.config.strategy), width=10
    )


def _exchange(run: RunData, exchange: Exchange, floor: float, axes: Axes) -> None:
    """Draw an exchange from 1, the top, down to `floor`, below 0 if clients are in two stages."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(floor, 1)
    seconds = "not closed" if exchange.seconds is None else human_seconds(exchange.seconds)
    number = f"{exchange.number} of {run.config.strategy.rounds + 1}"
    axes.set_title(f"exchange {number}, {seconds}")
    _box(axes, 0.0, _TOP, 1.0, 1 - _TOP, "#F4F4F4")
    axes.text(0.03, 0.96, "server", weight="bold", va="top")
    done = "\n".join(_server_lines(run, exchange))
    for name in ("Θ_l", "ψ_t"):
        done = done.replace(name, math_text(name))
    axes.text(0.97, 0.96, done, va="top", ha="right", fontsize=8, linespacing=1.25)
    largest = max(sum(way.values()) for e in run.exchanges for way in (e.down, e.up)) or 1
    for x, name, way in ((0.10, "down", exchange.down), (0.58, "up", exchange.up)):
        _arrow(axes, x, down=name == "down", share=sum(way.values()) / largest)
        sizes = "\n".join(f"{math_text(symbol(n))}  {human_bytes(size)}" for n, size in way.items())
        middle = (_TOP + _BOTTOM) / 2
        axes.text(x + 0.07, middle, sizes or f"nothing {name}", va="center", fontsize=8.5)
    for row, stage in enumerate(exchange.stages):
        _clients(axes, run, exchange, stage, _BOTTOM - (row + 1) * _BOTTOM, _BOTTOM)


def _clients(
    axes: Axes, run: RunData, exchange: Exchange, stage: int, bottom: float, height: float
) -> None:
    """Draw the clients of one stage, with a chip for each group of parameters that trained."""
    trained = exchange.stages[stage]
    _box(axes, 0.0, bottom, 1.0, height - 0.02, _STAGE_FILL.get(stage, "#F4F4F4"))
    failed = f", {count(exchange.failures, 'failure')}" if exchange.failures else ""
    heading = f"stage {stage}: {count(len(trained), 'client')}{failed}"
    axes.text(0.03, bottom + height - 0.05, heading, weight="bold", va="top")
    chips = [_chip_of(run, exchange, *row) for row in gradients(trained).items()]
    places = _chip_places(chips)
    room = height - 0.13
    tall = min(0.14, room / max(1, 1 + max((row for row, _ in places), default=0)))
    for chip, (row, column) in zip(chips, places, strict=True):
        left, low = 0.03 + 0.48 * column, bottom + room - (row + 1) * tall
        _draw_chip(axes, chip, left, low, tall - 0.03)


@dataclass(frozen=True)
class Chip:
    """A group of parameters that trained; `part` says how much of it was sent, if not all."""

    group: str
    numbers: tuple[int, int]
    sent: bool
    part: str = ""


def _chip_of(run: RunData, exchange: Exchange, group: str, numbers: tuple[int, int]) -> Chip:
    sent = group in {PART_GROUPS.get(part, part) for part in exchange.up}
    sharing = Sharing.of(run.config.strategy.sharing, run.config.train.lora_matrices)
    matrices = "".join(matrix for matrix in sharing.trained_lora if matrix in sharing.lora)
    if not sent or group != "lora" or len(matrices) == len(sharing.trained_lora):
        return Chip(group, numbers, sent)
    config = run.config
    tasks, stages = tuple(config.data.tasks), config.strategy.stages
    try:
        lora = layout_of(config.model, tasks, sharing, stages=stages).sent["lora"]
    except ModelError:  # the base model is not on this machine
        return Chip(group, numbers, sent, f"only {matrices} of ")
    parameters = sum(math.prod(shape) for shape in lora.values())
    return Chip(group, numbers, sent, f"{matrices}: {parameters:,} of ")


def _chip_places(chips: Sequence[Chip]) -> list[tuple[int, int]]:
    """Return row and column of every chip: two in a row, or one that was sent in part."""
    places, row, column = [], 0, 0
    for chip in chips:
        if column and chip.part:
            row, column = row + 1, 0
        places.append((row, column))
        row, column = (row, 1) if column == 0 and not chip.part else (row + 1, 0)
    return places


def _draw_chip(axes: Axes, chip: Chip, left: float, low: float, height: float) -> None:
    width = 0.94 if chip.part else 0.46
    shade = colour(GROUP_COLOURS.get(chip.group, 7))
    _box(axes, left, low, width, height, shade, edge=shade)
    style: Any = {"color": text_on(shade), "va": "center"}
    middle = low + height / 2
    text = f"{math_text(symbol(chip.group))}  {chip.part}{span(chip.numbers)}"
    axes.text(left + 0.02, middle, text, fontsize=8.5, **style)
    mark, right = "↑" if chip.sent else "○", left + width - 0.015
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
            color="#555555",
            linewidth=0,
        )
    )


def _alt(run: RunData, exchange: Exchange) -> str:
    stages = "; ".join(
        f"stage {stage}, {count(len(trained), 'client')} trained "
        + ", ".join(f"{symbol(g)} ({most:,})" for g, (_, most) in gradients(trained).items())
        for stage, trained in exchange.stages.items()
    )
    down, up = (
        ", ".join(f"{symbol(name)} {human_bytes(size)}" for name, size in way.items()) or "nothing"
        for way in (exchange.down, exchange.up)
    )
    server = "; ".join(_server_lines(run, exchange))
    return f"Exchange {exchange.number}: {stages}. Down: {down}. Up: {up}. Server: {server}."


def traffic(run: RunData) -> Figure:
    """Return a panel of the bytes and one of the seconds."""
    title = "Bytes and seconds per exchange"
    if not run.exchanges:
        return Figure("bytes-and-seconds", title, "No exchange has been completed.")
    sums = [(_name(run, e), sum(e.down.values()), sum(e.up.values())) for e in run.all_exchanges]
    down = human_bytes(sum(down for _, down, _ in sums))
    up = human_bytes(sum(up for _, _, up in sums))
    text = (
        "Bytes are those of the arrays in all messages of the run, summed over the clients: "
        f"{down} down and {up} up in all. "
    )
    if run.closing:
        closing = human_bytes(sum(run.closing.down.values()))
        text += f"The closing evaluation after the last exchange accounts for {closing} down. "
    text += (
        "Seconds are wall time on the server; the thin bars are the clients' sessions, which "
        "overlap where clients work at the same time. The first exchange includes the start of "
        "the clients' processes."
    )
    sizes = "; ".join(f"{n}: {human_bytes(d)} down, {human_bytes(u)} up" for n, d, u in sums)
    closed = (e for e in run.all_exchanges if e.seconds is not None)
    seconds = "; ".join(f"{_name(run, e)}: {e.seconds:.1f}" for e in closed)
    panels = [
        Panel(partial(_bytes, run), f"Bytes per exchange: {sizes}."),
        Panel(partial(_seconds, run), f"Seconds per exchange: {seconds}."),
    ]
    return Figure("bytes-and-seconds", title, text, panels, [_table(run)])


def _exchange_places(run: RunData) -> dict[float, Exchange]:
    """Return place on the axis → exchange, with the closing evaluation at a distance."""
    places = {float(exchange.number): exchange for exchange in run.exchanges}
    if run.closing:
        first, last = run.exchanges[0].number, run.exchanges[-1].number
        places[last + max(1.2, 0.15 * (last - first))] = run.closing
    return places


def _parts(run: RunData) -> list[str]:
    """Return the parts of all messages, in order of appearance."""
    ways = (way for e in run.all_exchanges for way in (e.down, e.up))
    return list(dict.fromkeys(name for way in ways for name in way))


def _bytes(run: RunData, axes: Axes) -> None:
    places = _exchange_places(run)
    for shift, way, alpha in ((-0.2, "down", 1.0), (0.2, "up", 0.6)):
        stacked_bars(
            axes,
            [place + shift for place in places],
            {
                f"{math_text(symbol(name))} {way}": [
                    getattr(exchange, way).get(name, 0) for exchange in places.values()
                ]
                for name in _parts(run)
            },
            width=0.36,
            bars=2 * len(places),
            alpha=alpha,
        )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    _finish(run, axes, "bytes", places)


def _seconds(run: RunData, axes: Axes) -> None:
    places = _exchange_places(run)
    closed = {place: e.seconds for place, e in places.items() if e.seconds is not None}
    sessions = {place: _session_seconds(places[place]) for place in closed}
    bars = [
        (place - 0.36 + 0.72 / len(seconds) * (index + 0.5), 0.72 / len(seconds), height)
        for place, seconds in sessions.items()
        for index, height in enumerate(seconds)
    ]
    if len(bars) > MOST_CLIENTS * len(closed):  # as one shape each: a bar is costly to draw
        drawn = {place: seconds for place, seconds in sessions.items() if seconds}
        for place, seconds in drawn.items():
            edges = np.linspace(place - 0.36, place + 0.36, len(seconds) + 1)
            label = "clients' sessions, sorted" if place == min(drawn) else None
            axes.stairs(sorted(seconds), edges, fill=True, color=colour(5), label=label)
    elif bars:
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


def _session_seconds(exchange: Exchange) -> list[float]:
    """Return the durations of the clients' sessions that are known, in order of their start."""
    trained = sorted(exchange.trained, key=lambda event: event.started or 0.0)
    return [s for event in trained if (s := event.session_seconds or event.seconds)]


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
    names = _parts(run)
    header = [f"{symbol(name)} {way}" for way in ("down", "up") for name in names]
    rows = [["exchange", "seconds", *header]]
    for exchange in run.all_exchanges:
        sizes = [way.get(name, 0) for way in (exchange.down, exchange.up) for name in names]
        seconds = "–" if exchange.seconds is None else f"{exchange.seconds:.1f}"
        rows.append([_name(run, exchange), seconds, *(f"{size:,}" for size in sizes)])
    return Table("Bytes and seconds of every exchange", rows)
