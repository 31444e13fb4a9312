"""Read a run's folder for the figures: observations in order, and the method in words.

Observations come from the events and files that the run wrote; a run that is in progress or failed
gives what there is so far. What the method does with LoRAs follows from the settings alone; to word
a new rule of aggregation, add it to `_LORA_USE` and `_MIXED`, and to `aggregation_lines`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.schema import PilotConfig, StrategyConfig
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.metrics import METRICS
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import (
    Aggregated,
    AggregationMethod,
    ClientFailed,
    Evaluated,
    EvaluationClosed,
    Event,
    ExchangeClosed,
    InstructionSent,
    RosterCalled,
    Trained,
    aggregation_lines,
    bytes_down,
    bytes_up,
    mean_over_tasks,
    select,
    task_scores,
)
from pilot_flwr.run.provenance import read_provenance

Matrix = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Exchange:
    """One exchange, as it was observed.

    `seconds` is None while it is not closed; `stages` has the clients that trained each stage, and
    `trained` the groups of parameters that had gradients there, with the fewest and most on one
    client; `down` and `up` have the bytes by part of the model, summed over the clients.
    """

    number: int
    seconds: float | None
    stages: dict[int, list[str]]
    trained: dict[int, dict[str, tuple[int, int]]]
    down: dict[str, int]
    up: dict[str, int]
    aggregated: Aggregated | None
    failures: int

    @property
    def distances(self) -> Matrix:
        """Client → client → distance of their LoRAs, empty if there was no aggregation."""
        return self.aggregated.distances if self.aggregated else {}

    @property
    def weights(self) -> Matrix:
        """Client → client → share in its LoRA, empty if there was no aggregation."""
        return self.aggregated.neighbors if self.aggregated else {}


@dataclass(frozen=True)
class RunData:
    """A run's folder, read; `result` and `code` are empty where it has none.

    `closing` is the evaluation behind the last exchange: it trains nothing, but models are sent
    for it. `task_of` lists clients in the federation's order.
    """

    folder: Path
    config: PilotConfig
    config_text: str
    overrides: str
    events: list[Event]
    exchanges: list[Exchange]
    closing: Exchange | None
    task_of: dict[str, str]
    result: dict[str, Any]
    code: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        """The tasks that have clients, in the federation's order."""
        present = set(self.task_of.values())
        return [task for task in self.config.data.tasks if task in present]

    @property
    def all_orders(self) -> list[Exchange]:
        """The exchanges and the closing evaluation: all that bytes were sent for."""
        return [*self.exchanges, *([self.closing] if self.closing else [])]

    def clients(self, task: str) -> list[str]:
        """Return a task's clients."""
        return [client for client, its in self.task_of.items() if its == task]

    def scores(self, client: str) -> dict[int, float]:
        """Return a client's score after each exchange, 0 being before any training."""
        evaluated = select(self.events, Evaluated)
        return {event.exchange: event.score for event in evaluated if event.client == client}

    def task_scores(self, task: str) -> dict[int, float]:
        """Return a task's score after each exchange: every test example counts the same."""
        by_number = ((n, task_scores(self.events, n)) for n in _evaluated(self.events))
        return {number: scores[task] for number, scores in by_number if task in scores}

    def mean_scores(self) -> dict[int, float]:
        """Return the mean over tasks after each exchange at which every task has a score."""
        means = {
            number: mean_over_tasks(task_scores(self.events, number), self.tasks)
            for number in _evaluated(self.events)
        }
        return {number: mean for number, mean in means.items() if mean is not None}

    def metric(self, task: str) -> str:
        """Return the name of the metric that a task was scored by, empty if it was not."""
        return next((e.metric for e in select(self.events, Evaluated) if e.task == task), "")

    def server_lines(self, exchange: Exchange) -> list[str]:
        """Say what the server did in an exchange, in few characters."""
        method = AggregationMethod.of(self.config.strategy)
        return aggregation_lines(exchange.aggregated, method, width=10)

    def highest_score(self, task: str) -> float:
        """Return the largest value that the task's metric can have; infinite if unknown."""
        metric = METRICS.get(self.metric(task))
        return metric.maximum if metric else float("inf")


