"""The server's settings: rounds, aggregation, what it waits for and what it accepts."""

from dataclasses import dataclass, field

from pilot_flwr.checks import at_least, at_most, check_name, one_of, positive, share
from pilot_flwr.errors import ConfigError

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
class ServerOptimizerConfig:
    """What the server does with a round's averages: ``none`` takes them, ``adam`` steps to them.

    ``adam`` is FedAdam (Reddi et al., ICLR 2021): the difference between an average and what
    the server had is a gradient for Adam with `learning_rate`, `beta_1`, `beta_2` and `tau`.
    """

    name: str = "none"
    learning_rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        one_of("strategy.server_optimizer.name", self.name, ("none", "adam"))
        positive("strategy.server_optimizer.learning_rate", self.learning_rate)
        share("strategy.server_optimizer.beta_1", self.beta_1)
        share("strategy.server_optimizer.beta_2", self.beta_2)
        positive("strategy.server_optimizer.tau", self.tau)


@dataclass(frozen=True)
class SharingConfig:
    """What of a client's trained parameters is sent; the rest is kept on its disk.

    `adapter` is the own task adapter Θ_a. `lora` says which matrices of the text adapter Θ_l:
    ``AB``, ``A`` (FedSA-LoRA), ``B`` (FFA-LoRA, whose A is never trained) or ``none``.
    """

    adapter: bool = True
    lora: str = "AB"

    def __post_init__(self) -> None:
        one_of("strategy.sharing.lora", self.lora, ("AB", "A", "B", "none"))


@dataclass(frozen=True)
class StrategyConfig:
    """The server: rounds, aggregation, and how long it waits.

    `name` is what tables call the method; conf/strategy/ has one file per method, and the settings
    below say what it does (docs/methods.md). `trained_by` is ``clients``; ``pooled`` trains one
    model on all clients' data (a simulation's upper reference, no federation), ``nobody`` only
    evaluates. `stages` is 2, or 1 for a client that never switches to CT-MoA. `adapters` is
    the average of the task adapters: ``task`` over a task's clients, ``global`` over all.
    `lora` is the aggregation of the text adapters: ``adaptive`` (ATA), ``task`` and ``global``
    (means over a task's clients and over all), ``exact`` (FedEx-LoRA: the mean of all products
    B A, kept exactly). `self_weight` says whether ATA counts a client's own LoRA.

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
    trained_by: str = "clients"
    stages: int = 2
    adapters: str = "task"
    lora: str = "adaptive"
    num_neighbors: int = 2
    self_weight: bool = True
    sharing: SharingConfig = field(default_factory=SharingConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    min_replies: int = 1
    below_minimum: str = "stop"
    clients: int = 0
    max_examples: int = 0
    wait_seconds: float = 300.0
    round_timeout_seconds: float = 86400.0
    update_norm: UpdateNormConfig = field(default_factory=UpdateNormConfig)

    def __post_init__(self) -> None:
        check_name("strategy.name", self.name)
        one_of("strategy.trained_by", self.trained_by, ("clients", "pooled", "nobody"))
        at_least("strategy.stages", self.stages, 1)
        at_most("strategy.stages", self.stages, 2)
        one_of("strategy.adapters", self.adapters, ("task", "global"))
        one_of("strategy.lora", self.lora, ("adaptive", "task", "global", "exact"))
        if self.stages == 2 and not self.sharing.adapter:
            raise ConfigError(
                "`strategy.stages` is 2 but must be 1 with `strategy.sharing.adapter=false`: "
                "CT-MoA mixes the task adapters that clients share."
            )
        at_least("strategy.rounds", self.rounds, 1)
        at_least("strategy.num_neighbors", self.num_neighbors, 1)
        at_least("strategy.min_replies", self.min_replies, 1)
        one_of("strategy.below_minimum", self.below_minimum, ("stop", "wait"))
        at_least("strategy.clients", self.clients, 0)
        at_least("strategy.max_examples", self.max_examples, 0)
        positive("strategy.wait_seconds", self.wait_seconds)
        positive("strategy.round_timeout_seconds", self.round_timeout_seconds)
