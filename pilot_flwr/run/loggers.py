"""Log a run's numbers over its exchanges to TensorBoard and Weights & Biases.

Both get the same numbers, made by `Numbers`; an exchange is a step. To add a number, add it there;
to add a logger, write a `MetricLogger` and name it in `_open`. A failing logger is reported once,
then disabled; it never stops a run.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pilot_flwr.config.loading import to_dict, to_yaml
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import (
    ClientFailed,
    Evaluated,
    EvaluationClosed,
    Event,
    ExchangeClosed,
    ExchangeRepeated,
    InstructionSent,
    RosterCalled,
    Trained,
    loss_key,
    mean_over_tasks,
    task_scores,
    tasks_of,
)

logger = logging.getLogger("flwr")

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in the run folder."""


class MetricLogger(Protocol):
    """Takes numbers, by exchange."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of an exchange."""

    def repeat(self, step: int) -> None:
        """Discard what was logged of an exchange and those behind it, because it is repeated."""

    def close(self) -> None:
        """Write out the rest."""


class Numbers:
    """Turns a run's events into numbers, one event after the other.

    Names are ``what/whose``: ``score/<client>``, ``loss/<client>``, ``loss_<part>/<client>``,
    ``seconds/<client>``, ``epsilon/<client>``; ``task_score/<task>``, and ``task_score/mean`` of
    the exchanges in which every task of the run has a score; and of the whole exchange
    ``exchange/seconds``, ``/bytes_down``, ``/bytes_up`` and ``/failures``. The closing evaluation
    has ``closing_evaluation/seconds`` and ``/bytes_down``, one exchange later.
    """

    def __init__(self) -> None:
        self._rosters: list[Event] = []
        self._scored: dict[tuple[int, str], Evaluated] = {}
        self._sums: dict[str, float] = {}

    def of(self, event: Event) -> tuple[int, dict[str, float]] | None:
        """Return the exchange and the numbers of an event, None if it has none."""
        match event:
            case RosterCalled():
                self._rosters.append(event)
            case Evaluated():  # of a repeated exchange, the last one counts
                self._scored[event.exchange, event.client] = event
                return event.exchange, {f"score/{event.client}": event.score}
            case Trained():
                self._add("bytes_up", sum(event.up.values()))
                return event.exchange, _training(event)
            case InstructionSent():
                self._add("bytes_down", sum(event.down.values()))
            case ClientFailed():
                self._add("failures", 1)
                self._add("bytes_up", sum((event.up or {}).values()))
            case ExchangeRepeated():
                self._sums = {}
            case ExchangeClosed():
                values = {"failures": 0.0} | self._sums | {"seconds": event.seconds}
                self._sums = {}
                return event.exchange, {f"exchange/{name}": v for name, v in values.items()}
            case EvaluationClosed():
                down, self._sums = self._sums.get("bytes_down", 0.0), {}
                return event.exchange + 1, {
                    "closing_evaluation/bytes_down": down,
                    "closing_evaluation/seconds": event.seconds,
                }
        return None

    def of_tasks(self, event: Event) -> tuple[int, dict[str, float]] | None:
        """Return the tasks' scores once an event says that all clients have been asked."""
        if not isinstance(event, ExchangeClosed | EvaluationClosed):
            return None
        number = event.exchange - isinstance(event, ExchangeClosed)
        scored = self._scored.values()
        scores = task_scores(scored, number)
        mean = mean_over_tasks(scores, tasks_of([*self._rosters, *scored]))
        values = {f"task_score/{task}": score for task, score in scores.items()}
        values |= {} if mean is None else {"task_score/mean": mean}
        return (number, values) if values else None

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value


@contextmanager
def live_logs(
    config: PilotConfig, folder: RunFolder, *, name: str, after: int | None
) -> Iterator[Callable[[Event], None]]:
    """Open the loggers that the configuration asks for; yield what takes the run's events.

    `name` is the run's, the same when it is resumed; `after` is the exchange after which it
    resumes, None if it is new.
    """
    loggers = _open(config, folder.path, name, after)
    numbers = Numbers()
    for event in folder.select(RosterCalled):  # of a resumed run: which tasks it has
        numbers.of(event)

    def take(event: Event) -> None:
        if isinstance(event, ExchangeRepeated):
            _each(loggers, lambda log: log.repeat(event.exchange))
        for found in (numbers.of(event), numbers.of_tasks(event)):
            if found:
                step, values = found
                _each(loggers, lambda log, s=step, v=values: log.log(s, v))  # type: ignore[misc]

    try:
        yield take
    finally:
        _each(loggers, lambda log: log.close())


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
    opened = []
    for open_logger in wanted:
        try:
            opened.append(open_logger())
        except Exception as error:
            logger.warning("A logger cannot be opened: %s: %s", type(error).__name__, error)
    return opened


def _each(loggers: list[MetricLogger], do: Callable[[MetricLogger], None]) -> None:
    """Call every logger; one that fails is reported once, then disabled."""
    for log in list(loggers):
        try:
            do(log)
        except Exception as error:
            loggers.remove(log)
            kind = type(log).__name__
            logger.warning("%s failed and is disabled: %s: %s", kind, type(error).__name__, error)


class TensorBoard:
    """TensorBoard's event files; the configuration is shown under Text.

    What earlier files say of exchanges behind `after`, as in `live_logs`, is no longer shown.
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
        """Continue in a new file that purges this exchange."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        return SummaryWriter(str(self._folder), purge_step=purge_step)


class WeightsAndBiases:
    """A run of Weights & Biases, resumed by `name`; its files go to ``wandb/`` in `folder`.

    Every setting is sent. Account and server come from the user's environment.
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
        """Do nothing: what was sent cannot be discarded, so the exchange is logged twice."""

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


def _training(event: Trained) -> dict[str, float]:
    values = {loss_key(name): loss for name, loss in event.losses.items()}
    values |= {"seconds": event.seconds, "epsilon": event.epsilon}
    return {f"{key}/{event.client}": v for key, v in values.items() if v is not None}