def read_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises
    ------
    RunError
        It is not a run folder.
    ConfigError
        Its configuration is none.
    StateError
        Its events cannot be read.
    """
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise RunError(f"{folder} is not a run folder: it has no readable config.yaml.") from None
    try:
        config = from_yaml(text)
    except ConfigError as error:
        path = folder / "config.yaml"
        raise ConfigError(f"{path} is not a run's configuration: {error}") from None
    events = read_events(folder)
    return RunData(
        folder=folder,
        config=config,
        config_text=text,
        overrides=_text(folder / "overrides.txt"),
        events=events,
        exchanges=[_exchange(events, number) for number in _numbers(events, config)],
        closing=_closing(events, config),
        task_of=_task_of(config, events),
        result=_json(folder / "result.json"),
        code=read_provenance(folder),
    )


def _evaluated(events: Sequence[Event]) -> list[int]:
    return sorted({event.exchange for event in select(events, Evaluated)})


def _numbers(events: Sequence[Event], config: PilotConfig) -> list[int]:
    kinds = (InstructionSent, Trained, ExchangeClosed)
    seen = {event.exchange for event in events if isinstance(event, kinds)}
    return sorted(number for number in seen if number <= config.strategy.rounds + 1)


def _closing(events: Sequence[Event], config: PilotConfig) -> Exchange | None:
    """Return the closing evaluation, whose instructions count as of one exchange more."""
    number = config.strategy.rounds + 2
    if not select(events, InstructionSent, number):
        return None
    ended = select(events, EvaluationClosed, number - 1)
    return replace(_exchange(events, number), seconds=ended[-1].seconds if ended else None)


def _exchange(events: Sequence[Event], number: int) -> Exchange:
    closed = select(events, ExchangeClosed, number)
    trained = select(events, Trained, number)
    aggregated = select(events, Aggregated, number)
    by_stage: dict[int, list[Trained]] = {}
    for event in sorted(trained, key=lambda event: event.stage):
        by_stage.setdefault(event.stage, []).append(event)
    return Exchange(
        number=number,
        seconds=closed[-1].seconds if closed else None,
        stages={stage: [e.client for e in its] for stage, its in by_stage.items()},
        trained={stage: _gradients(its) for stage, its in by_stage.items()},
        down=bytes_down(events, number),
        up=bytes_up(events, number),
        aggregated=aggregated[-1] if aggregated else None,
        failures=len(select(events, ClientFailed, number)),
    )


def _gradients(trained: Sequence[Trained]) -> dict[str, tuple[int, int]]:
    """Return the groups of which a client had gradients, with the fewest and most parameters."""
    counts: dict[str, list[int]] = {}
    for event in trained:
        for group, number in event.gradients.items():
            counts.setdefault(group, []).append(number)
    return {group: (min(n), max(n)) for group, n in counts.items() if max(n) > 0}


def _task_of(config: PilotConfig, events: Sequence[Event]) -> dict[str, str]:
    """Return the task of every client that was seen, task by task."""
    rosters = select(events, RosterCalled)
    seen = {entry.client: entry.task for event in rosters for entry in event.clients}
    tasks = list(config.data.tasks)
    order = sorted(seen, key=lambda name: (tasks.index(seen[name]), _natural(name)))
    return {client: seen[client] for client in order}


def _natural(name: str) -> tuple[str, int]:
    """Sort ``vqa-10`` behind ``vqa-9``."""
    front, _, number = name.rpartition("-")
    return (front, int(number)) if number.isdecimal() else (name, -1)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


SYMBOLS = {
    "lora": "Θ_l is the LoRA",
    "own_task_adapter": "ψ_t a task adapter",
    "client_adapter": "ψ_s the client adapter",
    "cross_task_adapters": "ψ_c the cross-task adapters",
    "router": "φ the router",
    "residual": (
        "R what averaging the factors A and B leaves out of the average of their products B A, "
        "which the server sends and clients add to the frozen base (FedEx-LoRA)"
    ),
}
"""What the symbols stand for, by groups of parameters and parts of messages."""

_LORA_USE = {
    "task": "the server takes the mean over a task's clients, weighted by their examples.",
    "global": "the server takes the mean over all clients, weighted by their examples.",
    "exact": "the server takes the mean over all clients, weighted by their examples.",
}

_MIXED = {
    "adaptive": "",
    "task": " All clients of a task get the same, and a share is that of the training examples.",
    "global": " All clients get the same, and a share is that of the training examples.",
    "exact": (
        " All clients get the same, and a share is that of the training examples. It is the share "
        "of the factors A and B; what their means leave out of the mean of the products B A is "
        "sent beside them, as R."
    ),
}


def symbols(names: Sequence[str]) -> str:
    """Say what the symbols of groups of parameters and of parts of messages stand for."""
    return ", ".join(words for name, words in SYMBOLS.items() if name in names) + "."


def sharing_of(config: PilotConfig) -> Sharing:
    """Return what of a client's parameters is trained and sent."""
    return Sharing.of(config.strategy.sharing, config.train.lora_matrices)


