"""What a run's folder says, put in order for the figures: no drawing, no model.

Everything comes from the events and files that the run itself wrote; a run that is still going on
or that failed gives what there is so far.

What a run's method does with what clients send, in words: from its settings alone.

To word a new rule of aggregation, add it to `_LORA_USE` and `_MIXED`, and to `server_lines`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilot_flwr.algorithm.parameter_groups import GROUPS, Sharing
from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.schema import PilotConfig, StrategyConfig
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.formatting import count
from pilot_flwr.metrics.registry import METRICS
from pilot_flwr.metrics.score import mean_of_all
from pilot_flwr.run.directory import Event, read_events, select
from pilot_flwr.run.provenance import read_provenance

SENT = {"lora": "Θ_l", "task_adapters": "ψ_t", "residual": "R"}
"""Symbols of what travels, by the events' names; others are shown as they are called."""

Matrix = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Exchange:
    """One exchange, as it was observed.

    Attributes
    ----------
    number : int
        From 1.
    seconds : float or None
        Wall time on the server; None while it is not closed.
    stages : dict
        Stage → ids of the clients that trained it.
    trained : dict
        Stage → group of parameters → (least, most) parameters with a gradient on a client.
    down, up : dict
        Part of the model → bytes, summed over the clients.
    distances, weights : dict
        Client → client → value, as the server's aggregation told; empty if it has none.
    tasks : dict
        Task → clients whose adapters were averaged.
    failures : int
        Parts of clients that are missing.
    """

    number: int
    seconds: float | None
    stages: dict[int, list[str]]
    trained: dict[int, dict[str, tuple[int, int]]]
    down: dict[str, int]
    up: dict[str, int]
    distances: Matrix
    weights: Matrix
    tasks: dict[str, list[str]]
    failures: int


@dataclass(frozen=True)
class RunData:
    """A run's folder, read.

    Attributes
    ----------
    folder : Path
        The run folder.
    config : PilotConfig
        Its configuration.
    config_text, overrides : str
        As written down.
    events : list of dict
        What happened.
    exchanges : list of Exchange
        In order.
    closing : Exchange or None
        The evaluation behind the last exchange: it trains nothing, but models are sent down for it.
    task_of : dict
        Client → task, in the federation's order.
    result : dict
        ``result.json``; empty while the run has none.
    code : dict
        ``code.json``; empty if there is none.
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
        mine = [e for e in select(self.events, "evaluate") if e["client"] == client]
        return {event["round"]: event["score"] for event in mine}

    def task_scores(self, task: str) -> dict[int, float]:
        """Return a task's score after each exchange: every test example counts the same."""
        mine = [e for e in select(self.events, "evaluate") if e["task"] == task]
        means = {}
        for number in sorted({event["round"] for event in mine}):
            there = [event for event in mine if event["round"] == number]
            examples = sum(event["examples"] for event in there)
            means[number] = sum(e["score"] * e["examples"] for e in there) / examples
        return means

    def mean_scores(self) -> dict[int, float]:
        """Return the mean over tasks after each exchange at which every task has a score."""
        by_task = {task: self.task_scores(task) for task in self.tasks}
        numbers = sorted({number for scores in by_task.values() for number in scores})
        means = {
            n: mean_of_all({t: s[n] for t, s in by_task.items() if n in s}, self.tasks)
            for n in numbers
        }
        return {n: mean for n, mean in means.items() if mean is not None}

    def metric(self, task: str) -> str:
        """Return the name of the metric that a task was scored by, empty if it was not."""
        return next(
            (str(e["metric"]) for e in select(self.events, "evaluate") if e["task"] == task), ""
        )

    def highest_score(self, task: str) -> float:
        """Return the largest value that the task's metric can have; infinite if unknown."""
        metric = METRICS.get(self.metric(task))
        return metric.maximum if metric else float("inf")


