"""Bytes and seconds of every exchange."""

from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from pilot_flwr.report.drawing import (
    GREY,
    INK,
    Figure,
    Panel,
    Table,
    colour,
    exchange_axis,
    math_text,
)
from pilot_flwr.report.gather import RunData, symbol
from pilot_flwr.storage.run_folder import Event, select
from pilot_flwr.wording import human_bytes


def traffic(run: RunData) -> Figure:
    """Return a panel of the bytes and one of the seconds."""
    title = "Bytes and seconds per exchange"
    if not run.exchanges:
        return Figure("bytes-and-seconds", title, "No exchange has been completed.")
    down, up = (sum(sum(getattr(e, way).values()) for e in run.exchanges) for way in ("down", "up"))
    text = (
        "Bytes are those of the arrays in the messages of training, summed over the clients: "
        f"{human_bytes(down)} down and {human_bytes(up)} up in all. Seconds are wall time on the "
        "server; the bars behind are the clients' own turns, one thin bar each, which overlap as "
        "far as clients work at the same time. The first exchange includes the start of the "
        "clients' processes."
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


def _bytes(run: RunData, axes: Axes) -> None:
    names = dict.fromkeys(n for e in run.exchanges for way in (e.down, e.up) for n in way)
    numbers = [exchange.number for exchange in run.exchanges]
    for shift, way in ((-0.2, "down"), (0.2, "up")):
        floor = [0.0] * len(numbers)
        for index, name in enumerate(names):
            heights = [getattr(exchange, way).get(name, 0) for exchange in run.exchanges]
            axes.bar(
                [number + shift for number in numbers],
                heights,
                width=0.36,
                bottom=floor,
                color=colour(index),
                alpha=1.0 if way == "down" else 0.6,
                edgecolor="white",
                label=f"{math_text(symbol(name))} {way}",
            )
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    _finish(axes, "bytes", numbers)


def _seconds(run: RunData, axes: Axes) -> None:
    closed = [e for e in run.exchanges if e.seconds is not None]
    numbers = [exchange.number for exchange in closed]
    for index, exchange in enumerate(closed):
        assert exchange.seconds is not None
        own = [float(e.get("turn_seconds") or e["seconds"]) for e in turns(run, exchange.number)]
        width = 0.72 / max(1, len(own))
        axes.bar(
            [exchange.number - 0.36 + width * (place + 0.5) for place in range(len(own))],
            own,
            width=width,
            color=colour(5),
            edgecolor="white",
            linewidth=0.4,
            label="a client's turn" if index == 0 else "",
        )
        axes.plot(
            [exchange.number - 0.4, exchange.number + 0.4],
            [exchange.seconds] * 2,
            color=INK,
            linewidth=2.4,
            label="the exchange" if index == 0 else "",
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    _finish(axes, "seconds", numbers or [e.number for e in run.exchanges])


def _finish(axes: Axes, title: str, numbers: list[int]) -> None:
    axes.set_title(title)
    exchange_axis(axes, numbers, "exchange")
    axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", color=GREY)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, columnspacing=1.2, handlelength=1.4
    )


def _row(run: RunData) -> str:
    sums = [(e.number, sum(e.down.values()), sum(e.up.values())) for e in run.exchanges]
    return "; ".join(f"{n}: {human_bytes(d)} down, {human_bytes(u)} up" for n, d, u in sums)


def _seconds_row(run: RunData) -> str:
    return "; ".join(f"{e.number}: {e.seconds:.1f}" for e in run.exchanges if e.seconds is not None)


def _table(run: RunData) -> Table:
    names = list(dict.fromkeys(n for e in run.exchanges for way in (e.down, e.up) for n in way))
    header = ["exchange", "seconds"]
    header += [f"{symbol(name)} {way}" for way in ("down", "up") for name in names]
    rows = [header]
    for exchange in run.exchanges:
        sizes = [way.get(name, 0) for way in (exchange.down, exchange.up) for name in names]
        seconds = "–" if exchange.seconds is None else f"{exchange.seconds:.1f}"
        rows.append([str(exchange.number), seconds, *(f"{size:,}" for size in sizes)])
    return Table("Bytes and seconds of every exchange", rows)
