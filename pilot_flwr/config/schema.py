"""Typed, frozen, validated settings with their defaults and ranges.

The settings reference is generated from the fields. To add a setting, add a field with a default,
limits and a docstring; check several fields in ``__post_init__``, several sections in
`pilot_flwr.config.rules`. Model and data settings are in `pilot_flwr.config.model` and
`pilot_flwr.config.data`, named choices in ``conf/``.
"""

from dataclasses import dataclass, field
from typing import Annotated

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.rules import (
    ABSOLUTE,
    FRACTION,
    NAME,
    PART,
    POSITIVE,
    Section,
    at_least,
    check_combinations,
    check_limits,
    check_lora_rank,
    check_sampling,
    choice,
    maximum,
    minimum,
    one_of,
)
from pilot_flwr.errors import ConfigError

LEAST_NOISE, MOST_NOISE = 1e-6, 1e6
"""Range of `privacy.noise_multiplier`; at its ends one upload has ε = 2e12 and 0 (δ = 1e-5)."""

LEAST_CLIP = 1e-100
"""Least `privacy.clip_norm`, far above where float64 underflows."""

ACTIONS = ("off", "warn", "clip", "reject")
"""Treatments of an update whose norm exceeds the exchange's bound."""

LARGEST_SEED = 2**63 - 1
"""The largest seed that both torch's and numpy's generators take."""


@dataclass(frozen=True)
class PrivacyConfig(Section, prefix="privacy"):
    """Client-level differential privacy: each client clips its upload and adds Gaussian noise.

    The uploaded change of Θ_a and Θ_l is clipped as one vector, and noise is added to it. Losses
    and scores are exact, so the guarantee does not cover them; by default they are not sent. See
    docs/how-to/privacy.md.
    """

    enabled: bool = False
    """Clip and noise every upload."""
    clip_norm: Annotated[float, POSITIVE, minimum(LEAST_CLIP)] = 1.0
    """L2 norm to which an upload's change is clipped."""
    noise_multiplier: Annotated[float, minimum(LEAST_NOISE), maximum(MOST_NOISE)] = 1.0
    """Standard deviation of the noise, in units of `privacy.clip_norm`."""
    delta: Annotated[float, POSITIVE, FRACTION] = 1e-5
    """δ at which ε is reported."""
    send_metrics: bool = False
    """Send losses and scores although privacy is enabled."""

    @property
    def withholds_metrics(self) -> bool:
        """True if losses and scores stay at the client."""
        return self.enabled and not self.send_metrics


@dataclass(frozen=True)
class UpdateNormConfig(Section, prefix="strategy.update_norm"):
    """Bound on the norms of an exchange's updates: `factor` times their median."""

    action: Annotated[str, choice(*ACTIONS)] = "warn"
    """Treatment of an update above the bound: `warn` records it and changes nothing, `clip`
    scales it down to the bound, `reject` excludes it, `off` computes no norms."""
    factor: Annotated[float, minimum(1)] = 3.0
    """Bound as a multiple of the median norm."""


@dataclass(frozen=True)
class ServerOptimizerConfig(Section, prefix="strategy.server_optimizer"):
    """Server optimiser; FedAdam (Reddi et al., ICLR 2021) treats the change as a gradient."""

    name: Annotated[str, choice("none", "adam")] = "none"
    """`none` takes the averages as they are, `adam` steps towards them."""
    learning_rate: Annotated[float, POSITIVE] = 0.01
    """Server learning rate η."""
    beta_1: Annotated[float, FRACTION] = 0.9
    """Decay of the first moment."""
    beta_2: Annotated[float, FRACTION] = 0.99
    """Decay of the second moment."""
    tau: Annotated[float, POSITIVE] = 1e-3
    """Degree of adaptivity τ, added to the root of the second moment."""


@dataclass(frozen=True)
class SharingConfig(Section, prefix="strategy.sharing"):
    """Trained parameters that a client uploads; the others stay on its disk."""

    adapter: bool = True
    """Upload the task adapter Θ_a."""
    lora: Annotated[str, choice("AB", "A", "B", "none")] = "AB"
    """Matrices of Θ_l to upload: both, `A` (FedSA-LoRA), `B` (FFA-LoRA) or none."""