def read_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises
    ------
    RunError
        It is no run folder.
    ConfigError
        Its configuration is none.
    StateError
        Its events cannot be read.
    """
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise RunError(f"{folder} is no run folder: it has no readable config.yaml.") from None
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


def symbol(group: str) -> str:
    """Return the symbol of a group of parameters, or of a part that travels."""
    if group in SENT:
        return SENT[group]
    return next((row.symbol for name, row in GROUPS.items() if name == group), group)


def _numbers(events: Sequence[Event], config: PilotConfig) -> list[int]:
    seen = {e["round"] for kind in ("order", "train", "round") for e in select(events, kind)}
    return sorted(number for number in seen if number <= config.strategy.rounds + 1)


def _closing(events: Sequence[Event], config: PilotConfig) -> Exchange | None:
    """Return the closing evaluation, whose orders count as of one exchange more."""
    number = config.strategy.rounds + 2
    if not select(events, "order", number):
        return None
    ended = select(events, "closing_evaluation", number - 1)
    return replace(_exchange(events, number), seconds=ended[-1]["seconds"] if ended else None)


def _exchange(events: Sequence[Event], number: int) -> Exchange:
    closed = select(events, "round", number)
    trained = select(events, "train", number)
    failures = select(events, "failure", number)
    orders = select(events, "order", number)  # also of clients that only evaluate
    aggregated = select(events, "aggregate", number)
    last = aggregated[-1] if aggregated else {}
    by_stage: dict[int, list[Event]] = {}
    for event in trained:
        by_stage.setdefault(event["stage"], []).append(event)
    return Exchange(
        number=number,
        seconds=closed[-1]["seconds"] if closed else None,
        stages={stage: [e["client"] for e in by_stage[stage]] for stage in sorted(by_stage)},
        trained={stage: _gradients(by_stage[stage]) for stage in sorted(by_stage)},
        down=_bytes(orders, "down"),
        up=_bytes([*trained, *failures], "up"),
        distances=last.get("distances") or {},
        weights=last.get("neighbors") or {},
        tasks=last.get("tasks") or {},
        failures=len(failures),
    )


def _gradients(trained: Sequence[Event]) -> dict[str, tuple[int, int]]:
    """Return the groups of which a client had gradients, with the least and most parameters."""
    counts: dict[str, list[int]] = {}
    for event in trained:
        for group, number in event["gradients"].items():
            counts.setdefault(group, []).append(number)
    return {group: (min(n), max(n)) for group, n in counts.items() if max(n) > 0}


def _bytes(events: Sequence[Event], way: str) -> dict[str, int]:
    sums: dict[str, int] = {}
    for event in events:
        for part, size in (event.get(way) or {}).items():
            sums[part] = sums.get(part, 0) + size
    return {part: size for part, size in sums.items() if size}


def _task_of(config: PilotConfig, events: Sequence[Event]) -> dict[str, str]:
    """Return the task of every client that was seen, task by task."""
    seen = {c["client"]: c["task"] for e in select(events, "roster") for c in e["clients"]}
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


def server_lines(strategy: StrategyConfig, exchange: Exchange) -> list[str]:
    """Say what the server did in an exchange, from what its aggregation told."""
    if not (exchange.tasks or exchange.weights):
        return ["no aggregation"]
    adam = strategy.server_optimizer.name == "adam"
    if strategy.trained_by == "pooled" and not adam:
        return ["takes what the one client trained"]
    verb = "steps by Adam:" if adam else "averages"
    lines = []
    if exchange.tasks:
        lines.append(f"{verb} ψ_t {_members(list(exchange.tasks.values()))}")
    if exchange.weights and strategy.lora == "adaptive":
        others = sorted({len({*shares} - {own}) for own, shares in exchange.weights.items()})
        mixes = "steps by Adam: mixes of" if adam else "mixes"
        with_others = "–".join(map(str, others))
        lines.append(f"{mixes} {len(exchange.weights)} Θ_l, each with {with_others} others")
    elif exchange.weights:
        matrices = {"A": "A of ", "B": "B of "}.get(strategy.sharing.lora, "")
        groups = {tuple(sorted(shares)) for shares in exchange.weights.values()}
        rest = ", the rest in R" if strategy.lora == "exact" else ""
        lines.append(f"{verb} {matrices}Θ_l {_members(sorted(groups))}{rest}")
    return lines


def _members(groups: Sequence[Sequence[str]]) -> str:
    if len(groups) == 1:
        return f"of {count(len(groups[0]), 'client')}"
    sizes = ", ".join(str(len(group)) for group in groups)
    most = 10  # characters, for which there is room in the time line
    return f"per task, of {sizes} clients" if len(sizes) <= most else f"in {len(groups)} tasks"


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
