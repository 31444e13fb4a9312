"""Settings of client-level differential privacy; what they mean is in docs/privacy.md.

The server's settings: rounds, aggregation, what it waits for and what it accepts.

Typed, frozen, validated settings: every default and every range of the configuration.

The model's and the data's are in `pilot_flwr.config.model` and `pilot_flwr.config.data`. To
add a setting, add a field and, if it has a rule, a check in ``__post_init__``. Named choices
live in ``conf/``; `pilot_flwr.config.loading` composes both (design section 7).
"""

from dataclasses import dataclass, field

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.rules import (
    at_least,
    at_most,
    check_name,
    check_together,
    one_of,
    positive,
    share,
)
from pilot_flwr.errors import ConfigError

LEAST_NOISE, MOST_NOISE = 1e-6, 1e6
"""Range of `privacy.noise_multiplier`: at either end one upload's ε, at δ = 1e-5, is 2e12 or 0."""


@dataclass(frozen=True)
class PrivacyConfig:
    """Client-level differential privacy: each client clips its upload and adds noise itself.

    The change of Θ_a and Θ_l that a client uploads is clipped, as one vector, to L2 norm
    `clip_norm`; then Gaussian noise of standard deviation `noise_multiplier` × `clip_norm` is
    added to every number of it; `noise_multiplier` is `LEAST_NOISE` at least and `MOST_NOISE` at
    most. `delta` is the δ for which ε is reported. Losses and scores are
    exact functions of the client's data and are outside that guarantee: with
    `send_metrics` false no client sends any.
    """

    enabled: bool = False
    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    send_metrics: bool = False

    def __post_init__(self) -> None:
        positive("privacy.clip_norm", self.clip_norm)
        at_least("privacy.noise_multiplier", self.noise_multiplier, LEAST_NOISE)
        at_most("privacy.noise_multiplier", self.noise_multiplier, MOST_NOISE)
        positive("privacy.delta", self.delta)
        share("privacy.delta", self.delta)

    @property
    def withholds_metrics(self) -> bool:
        """Whether losses and scores stay at the client."""
        return self.enabled and not self.send_metrics


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


LARGEST_SEED = 2**63 - 1
"""What torch's and numpy's generators both take."""


@dataclass(frozen=True)
class StageConfig:
    """Learning rates of one stage, for the LoRA and for the connector."""

    lora_lr: float = 2e-3
    connector_lr: float = 1e-3


@dataclass(frozen=True)
class DifferenceLossConfig:
    """Weight λ0 and reduction of the difference loss (design section 2)."""

    weight: float = 0.1
    reduction: str = "normalized"

    def __post_init__(self) -> None:
        at_least("train.difference_loss.weight", self.weight, 0)
        one_of(
            "train.difference_loss.reduction",
            self.reduction,
            ("normalized", "frobenius", "official"),
        )


@dataclass(frozen=True)
class DittoConfig:
    """A personal model beside the shared one (Ditto: Li et al., ICML 2021).

    With `enabled` a client trains two models in a turn, half of the epochs each: the shared
    one, and a personal one that is drawn to the shared one it was sent by
    ``weight / 2 · ‖v − w‖²`` and never leaves the client, which is evaluated by it.
    """

    enabled: bool = False
    weight: float = 0.1

    def __post_init__(self) -> None:
        at_least("train.ditto.weight", self.weight, 0)


