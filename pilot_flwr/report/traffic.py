"""Bytes and seconds of every exchange."""

from collections.abc import Mapping
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from pilot_flwr.report.drawing import (
    GREY,
    INK,
    Figure,
    Panel,
    Table,
    bar_edges,
    colour,
    exchange_axis,
    math_text,
)
from pilot_flwr.report.fitting import legend_below
from pilot_flwr.report.gather import Exchange, RunData, symbol
from pilot_flwr.storage.run_folder import Event, select
from pilot_flwr.wording import human_bytes


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
        text += f"Of those {closing} down are of the closing evaluation behind the last exchange. "
    text += (
        "Seconds are wall time on the server; the bars behind are the clients' own turns, one thin "
        "bar each, which overlap as far as clients work at the same time. The first exchange "
        "includes the start of the clients' processes."
    )
    panels = [
        Panel(partial(_bytes, run), f"Bytes per exchange: {_row(run)}."),
        Panel(partial(_seconds, run), f"Seconds per exchange: {_seconds_row(run)}."),
    ]
    return Figure("bytes-and-seconds", title, text, panels, [_table(run)])


def turns(run: RunData, number: int) -> list[Event]:
    """Return the training turns of an exchange in the order in which they began."""
    trained = select(run.events, "train", number)
    return sorted(trained, key=lambda e: float(e.get("started") or 0))


def _places(run: RunData) -> dict[float, Exchange]:
    """Return the exchanges by their places on the axis, the closing evaluation apart from them."""
    places = {float(exchange.number): exchange for exchange in run.exchanges}
    if run.closing:
        first, last = run.exchanges[0].number, run.exchanges[-1].number
        places[last + max(1.2, 0.15 * (last - first))] = run.closing
    return places


def _bytes(run: RunData, axes: Axes) -> None:
    names = dict.fromkeys(n for e in run.all_orders for way in (e.down, e.up) for n in way)
    places = _places(run)
    for shift, way in ((-0.2, "down"), (0.2, "up")):
        floor = [0.0] * len(places)
        for index, name in enumerate(names):
            heights = [getattr(exchange, way).get(name, 0) for exchange in places.values()]
            if not any(heights):
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
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    _finish(run, axes, "bytes", places)


def _seconds(run: RunData, axes: Axes) -> None:
    places = _places(run)
    closed = {place: e for place, e in places.items() if e.seconds is not None}
    own = {place: _own_seconds(run, exchange) for place, exchange in closed.items()}
    edges = bar_edges(sum(map(len, own.values())))
    labelled: set[str] = set()
    for place, exchange in closed.items():
        assert exchange.seconds is not None
        width = 0.72 / max(1, len(own[place]))
        axes.bar(
            [place - 0.36 + width * (index + 0.5) for index in range(len(own[place]))],
            own[place],
            width=width,
            color=colour(5),
            label="a client's turn" if own[place] and "turn" not in labelled else "",
            **edges,
        )
        labelled |= {"turn"} if own[place] else set()
        axes.plot(
            [place - 0.4, place + 0.4],
            [exchange.seconds] * 2,
            color=INK,
            linewidth=2.4,
            label="the exchange" if place == next(iter(closed)) else "",
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    _finish(run, axes, "seconds", places)


def _own_seconds(run: RunData, exchange: Exchange) -> list[float]:
    return [float(e.get("turn_seconds") or e["seconds"]) for e in turns(run, exchange.number)]


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
    legend_below(axes)


def _row(run: RunData) -> str:
    sums = [(_name(run, e), sum(e.down.values()), sum(e.up.values())) for e in run.all_orders]
    return "; ".join(f"{n}: {human_bytes(d)} down, {human_bytes(u)} up" for n, d, u in sums)


def _seconds_row(run: RunData) -> str:
    closed = [e for e in run.all_orders if e.seconds is not None]
    return "; ".join(f"{_name(run, e)}: {e.seconds:.1f}" for e in closed)


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