@dataclass(frozen=True)
class CloseAfterConfig(Section, prefix="strategy.close_after"):
    """When an exchange of real sites closes before all of them have answered."""

    fraction: Annotated[float, PART] = 1.0
    """Share of the instructed clients whose replies an exchange waits for, failed ones not counted;
    1 waits for all. At least `strategy.min_replies` are waited for."""
    grace_seconds: Annotated[float, minimum(0)] = 60.0
    """Seconds that the exchange then waits for the others. Later replies are discarded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction == 1 and self.grace_seconds != type(self).grace_seconds:
            raise ConfigError(
                f"`strategy.close_after.grace_seconds` is {self.grace_seconds:g}, which has no "
                "effect with `strategy.close_after.fraction=1`: set the fraction below 1, or omit "
                "the setting."
            )


@dataclass(frozen=True)
class StrategyConfig(Section, prefix="strategy"):
    """The server. A method is a file of these settings in conf/strategy/."""

    name: Annotated[str, NAME] = "pilot"
    """Name of the method in tables."""
    rounds: Annotated[int, minimum(1)] = 3
    """The paper's R; a run has R + 1 exchanges."""
    trained_by: Annotated[str, choice("clients", "pooled", "nobody")] = "clients"
    """`clients` is federated training; `pooled` trains one model on all clients' data (a reference
    for simulations); `nobody` only evaluates."""
    stages: Annotated[int, minimum(1), maximum(2)] = 2
    """Stages of the model; 1 never switches to CT-MoA."""
    adapters: Annotated[str, choice("task", "global")] = "task"
    """Average task adapters over a task's clients or over all clients."""
    lora: Annotated[str, choice("adaptive", "task", "global", "exact")] = "adaptive"
    """Aggregation of text adapters: `adaptive` (ATA), mean over a `task`'s clients, `global` mean,
    or `exact` mean of the products B A (FedEx-LoRA)."""
    neighbors: Annotated[str, choice("fixed", "grouped")] = "fixed"
    """Neighbours of a client in the adaptive aggregation: a `fixed` number of the nearest, or its
    group, `grouped` in every exchange so that its members' LoRAs predict each other best."""
    num_neighbors: Annotated[int, minimum(1)] = 2
    """M: neighbours of a client in the adaptive aggregation."""
    distances: Annotated[str, choice("exact", "sketch")] = "exact"
    """Distances between LoRAs: `exact`, or estimated from a seeded random `sketch` of every LoRA
    with a standard error of about 1 %, which saves time with hundreds of clients per exchange.
    For trusted clients: one that knows the seed can appear close to others."""
    self_weight: bool = True
    """Include a client's own LoRA in the adaptive aggregation."""
    sharing: SharingConfig = field(default_factory=SharingConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    fraction_train: Annotated[float, PART] = 1.0
    """Share of the available clients that an exchange draws to train, as in Flower's FedAvg:
    `max(int(clients * fraction_train), min_train_nodes)`, and at least `strategy.min_replies`."""
    fraction_evaluate: Annotated[float, PART] = 1.0
    """Share of the available clients that the closing evaluation draws."""
    min_train_nodes: Annotated[int, minimum(0)] = 0
    """Minimum number of clients that an exchange draws."""
    min_available_nodes: Annotated[int, minimum(0)] = 0
    """Minimum number of available clients to draw from; fewer are treated as too few replies."""
    sampling: Annotated[str, choice("uniform", "stratified")] = "uniform"
    """Draw from all available clients, or from every task in proportion to its available clients
    and at least one."""
    min_replies: Annotated[int, minimum(1)] = 1
    """Minimum number of usable replies per exchange; at most the number of clients."""
    below_minimum: Annotated[str, choice("stop", "wait")] = "stop"
    """With fewer replies, `stop` the run, or `wait` for clients and repeat the exchange."""
    clients: Annotated[int, minimum(0)] = 0
    """Number of real sites, with any names, that the first exchange waits for; 0: the clients
    `<task>-<n>` of the configured tasks, as in a simulation."""
    client_keys: Annotated[str, ABSOLUTE] = ""
    """File on the SuperLink's machine that lists the key of every real client; empty: a client id
    is bound to the first key that uses it in the run. See docs/how-to/deployment.md."""
    max_examples: Annotated[int, minimum(0)] = 1_000_000
    """Refuse a client that reports more training examples: they weight its update, and the
    server cannot verify them; 0: no limit."""
    wait_seconds: Annotated[float, POSITIVE] = 300.0
    """Seconds to wait for clients to connect."""
    round_timeout_seconds: Annotated[float, POSITIVE] = 86400.0
    """Seconds to wait for the replies of an exchange."""
    close_after: CloseAfterConfig = field(default_factory=CloseAfterConfig)
    update_norm: UpdateNormConfig = field(default_factory=UpdateNormConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages == 2 and not self.sharing.adapter:
            raise ConfigError(
                "`strategy.stages` is 2 but must be 1 with `strategy.sharing.adapter=false`: "
                "CT-MoA mixes the task adapters that clients share."
            )
        if self.sampling == "stratified" and self.fraction_train == self.fraction_evaluate == 1:
            raise ConfigError(
                "`strategy.sampling` is stratified, which has no effect without a "
                "`strategy.fraction_train` or `strategy.fraction_evaluate` below 1."
            )
        rule = self.close_after
        if rule.fraction < 1 and rule.grace_seconds >= self.round_timeout_seconds:
            raise ConfigError(
                f"`strategy.close_after.grace_seconds` is {rule.grace_seconds:g} but must be below "
                f"`strategy.round_timeout_seconds`, {self.round_timeout_seconds:g}, which closes "
                "an exchange in any case."
            )

    def trains(self, *, first: bool) -> bool:
        """Return whether a client trains; `first` marks the federation's first client."""
        return {"clients": True, "pooled": first, "nobody": False}[self.trained_by]

    @property
    def min_available(self) -> int:
        """Minimum number of available clients that an exchange needs."""
        return max(self.min_replies, self.min_train_nodes, self.min_available_nodes)

    def num_drawn(self, available: int, *, train: bool) -> int:
        """Return how many of the available clients an exchange or the closing evaluation draws."""
        if train:
            number = max(int(available * self.fraction_train), self.min_train_nodes)
            return min(available, max(number, self.min_replies))
        return min(available, max(int(available * self.fraction_evaluate), 1))


@dataclass(frozen=True)
class StageConfig:
    """Peak learning rates of one stage."""

    lora_lr: Annotated[float, POSITIVE] = 2e-3
    """Learning rate of the LoRA."""
    connector_lr: Annotated[float, POSITIVE] = 1e-3
    """Learning rate of the connector."""


@dataclass(frozen=True)
class DifferenceLossConfig(Section, prefix="train.difference_loss"):
    """The difference loss between task and client features in stage 1."""

    weight: Annotated[float, minimum(0)] = 0.1
    """Weight λ0."""
    reduction: Annotated[str, choice("normalized", "frobenius", "official")] = "normalized"
    """`normalized` features (loss in [0, 1]), the paper's `frobenius` norm, or the `official`
    code's mean over all entries."""


@dataclass(frozen=True)
class BalanceLossConfig(Section, prefix="train.balance_loss"):
    """The router's load-balancing loss in stage 2; its weight is `train.balance_weight`."""

    reduction: Annotated[str, choice("pooled", "per_image")] = "pooled"
    """Shares f and probabilities P over all tokens, or over each image's tokens with the mean of
    their products over images (official code)."""


@dataclass(frozen=True)
class DittoConfig(Section, prefix="train.ditto"):
    """A personal model beside the shared one (Ditto: Li et al., ICML 2021).

    A client trains both in an exchange, for half of the epochs each. The personal model v is
    pulled to the shared model w that the client received by ``weight / 2 · ‖v − w‖²``; it is
    evaluated in place of the shared one and never leaves the client.
    """

    enabled: bool = False
    """Train a personal model; `train.epochs` must be even."""
    weight: Annotated[float, minimum(0)] = 0.1
    """Weight of the pull towards the shared model."""


@dataclass(frozen=True)
class TrainConfig(Section, prefix="train"):
    """Local training on a client."""

    epochs: Annotated[int, minimum(1)] = 1
    """The paper's E: epochs of one exchange."""
    batch_size: Annotated[int, minimum(1)] = 16
    """Examples of one forward and backward pass."""
    accumulation_steps: Annotated[int, minimum(1)] = 1
    """Batches per optimiser step."""
    max_length: Annotated[int, minimum(1)] = 2048
    """Longest example in tokens, image tokens included."""
    over_long: Annotated[str, choice("refuse", "cut")] = "refuse"
    """A training example above `train.max_length`: `refuse` it as broken, or `cut` it there and
    report the number (official code); one whose images or whole answers would be cut is refused."""
    text_only: Annotated[str, choice("plain", "zero_image")] = "plain"
    """A training example without images: `plain` text, or with a `zero_image` that only the
    connector sees, so that it counts in L_d, L_b and L_z (official code)."""
    warmup_ratio: Annotated[float, FRACTION] = 0.03
    """Share of the optimiser steps of `train.schedule` with a rising learning rate."""
    schedule: Annotated[str, choice("exchange", "run")] = "exchange"
    """Extent of the warm-up, of the cosine and of AdamW's moments: each `exchange` begins anew, or
    all exchanges of the `run` share one, with the moments in the client's private state."""
    weight_decay: Annotated[float, minimum(0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """L2 norm to which gradients are clipped."""
    clipping: Annotated[str, choice("group", "global")] = "group"
    """Clip the gradient of each parameter `group` separately, or the `global` one of all trained
    parameters (official code, baselines)."""
    loss_reduction: Annotated[str, choice("step", "micro_batch")] = "step"
    """Average every loss over an optimiser step's tokens and images, or over those of each
    `micro_batch` and then over the micro-batches (official code)."""
    batching: Annotated[str, choice("random", "length")] = "random"
    """Draw batches at `random`, or of examples of similar `length` that all have images or all
    have none (official code)."""
    autocast: Annotated[str, choice("auto", "bfloat16", "off")] = "auto"
    """Mixed precision in training and evaluation; `auto` is bfloat16 on a GPU, off on a CPU."""
    log_every_seconds: Annotated[float, POSITIVE] = 30.0
    """Seconds between progress lines of a client."""
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=StageConfig)
    difference_loss: DifferenceLossConfig = field(default_factory=DifferenceLossConfig)
    balance_loss: BalanceLossConfig = field(default_factory=BalanceLossConfig)
    balance_weight: Annotated[float, minimum(0)] = 0.1
    """Weight λ1 of the router's load-balancing loss in stage 2."""
    z_weight: Annotated[float, minimum(0)] = 0.01
    """Weight λ2 of the router z-loss in stage 2."""
    lr_scale: Annotated[float, POSITIVE] = 1.0
    """Factor on every learning rate."""
    lora_matrices: Annotated[str, choice("AB", "B")] = "AB"
    """LoRA matrices to train; `B` keeps A as initialised (FFA-LoRA)."""
    proximal_weight: Annotated[float, minimum(0)] = 0.0
    """FedProx's μ: adds μ / 2 · ‖w − w_received‖² over received, trained parameters; 0: off."""
    ditto: DittoConfig = field(default_factory=DittoConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self.stage1, "train.stage1")
        check_limits(self.stage2, "train.stage2")
        if self.ditto.enabled and self.epochs % 2:
            raise ConfigError(
                f"`train.epochs` is {self.epochs} but must be even with `train.ditto.enabled`, "
                "which gives half of them to each of two models."
            )

    def stage(self, stage: int) -> StageConfig:
        """Return the configured learning rates of `stage` (1 or 2)."""
        return self.stage1 if stage == 1 else self.stage2


@dataclass(frozen=True)
class EvaluationConfig(Section, prefix="evaluation"):
    """Federated evaluation of the personalised models by greedy generation."""

    enabled: bool = True
    """Evaluate in every exchange, before training, and once at the end."""
    batch_size: Annotated[int, minimum(1)] = 64
    """Examples generated at a time."""
    max_new_tokens: Annotated[int, minimum(1)] = 16
    """Longest answer in tokens."""


@dataclass(frozen=True)
class SimulationConfig(Section, prefix="simulation"):
    """Resources of the simulation engine, divided among the clients.

    On an existing Ray cluster (`address`) the whole cluster is used: `cpus` and `gpus` keep their
    defaults.
    """

    engine: Annotated[str, choice("ray", "in-process")] = "ray"
    """`ray` runs clients in parallel worker processes; `in-process` runs them one after the other
    in this process, with the same results and without Ray's start of about 30 seconds."""
    address: str = ""
    """Ray cluster: HOST:PORT of its head, `auto` (the cluster of this machine) or `local` (a new
    one); empty: the environment variable RAY_ADDRESS, else `local`."""
    cpus: Annotated[int, minimum(0)] = 0
    """CPU cores of the simulation; 0: all of the machine's."""
    gpus: Annotated[int, minimum(-1)] = -1
    """GPUs of the simulation; -1: all that torch sees."""
    client_cpus: Annotated[int, minimum(1)] = 1
    """CPU cores per client."""
    client_gpus: float = -1.0
    """GPUs per client: a fraction shares one GPU (0.25: four clients), above 1 a whole number;
    -1: one per process if the simulation has any; 0: clients use the CPU."""
    client_processes: Annotated[int, minimum(1)] = 1
    """Processes per client, which divide its micro-batches and test examples; each has a GPU of its
    own if there are any. A real site sets `processes` in its node config instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.client_gpus != -1:
            at_least("simulation.client_gpus", self.client_gpus, 0)
        if self.client_gpus > 1 and self.client_gpus != int(self.client_gpus):
            raise ConfigError(
                f"`simulation.client_gpus` is {self.client_gpus} but must be whole if above 1."
            )
        if 0 < self.client_gpus < self.client_processes != 1:
            raise ConfigError(
                f"`simulation.client_gpus` is {self.client_gpus:g} but must be 0 or at least "
                f"`simulation.client_processes`, {self.client_processes}."
            )


@dataclass(frozen=True)
class RunConfig(Section, prefix="run"):
    """The run folder, restarts, and reports."""

    folder: str = ""
    """Run folder, new or empty; empty: `outputs/<name>-<time>` in the working directory."""
    restarts: Annotated[int, minimum(0)] = 3
    """Maximum number of restarts from the last checkpoint after a simulation process dies."""
    report: bool = True
    """Write the HTML report at the end of `pilot-flwr run`."""
    tensorboard: bool = True
    """Write TensorBoard files into the run folder."""
    wandb: Annotated[str, choice("off", "online", "offline")] = "off"
    """Log to Weights & Biases (pip install 'pilot-flwr[wandb]')."""
    wandb_project: Annotated[str, NAME] = "pilot-flwr"
    """Project in Weights & Biases."""


@dataclass(frozen=True)
class PilotConfig(Section, prefix=""):
    """All settings of a run, except those of a single site (its node config)."""

    name: Annotated[str, NAME] = "demo"
    """Name of the run."""
    seed: Annotated[int, minimum(0), maximum(LARGEST_SEED)] = 0
    """Seed of every random choice."""
    resume: str = ""
    """Folder of a run to resume after its last complete checkpoint; empty: a new run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.strategy, self.num_clients, len(self.data.tasks))
        check_combinations(self)
        numbers = range(self.data.clients_per_task)
        clients = [f"{task}-{number}" for task in self.data.tasks for number in numbers]
        for client, rank in self.model.lora.client_ranks.items():
            one_of("model.lora.client_ranks", client, clients)
            check_lora_rank(f"model.lora.client_ranks.{client}", rank, self)

    @property
    def num_clients(self) -> int:
        """Number of clients: `strategy.clients`, or tasks × clients per task."""
        return self.strategy.clients or len(self.data.tasks) * self.data.clients_per_task