@dataclass(frozen=True)
class TrainConfig:
    """Local training on a client: `epochs` is the paper's E.

    `balance_weight` is λ1, `z_weight` is λ2. An optimizer step uses `batch_size` ×
    `accumulation_steps` examples. The gradient of each parameter group is clipped to
    `max_grad_norm` by itself. `autocast` is ``auto`` (bfloat16 on a GPU, off on a CPU),
    ``bfloat16`` or ``off``, in evaluation as in training.

    `lr_scale` multiplies every learning rate. `lora_matrices` is what of the LoRA is trained:
    ``AB``, or ``B`` (A stays as drawn: FFA-LoRA). `proximal_weight` is FedProx's μ: μ / 2 ·
    ‖w − w_sent‖² over what the client was sent and trains is added to the loss; 0 leaves it out.
    """

    epochs: int = 1
    batch_size: int = 16
    accumulation_steps: int = 1
    max_length: int = 2048
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    autocast: str = "auto"
    log_every_seconds: float = 30.0
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=StageConfig)
    difference_loss: DifferenceLossConfig = field(default_factory=DifferenceLossConfig)
    balance_weight: float = 0.1
    z_weight: float = 0.01
    lr_scale: float = 1.0
    lora_matrices: str = "AB"
    proximal_weight: float = 0.0
    ditto: DittoConfig = field(default_factory=DittoConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation_steps", "max_length"):
            at_least(f"train.{name}", getattr(self, name), 1)
        share("train.warmup_ratio", self.warmup_ratio)
        at_least("train.weight_decay", self.weight_decay, 0)
        positive("train.max_grad_norm", self.max_grad_norm)
        one_of("train.autocast", self.autocast, ("auto", "bfloat16", "off"))
        positive("train.log_every_seconds", self.log_every_seconds)
        at_least("train.balance_weight", self.balance_weight, 0)
        at_least("train.z_weight", self.z_weight, 0)
        positive("train.lr_scale", self.lr_scale)
        one_of("train.lora_matrices", self.lora_matrices, ("AB", "B"))
        at_least("train.proximal_weight", self.proximal_weight, 0)
        if self.ditto.enabled and self.epochs % 2:
            raise ConfigError(
                f"`train.epochs` is {self.epochs} but must be even with `train.ditto.enabled`, "
                "which gives half of them to each of two models."
            )
        for stage in (1, 2):
            for name in ("lora_lr", "connector_lr"):
                positive(f"train.stage{stage}.{name}", getattr(self.stage(stage), name))

    def stage(self, stage: int) -> StageConfig:
        """Learning rates of `stage` (1 or 2), as they are configured."""
        return self.stage1 if stage == 1 else self.stage2


@dataclass(frozen=True)
class EvaluationConfig:
    """Federated evaluation of the personalised models by greedy generation."""

    enabled: bool = True
    batch_size: int = 64
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        at_least("evaluation.batch_size", self.batch_size, 1)
        at_least("evaluation.max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True)
class SimulationConfig:
    """Resources of Flower's simulation engine, which Ray shares out among the clients.

    `engine` is ``ray``, or ``in-process``: the clients of one run one after the other in a single
    process, without Flower's and Ray's start of about half a minute, with the same results.

    `cpus` is the number of CPU cores that the simulation takes; 0 takes all of the machine's.
    `gpus` is the number of its GPUs: -1 takes all that torch sees, 0 none. `client_cpus` and
    `client_gpus` are one client's part, and so say how many clients train at a time.
    `client_gpus` may be a fraction (0.25: four clients on one GPU, whose memory they share) or
    a whole number; -1 is one GPU per client if the simulation has any, 0 hides the GPUs from
    the clients, which then use the CPU.

    `address` is HOST:PORT of an existing Ray cluster's head, ``auto`` (the cluster that this
    machine is a node of) or ``local`` (a Ray of the run's own); empty is what the environment
    variable ``RAY_ADDRESS`` says, else ``local``. A cluster is used whole: `cpus` and `gpus`
    stay at their defaults.
    """

    engine: str = "ray"
    address: str = ""
    cpus: int = 0
    gpus: int = -1
    client_cpus: int = 1
    client_gpus: float = -1.0

    def __post_init__(self) -> None:
        one_of("simulation.engine", self.engine, ("ray", "in-process"))
        at_least("simulation.cpus", self.cpus, 0)
        at_least("simulation.gpus", self.gpus, -1)
        at_least("simulation.client_cpus", self.client_cpus, 1)
        if self.client_gpus != -1:
            at_least("simulation.client_gpus", self.client_gpus, 0)
        if self.client_gpus > 1 and self.client_gpus != int(self.client_gpus):
            raise ConfigError(
                f"`simulation.client_gpus` is {self.client_gpus} but must be a whole number if "
                "above 1."
            )


@dataclass(frozen=True)
class RunConfig:
    """The run folder; empty means ``outputs/<name>-<time>`` beside where the user stands.

    `restarts` is how often at most ``pilot-flwr run`` goes on by itself from the last checkpoint
    when a worker process of Ray or the whole simulation has died.

    `report` says whether ``pilot-flwr run`` writes the report at the end. `tensorboard` and
    `wandb` are live logs of the server: TensorBoard's files in the run folder, and Weights & Biases
    (``pip install 'pilot-flwr[wandb]'``), which is ``off``, ``online`` or ``offline``; its project
    is `wandb_project`.
    """

    folder: str = ""
    restarts: int = 3
    report: bool = True
    tensorboard: bool = True
    wandb: str = "off"
    wandb_project: str = "pilot-flwr"

    def __post_init__(self) -> None:
        at_least("run.restarts", self.restarts, 0)
        one_of("run.wandb", self.wandb, ("off", "online", "offline"))
        check_name("run.wandb_project", self.wandb_project)


@dataclass(frozen=True)
class PilotConfig:
    """Everything that a run depends on, except what belongs to one client's own site.

    `resume` is the folder of a run that is to go on after its last whole checkpoint.
    """

    name: str = "demo"
    seed: int = 0
    resume: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_name("name", self.name)
        at_least("seed", self.seed, 0)
        at_most("seed", self.seed, LARGEST_SEED)
        if self.strategy.min_replies > self.num_clients:
            raise ConfigError(
                f"`strategy.min_replies` is {self.strategy.min_replies} but must be at most "
                f"the number of clients, {self.num_clients}."
            )
        check_together(self)

    @property
    def num_clients(self) -> int:
        """Clients of the federation: `strategy.clients`, or tasks × clients per task."""
        return self.strategy.clients or len(self.data.tasks) * self.data.clients_per_task
