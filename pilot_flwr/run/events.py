"""The events of a run: every kind declared once, one JSON line of ``metrics.jsonl`` each.

`RunFolder.record` writes them, `parse_event` reads a line, and everything that tables, reports and
live output say about a run follows from them: scores (`task_scores`, `mean_over_tasks`), failures
(`failure_line`) and what an aggregation did (`aggregation_lines`) are worded and computed here.

To record another kind of event, declare a dataclass with its `kind` and add it to `KINDS`. Keys
added later need a default, so that the runs of earlier versions stay readable.
"""

import contextlib
import functools
import json
import math
import types
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import StateError
from pilot_flwr.formatting import count, headline
from pilot_flwr.protocol import LOSSES

LOSS_PARTS = LOSSES[1:]
"""Parts of the total loss, by the names that clients report them under."""

PART_GROUPS = {"lora": "lora", "task_adapters": "own_task_adapter", "residual": "residual"}
"""Part of a message → the group of parameters that it carries."""

_KEYS = {"exchange": "round", "session_seconds": "turn_seconds"}
"""Attributes that have another name in the file."""

_LARGEST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events have in common.

    Attributes
    ----------
    elapsed : float
        Seconds since the run began, set by `RunFolder.record`.
    exchange : int
        From 1; of scores, the exchange that made the evaluated model, 0 before any training.
    """

    kind: ClassVar[str] = ""
    elapsed: float = 0.0
    exchange: int

    def to_dict(self) -> dict[str, Any]:
        """Return the event as the JSON object that the file has; None is left out."""
        values = {_KEYS.get(key, key): v for key, v in asdict(self).items() if v is not None}
        return {"event": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Event":
        """Build the event from its JSON object; unknown keys are ignored.

        Raises
        ------
        ValueError
            A key is missing or has a value of another type.
        """
        return cls(**_converted(cls, values))


@dataclass(frozen=True, kw_only=True)
class UnknownEvent(Event):
    """An event of a kind that this version does not know; it counts as a line, nothing more."""

    name: str


@dataclass(frozen=True)
class RosterEntry:
    """A client that takes part in an exchange.

    Attributes
    ----------
    client, task : str
        Its id and its one task.
    examples : int
        Training examples that it declared.
    stage : int
        Stage that it trains.
    """

    client: str
    task: str
    examples: int
    stage: int


@dataclass(frozen=True, kw_only=True)
class RosterCalled(Event):
    """Which clients take part in an exchange.

    Attributes
    ----------
    clients : tuple of RosterEntry
        In the order of the roster.
    """

    kind: ClassVar[str] = "roster"
    clients: tuple[RosterEntry, ...]


@dataclass(frozen=True, kw_only=True)
class InstructionSent(Event):
    """The server sent an instruction to a client.

    Attributes
    ----------
    phase : str
        ``train`` or ``evaluate``.
    client, task : str
        Who it is for.
    stage : int
        Architecture that it asks for.
    down : dict
        Part of the message → bytes of its arrays.
    """

    kind: ClassVar[str] = "order"
    phase: str
    client: str
    task: str
    stage: int
    down: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Trained(Event):
    """A client trained, and its update arrived.

    Attributes
    ----------
    stage : int
        Stage that it trained.
    client, task : str
        Who it is.
    losses : dict
        Name of `pilot_flwr.protocol.LOSSES` → mean over the steps; None where it is withheld. In
        the file ``loss`` is the total and ``loss_<part>`` a part without its coefficient.
    examples, steps : int
        Training examples, not times epochs; optimizer steps.
    seconds : float
        Of the training alone.
    gradients : dict
        Group of parameters → how many of them received a gradient.
    bytes_down, bytes_up : int
        Of all arrays, to and from the client.
    up : dict
        Part of the reply → bytes of its arrays.
    started, session_seconds : float or None
        When the client's session began, in seconds since 1970, and how long it took.
    epsilon, delta : float or None
        Privacy spent in this run so far, if the upload was made private.
    releases : int or None
        Private uploads of this run so far.
    """

    kind: ClassVar[str] = "train"
    stage: int
    client: str
    task: str
    losses: dict[str, float | None] = field(default_factory=dict)
    examples: int
    steps: int
    seconds: float
    gradients: dict[str, int]
    bytes_down: int
    bytes_up: int
    up: dict[str, int]
    started: float | None = None
    session_seconds: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    releases: int | None = None

    @property
    def loss(self) -> float | None:
        """The total loss, None if it is withheld."""
        return self.losses.get("total")

    def to_dict(self) -> dict[str, Any]:
        """Return the event as the JSON object that the file has, each loss as a key."""
        values: dict[str, Any] = {}
        for key, value in super().to_dict().items():
            if key == "losses":
                values |= {loss_key(name): loss for name, loss in self.losses.items()}
            else:
                values[key] = value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trained":
        """Build the event from its JSON object, see `Event.from_dict`."""
        losses = {
            key.removeprefix("loss_") if key != "loss" else "total": value
            for key, value in values.items()
            if key == "loss" or key.startswith("loss_")
        }
        return cls(**_converted(cls, {**values, "losses": losses}))


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """A client scored the model that it was sent, on its test split.

    Attributes
    ----------
    client, task : str
        Who it is.
    score : float
        From 0 to the metric's maximum.
    metric : str
        A key of `pilot_flwr.metrics.METRICS`.
    approximate : bool
        Whether the metric's own script would give another figure.
    cut : int
        Answers that `evaluation.max_new_tokens` cut off.
    examples : int
        Size of the split.
    seconds : float
        Wall time on the client.
    """

    kind: ClassVar[str] = "evaluate"
    client: str
    task: str
    score: float
    metric: str
    approximate: bool = False
    cut: int = 0
    examples: int
    seconds: float


@dataclass(frozen=True)
class AggregationMethod:
    """The settings that decide what an aggregation does.

    Attributes
    ----------
    lora : str
        `strategy.lora`: ``adaptive``, ``task``, ``global`` or ``exact``.
    optimizer : str
        `strategy.server_optimizer.name`.
    matrices : str
        `strategy.sharing.lora`: the matrices of the LoRA that are shared.
    trained_by : str
        `strategy.trained_by`.
    """

    lora: str
    optimizer: str = "none"
    matrices: str = "AB"
    trained_by: str = "clients"

    @classmethod
    def of(cls, strategy: StrategyConfig) -> "AggregationMethod":
        """Return that of a run's settings."""
        return cls(
            strategy.lora,
            strategy.server_optimizer.name,
            strategy.sharing.lora,
            strategy.trained_by,
        )