def partly_sent(config: PilotConfig) -> str:
    """Return the matrix of the LoRA that is sent, if clients train another one as well."""
    sharing = sharing_of(config)
    sent = [matrix for matrix in sharing.trained_lora if matrix in sharing.lora]
    return "".join(sent) if len(sent) < len(sharing.trained_lora) else ""


def nothing_to_compare(config: PilotConfig) -> str:
    """Say why there are no LoRAs of several clients."""
    strategy = config.strategy
    if strategy.trained_by == "pooled":
        return (
            "One client trains on the data of all (`strategy.trained_by` is 'pooled'), so there "
            "are no LoRAs of several clients."
        )
    if strategy.trained_by == "nobody":
        return "Nothing is trained (`strategy.trained_by` is 'nobody'), so no LoRA is sent."
    if strategy.sharing.lora == "none":
        return "The clients send no LoRA (`strategy.sharing.lora` is 'none')."
    return "In no exchange were there LoRAs of several clients."


def distance_words(config: PilotConfig) -> str:
    """Say what of the LoRAs is compared, and what the server does with the distances."""
    strategy = config.strategy
    what = f"the matrices {_sent(config)} of " * bool(_sent(config))
    words = (
        f"Euclidean distance ‖Θ_l,k − Θ_l,j‖₂ between {what}the LoRAs that the clients sent, "
        "before the server aggregated them: the darker, the closer. All panels have the same "
        "colours for the same distance. "
    )
    if strategy.lora == "adaptive":
        words += (
            f"The server mixes for each client the LoRAs of {_neighbours(strategy)}, each weighted "
            "by its number of examples, and a neighbour by the inverse of this distance as well."
        )
    else:
        words += f"This method does not use them: {_LORA_USE[strategy.lora]}"
    return words + _personal(config)


def mixing_words(config: PilotConfig) -> str:
    """Say what a row of the mixing weights is."""
    strategy, sent = config.strategy, _sent(config)
    adam = strategy.server_optimizer.name == "adam"
    words = "A row is the LoRA that the server sends to a client in the next exchange, and says of "
    if adam:
        words = "A row is what the server makes of the LoRAs for a client, and says of "
    words += (
        "whose LoRAs it is made: the shares of a row sum to 1. White is no share at all, and the "
        "darker, the more."
    )
    words += _MIXED[strategy.lora]
    if adam:
        words += (
            " It is not sent itself: the server's own LoRA makes a step of Adam towards it "
            "(FedAdam), and that is sent."
        )
    if sent:
        other = "B" if sent == "A" else "A"
        trained = other in sharing_of(config).trained_lora
        fate = "stays with its client" if trained else "stays as drawn"
        words += f" Only the matrices {sent} are sent and mixed: {other} {fate}."
    return words + _personal(config)


def _neighbours(strategy: StrategyConfig) -> str:
    own = "the client itself and " if strategy.self_weight else ""
    return f"{own}its nearest clients (at most {strategy.num_neighbors:,})"


def _sent(config: PilotConfig) -> str:
    """Return the one matrix of the LoRA that is sent, empty if both are."""
    sent = sharing_of(config).lora
    return sent if len(sent) == 1 else ""


def _personal(config: PilotConfig) -> str:
    if not config.train.ditto.enabled:
        return ""
    return (
        " All this is of the shared model: a client is scored by its personal model v, which is "
        "drawn to the shared one and never sent (Ditto)."
    )
