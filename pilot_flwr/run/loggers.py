"""Live logs of a run: its events as numbers over exchanges, in TensorBoard and Weights & Biases.

Both get the same numbers, made by `Numbers`; an exchange is a step. To add a number, add it there;
to add a place to log to, write a class with `log`, `repeat` and `close` and name it in `_open`. A
log that fails is told about and left alone from then on: it never stops a run.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pilot_flwr.config.loading import to_dict, to_yaml
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError
from pilot_flwr.metrics.score import mean_of_all
from pilot_flwr.run.directory import Event, RunFolder

logger = logging.getLogger("flwr")

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in the run folder."""


class MetricLogger(Protocol):
    """Where numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of an exchange."""

    def repeat(self, step: int) -> None:
        """Forget what was logged of an exchange and those behind it: it is done again."""

    def close(self) -> None:
        """Write out what is left."""


class Numbers:
    """Turns a run's events into numbers, one event after the other.

    Names are ``what/whose``: ``score/<client>``, ``loss/<client>``, ``loss_<part>/<client>``,
    ``seconds/<client>``, ``epsilon/<client>``; ``task_score/<task>``, and ``task_score/mean`` of
    the exchanges in which every task of the run has a score; and of the whole exchange
    ``exchange/seconds``, ``/bytes_down``, ``/bytes_up`` and ``/failures``. What the closing
    evaluation takes is ``closing_evaluation/seconds`` and ``/bytes_down``, one exchange on.
    """

    def __init__(self) -> None:
        self._scores: dict[int, dict[str, dict[str, tuple[float, int]]]] = {}
        self._sums: dict[str, float] = {}
        self._tasks: set[str] = set()

    def of(self, event: Event) -> tuple[int, dict[str, float]] | None:
        """Return the exchange and the numbers of an event, None if it has none."""
        kind = event["event"]
        if kind == "roster":
            self._tasks |= {client["task"] for client in event["clients"]}
        elif kind == "evaluate":
            self._tasks.add(event["task"])
            by_task = self._scores.setdefault(event["round"], {}).setdefault(event["task"], {})
            by_task[event["client"]] = (event["score"], event["examples"])
            return event["round"], {f"score/{event['client']}": event["score"]}
        if kind == "train":
            self._add("bytes_up", sum(event["up"].values()))
            return event["round"], _training(event)
        if kind == "order":
            self._add("bytes_down", sum(event["down"].values()))
        elif kind == "failure":
            self._add("failures", 1)
            self._add("bytes_up", sum((event.get("up") or {}).values()))
        elif kind == "repeat":
            self._sums = {}
        elif kind == "round":
            values = {"failures": 0.0} | self._sums | {"seconds": event["seconds"]}
            self._sums = {}
            return event["round"], {f"exchange/{name}": value for name, value in values.items()}
        elif kind == "closing_evaluation":
            values = {"bytes_down": self._sums.get("bytes_down", 0.0), "seconds": event["seconds"]}
            self._sums = {}
            found = {f"closing_evaluation/{name}": value for name, value in values.items()}
            return event["round"] + 1, found
        return None

    def of_tasks(self, event: Event) -> tuple[int, dict[str, float]] | None:
        """Return the tasks' scores, when an event says that all clients have been asked."""
        last = {"round": -1, "closing_evaluation": 0}.get(event["event"])
        if last is None or not (there := self._scores.get(event["round"] + last)):
            return None
        means = {}
        for task, clients in there.items():
            examples = sum(count for _, count in clients.values())
            means[task] = sum(score * count for score, count in clients.values()) / examples
        values = {f"task_score/{task}": mean for task, mean in means.items()}
        mean = mean_of_all(means, self._tasks)
        return event["round"] + last, values | ({} if mean is None else {"task_score/mean": mean})

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value