@dataclass(frozen=True, kw_only=True)
class Aggregated(Event):
    """The server aggregated the updates of an exchange.

    Attributes
    ----------
    seconds : float
        Wall time of the aggregation.
    clients : int
        Updates that went into it.
    tasks : dict
        Group (a task, or all) → clients whose task adapters were averaged.
    neighbors : dict
        Client → client → share of the second one's LoRA in the first one's Θ̄_l.
    distances : dict
        Client → client → ‖Θ_l,k − Θ_l,j‖₂.
    method : AggregationMethod or None
        The rule; None in the files of versions that did not record it.
    """

    kind: ClassVar[str] = "aggregate"
    seconds: float
    clients: int
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    neighbors: dict[str, dict[str, float]] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    method: AggregationMethod | None = None


@dataclass(frozen=True, kw_only=True)
class NormChecked(Event):
    """The norm of a client's update was held against the exchange's bound.

    Attributes
    ----------
    client : str
        Who sent it.
    action : str
        ``accepted``, ``warned``, ``clipped``, ``rejected``, or ``unchecked`` without a bound.
    norms, bounds : dict
        Part of the update → its norm and its bound; no bounds if there were too few updates.
    reason : str
        Which norm exceeds which bound; empty if none does.
    """

    kind: ClassVar[str] = "update_norm"
    client: str
    action: str
    norms: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ClientFailed(Event):
    """A client's part in an exchange is missing.

    Attributes
    ----------
    phase : str
        ``roster``, ``train`` or ``evaluate``.
    client : str
        Whose part it is.
    reason : str
        Why, in one line.
    up : dict or None
        Part → bytes of a reply that arrived and was rejected; None if none did.
    """

    kind: ClassVar[str] = "failure"
    phase: str
    client: str
    reason: str
    up: dict[str, int] | None = None

    @property
    def line(self) -> str:
        """The failure as one line, see `failure_line`."""
        return failure_line(self.client, self.exchange, self.phase, self.reason)


