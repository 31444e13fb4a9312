"""The server's settings: rounds, aggregation, what it waits for and what it accepts."""

from dataclasses import dataclass, field

from pilot_flwr.checks import at_least, one_of, positive

ACTIONS = ("off", "warn", "clip", "reject")
"""What can be done about an update whose norm is above the round's bound."""


@dataclass(frozen=True)
class UpdateNormConfig:
    """A bound on the norms of a round's updates: `factor` times their median.

    `action` is what happens to an update above it: ``warn`` writes it down and changes nothing,
    ``clip`` shortens it to the bound, ``reject`` leaves it out, ``off`` computes no norms. The
    default keeps the paper's algorithm and yet shows who stands out.
    """

    action: str = "warn"
    factor: float = 3.0

    def __post_init__(self) -> None:
        one_of("strategy.update_norm.action", self.action, ACTIONS)
        at_least("strategy.update_norm.factor", self.factor, 1)


@dataclass(frozen=True)
class StrategyConfig:
    """The server: rounds, aggregation, and how long it waits.

    `rounds` is the paper's R, that is R + 1 exchanges. `num_neighbors` is M of the adaptive
    text-adapter aggregation. A round closes with the clients that replied, if at least
    `min_replies` did; `below_minimum` says what happens otherwise: ``stop`` ends the run, ``wait``
    waits for clients as long as it takes and repeats the exchange. `clients` is 0 for the
    configured clients ``<task>-<n>``, as in a simulation, or the number of real sites, of any
    names, that the first exchange waits for. Times are in seconds. A client that declares more
    than `max_examples` training examples is refused, if it is not 0: the aggregation weighs
    clients by a number that the server cannot count itself.
    """

    name: str = "pilot"
    rounds: int = 3
    num_neighbors: int = 2
    min_replies: int = 1
    below_minimum: str = "stop"
    clients: int = 0
    max_examples: int = 0
    wait_seconds: float = 300.0
    round_timeout_seconds: float = 86400.0
    update_norm: UpdateNormConfig = field(default_factory=UpdateNormConfig)

    def __post_init__(self) -> None:
        one_of("strategy.name", self.name, ("pilot",))
        at_least("strategy.rounds", self.rounds, 1)
        at_least("strategy.num_neighbors", self.num_neighbors, 1)
        at_least("strategy.min_replies", self.min_replies, 1)
        one_of("strategy.below_minimum", self.below_minimum, ("stop", "wait"))
        at_least("strategy.clients", self.clients, 0)
        at_least("strategy.max_examples", self.max_examples, 0)
        positive("strategy.wait_seconds", self.wait_seconds)
        positive("strategy.round_timeout_seconds", self.round_timeout_seconds)
