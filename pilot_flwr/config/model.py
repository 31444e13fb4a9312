"""Settings of the base model and of what is added to it."""

import re
from dataclasses import dataclass, field

from pilot_flwr.config.rules import at_least, one_of, positive, share
from pilot_flwr.errors import ConfigError

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")  # it is part of a path in the hub's cache


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
    folder or a Hugging Face id, of which `revision` may pin a version. `dtype` is the frozen
    base's, `adapter_dtype` that of the trained parameters (and so of what is sent).
    `initialisation` and `stage2_client_adapter` are the decisions of design section 2.

    `sent_dtype` is what trained parameters are rounded to, once, when they are sent and
    aggregated: ``bfloat16`` halves the bytes, ``same`` is the adapters' own. Training itself in
    bfloat16 (`adapter_dtype`) loses small updates, as AdamW then works on eight bits of
    precision: design section 8. Hence the defaults.

    `client_adapter=false` leaves ψ_s out of both stages: a stage-1 connector is then the base's
    projector, trained. `cross_task_adapters=false` leaves every ψ_c out of stage 2. Both are
    for ablations and baselines.

    `quantization` is ``none`` or ``4bit`` (the frozen language model in NF4, by bitsandbytes:
    ``pip install 'pilot-flwr[quantization]'``). `attention` is the implementation that
    transformers uses in the language model. `gradient_checkpointing` trades time for memory
    in training; `compile` compiles each decoder layer with torch. `system_prompt`, if any,
    begins every conversation.
    """

    path: str = "tiny-llava"
    revision: str = ""
    dtype: str = "float32"
    adapter_dtype: str = "float32"
    sent_dtype: str = "same"
    initialisation: str = "identity"
    stage2_client_adapter: str = "frozen"
    client_adapter: bool = True
    cross_task_adapters: bool = True
    quantization: str = "none"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    system_prompt: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                "`model.path` is empty but must be a shipped name, a folder or a hub id."
            )
        if self.revision and (not _REVISION.fullmatch(self.revision) or ".." in self.revision):
            raise ConfigError(
                f"`model.revision` is {self.revision!r} but must be a branch, a tag or a commit: "
                "letters, digits, '.', '_', '-' and '/', without '..'."
            )
        one_of("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        one_of("model.adapter_dtype", self.adapter_dtype, ("float32", "bfloat16"))
        one_of("model.sent_dtype", self.sent_dtype, ("same", "float32", "bfloat16"))
        one_of("model.quantization", self.quantization, ("none", "4bit"))
        one_of("model.attention", self.attention, ("sdpa", "eager", "flash_attention_2"))
        one_of("model.initialisation", self.initialisation, ("identity", "official"))
        one_of("model.stage2_client_adapter", self.stage2_client_adapter, ("frozen", "off"))

    @property
    def wire_dtype(self) -> str:
        """What is sent, aggregated and checkpointed."""
        return self.adapter_dtype if self.sent_dtype == "same" else self.sent_dtype
