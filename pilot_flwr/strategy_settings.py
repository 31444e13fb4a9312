"""The server's settings: rounds, aggregation, what it waits for and what it accepts."""

from dataclasses import dataclass

from pilot_flwr.checks import at_least, one_of, positive


@dataclass(frozen=True)
class StrategyConfig:
    """The server: rounds, aggregation, and how long it waits.

    `rounds` is the paper's R, that is R + 1 exchanges. `num_neighbors` is M of the adaptive
    text-adapter aggregation. A round closes with the clients that replied, if at least
    `min_replies` did. Times are in seconds.
    """

    name: str = "pilot"
    rounds: int = 3
    num_neighbors: int = 2
    min_replies: int = 1
    wait_seconds: float = 300.0
    round_timeout_seconds: float = 86400.0

    def __post_init__(self) -> None:
        one_of("strategy.name", self.name, ("pilot",))
        at_least("strategy.rounds", self.rounds, 1)
        at_least("strategy.num_neighbors", self.num_neighbors, 1)
        at_least("strategy.min_replies", self.min_replies, 1)
        positive("strategy.wait_seconds", self.wait_seconds)
        positive("strategy.round_timeout_seconds", self.round_timeout_seconds)
