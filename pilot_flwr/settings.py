"""Typed, frozen, validated settings: every default and every range of the configuration.

To add a setting, add a field and, if it has a rule, a check in ``__post_init__``. Named
choices live in ``conf/``; `pilot_flwr.config` composes both (design section 7).
"""

from dataclasses import dataclass, field

from pilot_flwr.checks import at_least, at_most, check_name, one_of, positive, share
from pilot_flwr.errors import ConfigError

LARGEST_SEED = 2**63 - 1
"""What torch's and numpy's generators both take."""


@dataclass(frozen=True)
class LoraConfig:
    """The text adapter Θ_l: a LoRA in the frozen language model.

    `targets` are the names of the linear layers within a decoder layer that get a LoRA.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    )

    def __post_init__(self) -> None:
        at_least("model.lora.rank", self.rank, 1)
        positive("model.lora.alpha", self.alpha)
        share("model.lora.dropout", self.dropout)
        if not self.targets:
            raise ConfigError("`model.lora.targets` is empty but must name at least one layer.")


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Where the frozen vision tower's features are kept: `memory`, `disk` or `off`.

    `max_gib` bounds the kept features in GiB, in memory per process and on disk per client;
    images beyond it are encoded again whenever they are needed.
    """

    where: str = "memory"
    max_gib: float = 1.0

    def __post_init__(self) -> None:
        one_of("model.feature_cache.where", self.where, ("memory", "disk", "off"))
        positive("model.feature_cache.max_gib", self.max_gib)


@dataclass(frozen=True)
class ModelConfig:
    """The base model and what is added to it.

    `path` is the name of a checkpoint shipped with the package (``tiny-llava``), a local
    folder or a Hugging Face id. `dtype` is the frozen base's, `adapter_dtype` that of the
    trained parameters (and so of what is sent). `initialisation` and
    `stage2_client_adapter` are the decisions of design section 2.

    ``adapter_dtype=bfloat16`` halves what is sent, but AdamW then works on bfloat16 parameters
    directly, whose eight bits of precision lose small updates: design section 8. Hence the
    default.
    """

    path: str = "tiny-llava"
    dtype: str = "float32"
    adapter_dtype: str = "float32"
    initialisation: str = "identity"
    stage2_client_adapter: str = "frozen"
    lora: LoraConfig = field(default_factory=LoraConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                "`model.path` is empty but must be a shipped name, a folder or a hub id."
            )
        one_of("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        one_of("model.adapter_dtype", self.adapter_dtype, ("float32", "bfloat16"))
        one_of("model.initialisation", self.initialisation, ("identity", "official"))
        one_of("model.stage2_client_adapter", self.stage2_client_adapter, ("frozen", "off"))


@dataclass(frozen=True)
class DataConfig:
    """The federation's tasks and clients: `clients_per_task` clients for every task.

    `train_examples` is the mean number of training examples of a client (clients differ),
    `test_examples` the number of test examples of each client.
    """

    source: str = "digits"
    tasks: list[str] = field(default_factory=lambda: ["vqa", "counting", "captioning"])
    clients_per_task: int = 3
    train_examples: int = 200
    test_examples: int = 60

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("digits",))
        if not self.tasks:
            raise ConfigError("`data.tasks` is empty but must name at least one task.")
        for task in self.tasks:
            check_name("data.tasks", task)
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"`data.tasks` is {self.tasks} but must not name a task twice.")
        at_least("data.clients_per_task", self.clients_per_task, 1)
        at_least("data.train_examples", self.train_examples, 1)
        at_least("data.test_examples", self.test_examples, 1)


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
class TrainConfig:
    """Local training on a client: `epochs` is the paper's E.

    `balance_weight` is λ1, `z_weight` is λ2. An optimizer step uses `batch_size` ×
    `accumulation_steps` examples. The gradient of each parameter group is clipped to
    `max_grad_norm` by itself. `autocast` is ``auto`` (bfloat16 on a GPU, off on a CPU),
    ``bfloat16`` or ``off``, in evaluation as in training.
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
        for stage in (1, 2):
            for name in ("lora_lr", "connector_lr"):
                positive(f"train.stage{stage}.{name}", getattr(self.stage(stage), name))

    def stage(self, stage: int) -> StageConfig:
        """Learning rates of `stage` (1 or 2)."""
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

    `cpus` is the number of CPU cores that the simulation takes; 0 takes all of the machine's.
    `gpus` is the number of its GPUs: -1 takes all that torch sees, 0 none. `client_cpus` and
    `client_gpus` are one client's part, and so say how many clients train at a time.
    `client_gpus` may be a fraction (0.25: four clients on one GPU, whose memory they share) or
    a whole number; -1 is one GPU per client if the simulation has any, 0 hides the GPUs from
    the clients, which then use the CPU.
    """

    cpus: int = 0
    gpus: int = -1
    client_cpus: int = 1
    client_gpus: float = -1.0

    def __post_init__(self) -> None:
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
    """The run folder; empty means ``outputs/<name>-<time>`` beside where the user stands."""

    folder: str = ""


@dataclass(frozen=True)
class PilotConfig:
    """Everything that a run depends on, except what belongs to one client's own site."""

    name: str = "demo"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
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

    @property
    def num_clients(self) -> int:
        """Clients of the federation: tasks × clients per task."""
        return len(self.data.tasks) * self.data.clients_per_task
