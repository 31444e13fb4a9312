"""The time line as a diagram: one panel per exchange with server, clients, and what travelled."""

from functools import partial

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pilot_flwr.report.drawing import Figure, Panel, colour, math_text, some, text_on
from pilot_flwr.report.gather import Exchange, RunData, symbol
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
        "that it was sent, a ring that it stayed with the client. Arrows between server and "
        "clients are as thick as what travelled was large, and carry its bytes summed over the "
        "clients. Θ_l is the LoRA, ψ_t a task adapter, ψ_s the client adapter, ψ_c the cross-task "
        "adapters, φ the router."
    )
    if left_out:
        text += f" {count(left_out, 'exchange')} of {len(by_number)} not drawn."
    panels = [
        Panel(partial(_exchange, run, by_number[number]), _words(by_number[number]), height=3.1)
        for number in shown
    ]
    return Figure("timeline", title, text, panels)


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
    done = "\n".join(_server(exchange))
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
    for row, (stage, clients) in enumerate(exchange.stages.items()):
        bottom = _BOTTOM - (row + 1) * height
        _clients(axes, exchange, stage, len(clients), bottom, height)


def _clients(
    axes: Axes, exchange: Exchange, stage: int, clients: int, bottom: float, height: float
) -> None:
    """Draw the clients of one stage, with a chip for each group of parameters that trained."""
    _box(axes, 0.0, bottom, 1.0, height - 0.02, _STAGE_FILL.get(stage, "#F4F4F4"))
    failed = f", {count(exchange.failures, 'failure')}" if exchange.failures else ""
    heading = f"stage {stage}: {count(clients, 'client')}{failed}"
    axes.text(0.03, bottom + height - 0.05, heading, weight="bold", va="top")
    chips = exchange.trained.get(stage, {})
    for index, (group, (least, most)) in enumerate(chips.items()):
        row, column = divmod(index, 2)
        room = height - 0.13
        tall = min(0.14, room / max(1, (len(chips) + 1) // 2))
        left, low = 0.03 + 0.48 * column, bottom + room - (row + 1) * tall
        shade = colour(GROUP_COLOURS.get(group, 7))
        _box(axes, left, low, 0.46, tall - 0.03, shade, edge=shade)
        numbers = f"{most:,}" if least == most else f"{least:,}–{most:,}"
        sent = TRAVELS_AS.get(group) in exchange.up
        axes.text(
            left + 0.02,
            low + (tall - 0.03) / 2,
            f"{math_text(symbol(group))}  {numbers}",
            color=text_on(shade),
            va="center",
            fontsize=8.5,
        )
        axes.text(
            left + 0.445,
            low + (tall - 0.03) / 2,
            "↑" if sent else "○",
            color=text_on(shade),
            va="center",
            ha="right",
            weight="bold",
            fontsize=9,
        )


def _server(exchange: Exchange) -> list[str]:
    """Say what the server did, from what its aggregation told."""
    lines = []
    if exchange.tasks:
        members = ", ".join(str(len(clients)) for clients in exchange.tasks.values())
        kind = "per task, " if len(exchange.tasks) > 1 else ""
        lines.append(f"averages ψ_t {kind}of {members} clients")
    others = sorted({len({*shares} - {own}) for own, shares in exchange.weights.items()})
    if others:
        with_others = "–".join(map(str, others))
        lines.append(f"mixes {len(exchange.weights)} Θ_l, each with {with_others} others")
    return lines or ["no aggregation"]


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


def _words(exchange: Exchange) -> str:
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
    server = "; ".join(_server(exchange))
    return f"Exchange {exchange.number}: {stages}. Down: {down}. Up: {up}. Server: {server}."