@contextmanager
def live_logs(
    config: PilotConfig, folder: RunFolder, *, name: str, after: int | None
) -> Iterator[Callable[[Event], None]]:
    """Open the logs that the configuration asks for; yield what takes the run's events.

    Parameters
    ----------
    config : PilotConfig
        The run's.
    folder : RunFolder
        TensorBoard's files and Weights & Biases' own go there.
    name : str
        The run's name, the same when it is resumed.
    after : int, optional
        The exchange after which the run goes on, None if it begins.

    Raises
    ------
    ConfigError
        `run.wandb` is on, but Weights & Biases is not installed.
    """
    places = _open(config, folder.path, name, after)
    numbers = Numbers()
    for event in folder.select("roster"):  # of a resumed run: which tasks it has
        numbers.of(event)

    def take(event: Event) -> None:
        if event["event"] == "repeat":
            _each(places, lambda place: place.repeat(event["round"]))
        for found in (numbers.of(event), numbers.of_tasks(event)):
            if found:
                step, values = found
                _each(places, lambda place, s=step, v=values: place.log(s, v))  # type: ignore[misc]

    try:
        yield take
    finally:
        _each(places, lambda place: place.close())


def _open(config: PilotConfig, folder: Path, name: str, after: int | None) -> list[MetricLogger]:
    wanted: list[Callable[[], MetricLogger]] = []
    if config.run.tensorboard:
        wanted.append(lambda: TensorBoard(folder / TENSORBOARD, config, after))
    if config.run.wandb != "off":
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"`run.wandb` is {config.run.wandb!r}, which needs Weights & Biases: "
                "pip install 'pilot-flwr[wandb]'."
            ) from None
        wanted.append(lambda: WeightsAndBiases(folder, config, name))
    places = []
    for opened in wanted:
        try:
            places.append(opened())
        except Exception as error:
            logger.warning("A live log cannot be opened: %s: %s", type(error).__name__, error)
    return places


def _each(places: list[MetricLogger], do: Callable[[MetricLogger], None]) -> None:
    """Do something in every place; one that fails is left out from then on."""
    for place in list(places):
        try:
            do(place)
        except Exception as error:
            places.remove(place)
            kind = type(place).__name__
            logger.warning("%s fails and gets no more: %s: %s", kind, type(error).__name__, error)


class TensorBoard:
    """TensorBoard's event files.

    Parameters
    ----------
    folder : Path
        Gets them.
    config : PilotConfig
        Shown under Text.
    after : int, optional
        As in `live_logs`; what earlier files say of later exchanges is not shown any more.
    """

    def __init__(self, folder: Path, config: PilotConfig, after: int | None) -> None:
        self._folder = folder
        self._writer = self._open(None if after is None else after + 1)
        lines = to_yaml(config).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of an exchange."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def repeat(self, step: int) -> None:
        """Go on in a new file that takes back this exchange."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        return SummaryWriter(str(self._folder), purge_step=purge_step)


class WeightsAndBiases:
    """A run of Weights & Biases; its account and server come from the user's environment.

    Parameters
    ----------
    folder : Path
        Its own files go to ``wandb/`` there.
    config : PilotConfig
        Every setting is sent; `run.wandb` and `run.wandb_project` say how and where to.
    name : str
        Tells the run from all others, so that it goes on there when it is resumed.
    """

    def __init__(self, folder: Path, config: PilotConfig, name: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.run.wandb_project,
            name=f"{config.name}-{config.strategy.name}-{config.seed}",
            id=name,
            resume="allow" if config.run.wandb == "online" else None,
            dir=str(folder),
            mode="online" if config.run.wandb == "online" else "offline",
            config=to_dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        self._run.define_metric("exchange")
        self._run.define_metric("*", step_metric="exchange")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of an exchange."""
        self._run.log({"exchange": step, **values})

    def repeat(self, step: int) -> None:
        """Nothing can be taken back; the repeated exchange is logged behind it."""

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _training(event: Event) -> dict[str, float]:
    client = event["client"]
    names: Sequence[str] = [key for key in event if key.startswith("loss")]
    values = {
        f"{key}/{client}": event[key]
        for key in (*names, "seconds", "epsilon")
        if event.get(key) is not None
    }
    return values
