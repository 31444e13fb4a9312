"""The events of a run: each kind declared once, one JSON line of ``metrics.jsonl`` per event.

`RunFolder.record` writes them and `parse_event` reads a line; `pilot_flwr.run.history` computes
scores, bytes and exchanges from them.

To record another kind of event, declare a dataclass with its `kind` and add it to `KINDS`. Keys
added later need a default, so that the runs of earlier versions stay readable.
"""

import contextlib
import functools
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.formatting import headline

_KEYS = {"exchange": "round", "session_seconds": "turn_seconds"}
"""Attributes with another name in the file."""

_LARGEST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base class of all events."""

    kind: ClassVar[str] = ""
    elapsed: float = 0.0
    """Seconds since the run began, set by `RunFolder.record`."""
    exchange: int
    """From 1. For scores, the exchange that produced the model; 0 is before any training."""

    def to_dict(self) -> dict[str, Any]:
        """Return the event's JSON object; attributes that are None are omitted."""
        values = {_KEYS.get(key, key): v for key, v in asdict(self).items() if v is not None}
        return {"event": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Event":
        """Build the event from its JSON object; `ValueError` if a key is missing or mistyped."""
        return cls(**_converted(cls, values))


@dataclass(frozen=True, kw_only=True)
class UnknownEvent(Event):
    """An event of a kind that this version does not know."""

    name: str


@dataclass(frozen=True)
class RosterEntry:
    """A client of a roster, with the number of training examples that it declared."""

    client: str
    task: str
    examples: int
    stage: int


@dataclass(frozen=True, kw_only=True)
class RosterCalled(Event):
    """Which clients take part in an exchange."""

    kind: ClassVar[str] = "roster"
    clients: tuple[RosterEntry, ...]
    available: dict[str, int] | None = None
    """Task → number of available clients, if `clients` are a sample of them."""


@dataclass(frozen=True, kw_only=True)
class InstructionSent(Event):
    """The server sent an instruction to a client."""

    kind: ClassVar[str] = "order"
    phase: str
    """``train`` or ``evaluate``."""

    client: str
    task: str
    stage: int
    down: dict[str, int]
    """Part of the message → bytes of its arrays."""

    asked: int = 0
    """Number of clients that are instructed in this phase; 0 in files of earlier versions."""


@dataclass(frozen=True, kw_only=True)
class Trained(Event):
    """A client trained, and its update arrived."""

    kind: ClassVar[str] = "train"
    stage: int
    client: str
    task: str
    losses: dict[str, float | None] = field(default_factory=dict)
    """Name in `pilot_flwr.protocol.LOSSES` → mean over the steps, None if withheld."""

    examples: int
    """Training examples, not multiplied by epochs."""

    steps: int
    seconds: float
    """Duration of the training alone."""

    gradients: dict[str, int]
    """Group → number of its parameters that received a gradient."""

    bytes_down: int
    bytes_up: int
    up: dict[str, int]
    """Part of the reply → bytes of its arrays."""

    started: float | None = None
    """Start of the client's session, in seconds since 1970."""

    session_seconds: float | None = None
    epsilon: float | None = None
    """With `delta`, the privacy spent in this run so far by `releases` privatised uploads."""

    delta: float | None = None
    releases: int | None = None

    @property
    def loss(self) -> float | None:
        """The total loss, None if withheld."""
        return self.losses.get("total")

    def to_dict(self) -> dict[str, Any]:
        """Return the event's JSON object, with a key per loss."""
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
    """A client evaluated the model that it received on its test split."""

    kind: ClassVar[str] = "evaluate"
    client: str
    task: str
    score: float
    metric: str
    """Key of `pilot_flwr.metrics.METRICS`."""

    approximate: bool = False
    """Whether the metric's official script can give another score."""

    cut: int = 0
    """Answers truncated at `evaluation.max_new_tokens`."""

    examples: int
    seconds: float


@dataclass(frozen=True)
class AggregationMethod:
    """The settings of `strategy` that determine what an aggregation does.

    `optimizer` is `server_optimizer.name` and `matrices` is `sharing.lora`.
    """

    lora: str
    optimizer: str = "none"
    matrices: str = "AB"
    trained_by: str = "clients"

    @classmethod
    def of(cls, strategy: StrategyConfig) -> "AggregationMethod":
        """Return the method of a configuration."""
        sharing, optimizer = strategy.sharing.lora, strategy.server_optimizer.name
        return cls(strategy.lora, optimizer, sharing, strategy.trained_by)


@dataclass(frozen=True)
class LoraMixing:
    """Summary of mixing weights: the number of LoRAs, and of other clients mixed into each.

    `groups` has the sizes of the groups of clients that share a mean; empty if groups overlap.
    """

    loras: int
    fewest_others: int
    most_others: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Aggregated(Event):
    """The server aggregated the updates of an exchange."""

    kind: ClassVar[str] = "aggregate"
    seconds: float
    clients: int
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Group (a task, or all) → clients whose task adapters were averaged."""

    file: str | None = None
    """File in the run folder with distances and mixing weights, see `pilot_flwr.run.aggregations`;
    None if no LoRAs were mixed."""

    mixing: LoraMixing | None = None
    """Summary of the mixing weights."""

    truncation: dict[str, float] = field(default_factory=dict)
    """Client → relative error of its truncated mixture; empty while all clients have one rank."""

    neighbors: dict[str, dict[str, float]] | None = None
    """In files of versions without `file`: client l → client k → weight of Θ_l,k in Θ̄_l."""

    distances: dict[str, dict[str, float]] | None = None
    """In the same files: client k → client j → ‖Θ_l,k − Θ_l,j‖₂."""

    method: AggregationMethod | None = None
    """None in files of versions that did not record it."""


@dataclass(frozen=True, kw_only=True)
class NormChecked(Event):
    """The norm of a client's update was compared with the exchange's bound."""

    kind: ClassVar[str] = "update_norm"
    client: str
    action: str
    """``accepted``, ``warned``, ``clipped``, ``rejected``, or ``unchecked`` without a bound."""

    norms: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    """Part of the update → bound, as `norms`; empty if there were too few updates."""

    reason: str = ""
    """Which norm exceeds which bound."""


@dataclass(frozen=True, kw_only=True)
class ClientFailed(Event):
    """A client failed in a phase of an exchange."""

    kind: ClassVar[str] = "failure"
    phase: str
    """``roster``, ``train`` or ``evaluate``."""

    client: str
    reason: str
    up: dict[str, int] | None = None
    """Bytes of a rejected reply by part."""

    @property
    def line(self) -> str:
        """The failure as one line, see `failure_line`."""
        return failure_line(self.client, self.exchange, self.phase, self.reason)


@dataclass(frozen=True, kw_only=True)
class ClientWarning(Event):
    """A warning about a client that still takes part."""

    kind: ClassVar[str] = "warning"
    client: str
    text: str
    up: dict[str, int] | None = None
    """Part of a reply that came after its exchange had closed → bytes of its arrays."""


@dataclass(frozen=True, kw_only=True)
class ExchangeRepeated(Event):
    """An exchange closed with too few clients and is repeated."""

    kind: ClassVar[str] = "repeat"
    reason: str = ""
    undone: int
    """Number of preceding events that belong to the discarded attempt."""

    def __post_init__(self) -> None:
        if self.undone < 0:
            raise ValueError(f"`undone` is {self.undone} but must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ExchangeClosed(Event):
    """An exchange is complete; `exchanges` is their number in the run, R + 1."""

    kind: ClassVar[str] = "round"
    exchanges: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationClosed(Event):
    """The closing evaluation of the last exchange's models is complete."""

    kind: ClassVar[str] = "closing_evaluation"
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run was resumed after `exchange`; 0 is from the beginning."""

    kind: ClassVar[str] = "resume"
    attempt: int
    interrupted: str = ""
    """Archive of the `moved` events after the checkpoint, empty if there were none."""

    moved: int = 0
    passed_over: tuple[str, ...] = ()
    """Why later checkpoints were not used."""

    flower_run: str = ""
    """Flower's id of the run that continues it."""


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
    """Read one line of ``metrics.jsonl``; an unknown kind gives an `UnknownEvent`.

    Raises
    ------
    ValueError
        The line is not an event, lacks a key of its kind, or has a value of another type.
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


def select(
    events: Iterable[Event], kind: type[AnyEvent], exchange: int | None = None
) -> list[AnyEvent]:
    """Return the events of one kind, in order, of all exchanges or of one."""
    return [
        event
        for event in events
        if isinstance(event, kind) and (exchange is None or event.exchange == exchange)
    ]


def failure_line(client: object, exchange: object, phase: object, reason: object) -> str:
    """Return a failure as one line: client, exchange, phase and reason."""
    return f"Client {client} failed in exchange {exchange} ({phase}): {headline(str(reason))}"


def loss_key(name: str) -> str:
    """Return a loss's key in the file and in logs: ``loss`` for the total, else ``loss_<part>``.

    A part is without its coefficient.
    """
    return "loss" if name == "total" else f"loss_{name}"


_hints = functools.cache(get_type_hints)


def _converted(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a dataclass; `ValueError` if one is missing or of another type."""
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

    A scalar field must be finite; in a dict, such as the losses, NaN is allowed and shown.
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
    raise ValueError(f"is {value!r:.40} but must be {getattr(kind, '__name__', kind)}")


def _number(value: Any, *, finite: bool = True) -> float:
    with contextlib.suppress(OverflowError):  # a whole number beyond floating point
        if type(value) in (int, float) and (math.isfinite(value) or not finite):
            return float(value)
    raise ValueError(f"is {value!r:.40} but must be a {'finite ' * finite}number")