@dataclass(frozen=True, kw_only=True)
class ClientWarning(Event):
    """Something about a client is odd, and it takes part all the same.

    Attributes
    ----------
    client : str
        Which client.
    text : str
        What is odd, in one line.
    """

    kind: ClassVar[str] = "warning"
    client: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ExchangeRepeated(Event):
    """An exchange closed with too few clients and is repeated.

    Attributes
    ----------
    reason : str
        What was missing.
    undone : int
        How many events before this one belong to the discarded attempt.
    """

    kind: ClassVar[str] = "repeat"
    reason: str = ""
    undone: int

    def __post_init__(self) -> None:
        if self.undone < 0:
            raise ValueError(f"`undone` is {self.undone} but must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ExchangeClosed(Event):
    """An exchange is complete.

    Attributes
    ----------
    exchanges : int
        R + 1, how many the run has.
    seconds : float
        Wall time on the server.
    """

    kind: ClassVar[str] = "round"
    exchanges: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationClosed(Event):
    """The closing evaluation, of the models of the last exchange, is complete.

    Attributes
    ----------
    seconds : float
        Wall time on the server.
    """

    kind: ClassVar[str] = "closing_evaluation"
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run was resumed after `exchange`; 0 is from the beginning.

    Attributes
    ----------
    attempt : int
        How often it has been resumed.
    interrupted : str
        File of the events that were moved aside; empty if there were none.
    moved : int
        How many those are.
    passed_over : tuple of str
        Why later checkpoints were not used.
    flower_run : str
        Flower's id of the run that continues it.
    """

    kind: ClassVar[str] = "resume"
    attempt: int
    interrupted: str = ""
    moved: int = 0
    passed_over: tuple[str, ...] = ()
    flower_run: str = ""


KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        RosterCalled,
        InstructionSent,
        Trained,
        Evaluated,
        Aggregated,
        NormChecked,
        ClientFailed,
        ClientWarning,
        ExchangeRepeated,
        ExchangeClosed,
        EvaluationClosed,
        Resumed,
    )
}
"""Event by its name in the file."""

AnyEvent = TypeVar("AnyEvent", bound=Event)


def parse_event(line: str | bytes) -> Event:
    """Read one line of ``metrics.jsonl``.

    Parameters
    ----------
    line : str or bytes
        A JSON object with a string ``event``.

    Returns
    -------
    Event
        An `UnknownEvent` if the kind is unknown.

    Raises
    ------
    ValueError
        The line is not an event, or lacks a key of its kind, or has a value of another type.
    """
    try:
        values = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    kind = values.get("event") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise ValueError("no object with a string `event`")
    if kind not in KINDS:
        return UnknownEvent(exchange=0, name=kind, elapsed=_number(values.get("elapsed", 0.0)))
    return KINDS[kind].from_dict(values)


def parse_events(lines: Iterable[bytes], path: Path) -> list[Event]:
    """Read whole lines of ``metrics.jsonl``, strictly.

    Parameters
    ----------
    lines : iterable of bytes
        From the first line of the file on.
    path : Path
        Named in an error.

    Raises
    ------
    StateError
        A line is not an event of a run.
    """
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(parse_event(line))
        except ValueError as error:
            raise StateError(f"{path}, line {number}, is not an event of a run: {error}.") from None
    return events


def history(events: Iterable[Event]) -> list[Event]:
    """Return the events without discarded attempts at an exchange; the repetitions stay."""
    kept: list[Event] = []
    for event in events:
        append(kept, event)
    return kept


def append(kept: list[Event], event: Event) -> None:
    """Append an event to a history; one that repeats an exchange removes the discarded attempt."""
    if isinstance(event, ExchangeRepeated) and event.undone:
        del kept[-event.undone :]
    kept.append(event)


def select(
    events: Iterable[Event], kind: type[AnyEvent], exchange: int | None = None
) -> list[AnyEvent]:
    """Return the events of one kind, in order.

    Parameters
    ----------
    events : iterable of Event
        Of a run.
    kind : type
        Class of the events.
    exchange : int, optional
        Only those of this exchange.
    """
    return [
        event
        for event in events
        if isinstance(event, kind) and (exchange is None or event.exchange == exchange)
    ]


def tasks_of(events: Sequence[Event]) -> list[str]:
    """Return the tasks of all clients that took part in a run or were scored, sorted."""
    rostered = {entry.task for event in select(events, RosterCalled) for entry in event.clients}
    return sorted(rostered | {event.task for event in select(events, Evaluated)})


def task_scores(events: Iterable[Event], exchange: int) -> dict[str, float]:
    """Compute every task's score of the models after an exchange.

    ::

        score_t = Σ_k n_k score_k / Σ_k n_k        over the clients k of task t

    Parameters
    ----------
    events : iterable of Event
        Of a run; their order does not matter.
    exchange : int
        0 is before any training.

    Returns
    -------
    dict
        Task → mean over its test examples; a task without any is missing.
    """
    by_task: dict[str, list[Evaluated]] = {}
    for event in select(events, Evaluated, exchange):
        by_task.setdefault(event.task, []).append(event)
    scores = {}
    for task, evaluated in by_task.items():
        if examples := sum(event.examples for event in evaluated):
            total = math.fsum(event.score * event.examples for event in evaluated)
            scores[task] = total / examples
    return scores


def bytes_down(events: Iterable[Event], exchange: int | None = None) -> dict[str, int]:
    """Return part of the model → bytes that the server sent, in all exchanges or in one."""
    return _sums(event.down for event in select(events, InstructionSent, exchange))


def bytes_up(events: Sequence[Event], exchange: int | None = None) -> dict[str, int]:
    """Return part of the model → bytes that clients sent, those of rejected replies included."""
    failed = (event.up or {} for event in select(events, ClientFailed, exchange))
    return _sums([*(event.up for event in select(events, Trained, exchange)), *failed])


def mean_over_tasks(scores: Mapping[str, float], tasks: Collection[str]) -> float | None:
    """Compute the mean over tasks, every task counting the same; None if one has no score.

    A mean over the tasks that happen to have a score would rise when the hardest one fails.

    Parameters
    ----------
    scores : mapping
        Task → score.
    tasks : collection of str
        All tasks of the run.
    """
    if not tasks or not scores.keys() >= set(tasks):
        return None
    return math.fsum(scores[task] for task in tasks) / len(tasks)


def failure_line(client: object, exchange: object, phase: object, reason: object) -> str:
    """Return a failure as one line: who, in which exchange and phase, and why."""
    return f"Client {client} failed in exchange {exchange} ({phase}): {headline(str(reason))}"


def symbol(name: str) -> str:
    """Return the symbol of a group of parameters or of a part of a message, else its name."""
    group = PART_GROUPS.get(name, name)
    return next((row.symbol for known, row in GROUPS.items() if known == group), name)


def aggregation_lines(
    event: Aggregated | None,
    method: AggregationMethod | None = None,
    *,
    width: int | None = None,
) -> list[str]:
    """Say what the server did with the updates of an exchange.

    Parameters
    ----------
    event : Aggregated or None
        None if there was no aggregation.
    method : AggregationMethod, optional
        The run's, for an event that does not record it.
    width : int, optional
        Most characters for the sizes of groups; without it groups are listed by name.
    """
    if event is None or not (event.tasks or event.neighbors):
        return ["no aggregation"]
    method = event.method or method
    adam = method is not None and method.optimizer == "adam"
    if method is not None and method.trained_by == "pooled" and not adam:
        return ["takes what the one client trained"]
    verb = "steps by Adam:" if adam else "averages"
    adapter, lora = symbol("task_adapters"), symbol("lora")
    lines = []
    if event.tasks:
        lines.append(f"{verb} {adapter} {_groups(event.tasks, width)}")
    if event.neighbors and (method is None or method.lora == "adaptive"):
        others = sorted({len({*shares} - {own}) for own, shares in event.neighbors.items()})
        verb = ("steps by Adam: " if adam else "") + ("mixes" if method else "combines")
        of = " of" if adam else ""
        with_others = "–".join(map(str, others))
        lines.append(f"{verb}{of} {len(event.neighbors)} {lora}, each with {with_others} others")
    elif event.neighbors and method is not None:
        matrices = {"A": "A of ", "B": "B of "}.get(method.matrices, "")
        groups = {", ".join(sorted(s)): tuple(sorted(s)) for s in event.neighbors.values()}
        rest = f", the rest in {symbol('residual')}" if method.lora == "exact" else ""
        members = _groups(dict(sorted(groups.items())), 10 if width is None else width)
        lines.append(f"{verb} {matrices}{lora} {members}{rest}")
    return lines


def _groups(groups: Mapping[str, Sequence[str]], width: int | None) -> str:
    """Return whose tensors were averaged, by name or, where room is scarce, by number."""
    if len(groups) == 1:
        return f"of {count(len(next(iter(groups.values()))), 'client')}"
    if width is None:
        return "per task: " + ", ".join(f"{task} of {len(c)}" for task, c in groups.items())
    sizes = ", ".join(str(len(clients)) for clients in groups.values())
    return f"per task, of {sizes} clients" if len(sizes) <= width else f"in {len(groups)} tasks"


def _sums(messages: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return part → bytes summed over messages, without parts that never had any."""
    sums = Counter[str]()
    for sizes in messages:
        sums.update(sizes)
    return {part: size for part, size in sums.items() if size}


def loss_key(name: str) -> str:
    """Return the key of a loss in the file and in logs: ``loss``, or ``loss_<part>``."""
    return "loss" if name == "total" else f"loss_{name}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _converted(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a dataclass, each checked against its type.

    Raises
    ------
    ValueError
        One is missing or of another type.
    """
    found = {}
    for declared in fields(cls):
        key = _KEYS.get(declared.name, declared.name)
        optional = declared.default is not MISSING or declared.default_factory is not MISSING
        if values.get(key) is None and optional:
            continue
        if key not in values:
            raise ValueError(f"`{key}` is missing")
        try:
            found[declared.name] = _convert(values[key], _hints(cls)[declared.name])
        except ValueError as error:
            raise ValueError(f"`{key}` {error}") from None
    return found


def _convert(value: Any, kind: Any, *, finite: bool = True) -> Any:
    """Return a JSON value as the type of a field: scalar, optional, dict, tuple or dataclass.

    Numbers by themselves must be finite; among those of a dict, such as losses, a NaN must be seen.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (member for member in inner if member is not type(None))
        return _convert(value, kind, finite=finite)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(item, inner[1], finite=False) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, inner[0]) for item in value)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return kind(**_converted(kind, value))
    if kind is float:
        return _number(value, finite=finite)
    if kind is int and type(value) is int and abs(value) <= _LARGEST:
        return value
    if kind in (str, bool) and type(value) is kind:
        return value
    raise ValueError(f"is {_short(value)} but must be {getattr(kind, '__name__', kind)}")


def _number(value: Any, *, finite: bool = True) -> float:
    with contextlib.suppress(OverflowError):  # a whole number beyond floating point
        if type(value) in (int, float) and (math.isfinite(value) or not finite):
            return float(value)
    raise ValueError(f"is {_short(value)} but must be a {'finite ' * finite}number")


def _short(value: object) -> str:
    return repr(value)[:40]
