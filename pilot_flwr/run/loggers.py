"""Log a run's numbers over its exchanges to TensorBoard and Weights & Biases.

Both get the same numbers from `Numbers`; an exchange is a step. To add a number, add it there; to
add a logger, write a `MetricLogger` and open it in `_open`. A failing logger is reported once,
then disabled; it never stops a run.
"""

import logging
from collections import Counter
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
)
from pilot_flwr.run.history import MEAN, score_curves

logger = logging.getLogger("flwr")

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in the run folder."""


class MetricLogger(Protocol):
    """A destination for numbers, by exchange."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of an exchange."""

    def repeat(self, step: int) -> None:
        """Discard what was logged from this exchange on, because it is repeated."""

    def close(self) -> None:
        """Write what is still buffered."""


class Numbers:
    """Turn a run's events into named numbers, one event after another.

    A name is a quantity, a slash and its client or task: ``score/<client>``, ``loss/<client>``,
    ``loss_<part>/<client>``, ``seconds/<client>``, ``epsilon/<client>``;
    ``task_score/<task>`` and, if every task of the run has a score, ``task_score/mean``; for an
    exchange as a whole ``exchange/seconds``, ``/bytes_down``, ``/bytes_up`` and ``/failures``. The
    closing evaluation has ``closing_evaluation/seconds`` and ``/bytes_down``, one exchange later.
    """

    def __init__(self) -> None:
        self._rosters: list[Event] = []
        self._scored: dict[tuple[int, str], Evaluated] = {}
        self._sums = Counter[str]()

    def of(self, event: Event) -> tuple[int, dict[str, float]] | None:
        """Return the exchange and the numbers of an event, None if it has none."""
        match event:
            case RosterCalled():
                self._rosters.append(event)
            case Evaluated():  # of a repeated exchange, the last one counts
                self._scored[event.exchange, event.client] = event
                return event.exchange, {f"score/{event.client}": event.score}
            case Trained():
                self._sums["bytes_up"] += sum(event.up.values())
                values = {loss_key(name): loss for name, loss in event.losses.items()}
                values |= {"seconds": event.seconds, "epsilon": event.epsilon}
                known = {key: value for key, value in values.items() if value is not None}
                return event.exchange, {f"{key}/{event.client}": v for key, v in known.items()}
            case InstructionSent():
                self._sums["bytes_down"] += sum(event.down.values())
            case ClientFailed():
                self._sums["failures"] += 1
                self._sums["bytes_up"] += sum((event.up or {}).values())
            case ExchangeRepeated():
                self._sums.clear()
            case ExchangeClosed():
                sums = {"failures": 0, **self._sums}
                self._sums.clear()
                whole = {f"exchange/{name}": float(value) for name, value in sums.items()}
                return event.exchange, whole | {"exchange/seconds": event.seconds}
            case EvaluationClosed():
                down = float(self._sums["bytes_down"])
                self._sums.clear()
                return event.exchange + 1, {
                    "closing_evaluation/bytes_down": down,
                    "closing_evaluation/seconds": event.seconds,
                }
        return None

    def of_tasks(self, event: Event) -> tuple[int, dict[str, float]] | None:
        """Return the tasks' scores when an event closes their evaluation."""
        if not isinstance(event, ExchangeClosed | EvaluationClosed):
            return None
        number = event.exchange - isinstance(event, ExchangeClosed)
        curves = score_curves([*self._rosters, *self._scored.values()])
        names = {name: "mean" if name == MEAN else name for name in curves}
        values = {f"task_score/{names[n]}": c[number] for n, c in curves.items() if number in c}
        return (number, values) if values else None


@contextmanager
def live_logs(
    config: PilotConfig, folder: RunFolder, *, name: str, after: int | None
) -> Iterator[Callable[[Event], None]]:
    """Open the configured loggers; yield a function that logs an event.

    `name` is the run's, unchanged when it is resumed; `after` is the exchange after which it
    resumes, None if it is new.
    """
    loggers = _open(config, folder.path, name, after)
    numbers = Numbers()
    for event in folder.select(RosterCalled):  # the tasks of a resumed run
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

    TensorBoard no longer shows what earlier files have of exchanges beyond `after`.
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
    """A run of Weights & Biases, resumed by `name`; its files are in ``wandb/`` of `folder`.

    All settings are sent. Account and server come from the user's environment.
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
        """Do nothing: sent numbers cannot be discarded, so the exchange is logged twice."""

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()
