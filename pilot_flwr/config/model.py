"""Settings of the base model and its adapters: ``model.*``."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from pilot_flwr.config.rules import FRACTION, NOT_EMPTY, POSITIVE, Section, choice, minimum
from pilot_flwr.errors import ConfigError

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")  # it is part of a path in the hub's cache
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig(Section, prefix="model.lora"):
    """The text adapter Θ_l: a LoRA in the frozen language model."""

    rank: Annotated[int, minimum(1)] = 8
    """Rank r of the LoRA matrices."""
    alpha: Annotated[float, POSITIVE] = 16.0
    """Scale α; the LoRA's output is multiplied by α / r."""
    dropout: Annotated[float, FRACTION] = 0.0
    """Dropout on the LoRA's input in training."""
    targets: Annotated[list[str], NOT_EMPTY] = field(default_factory=lambda: list(_LORA_TARGETS))
    """Linear layers of a decoder layer that get a LoRA."""
    client_ranks: dict[str, int] = field(default_factory=dict)
    """Smaller LoRA ranks of single clients in a simulation, as in
    `+model.lora.client_ranks={vqa-0:4}`; the scale remains the federation's α / r. A real site sets
    `lora-rank` in its node config instead."""


@dataclass(frozen=True)
class FeatureCacheConfig(Section, prefix="model.feature_cache"):
    """Cache of the frozen vision tower's features."""

    where: Annotated[str, choice("memory", "disk", "off")] = "memory"
    """Location of the cached features; on `disk`, runs share them by image content."""
    max_gib: Annotated[float, POSITIVE] = 1.0
    """Size limit in GiB, per process in memory and per folder on disk, where entries of earlier
    runs are pruned first; further images are encoded each time. A site may set a lower limit."""


@dataclass(frozen=True)
class ModelConfig(Section, prefix="model"):
    """The base model and the adapters added to it.

    `initialisation` and `stage2_client_adapter` settle points that the paper leaves open.
    `adapter_dtype` is float32 by default because AdamW in bfloat16, with eight bits of precision,
    loses small updates; `sent_dtype` rounds once, when parameters are sent.
    """

    path: Annotated[str, NOT_EMPTY] = "tiny-llava"
    """Base model: a shipped name (tiny-llava), a local folder or a Hugging Face id."""
    revision: str = ""
    """Branch, tag or commit of a Hugging Face model; empty: its default branch."""
    dtype: Annotated[str, choice("float32", "bfloat16", "float16")] = "float32"
    """Data type of the frozen base model."""
    adapter_dtype: Annotated[str, choice("float32", "bfloat16")] = "float32"
    """Data type of the trained parameters."""
    sent_dtype: Annotated[str, choice("same", "float32", "bfloat16", "int8", "int4")] = "same"
    """Data type in which parameters are sent and aggregated; `same` is `model.adapter_dtype`. With
    `int8` and `int4` it is bfloat16, and clients upload their change in 8 or 4 bits."""
    initialisation: Annotated[str, choice("identity", "official")] = "identity"
    """Start of new adapters: `identity` keeps the base model's output, `official` copies the
    pretrained projector into every adapter."""
    stage2_client_adapter: Annotated[str, choice("frozen", "off")] = "frozen"
    """The client adapter ψ_s in stage 2: added but not trained, or left out."""
    client_adapter: bool = True
    """Use the client adapter ψ_s; without it stage 1 trains the base's projector."""
    cross_task_adapters: bool = True
    """Use the cross-task adapters ψ_c in stage 2."""
    router_dtype: Annotated[str, choice("float32", "bfloat16")] = "float32"
    """Data type of the router's logits, probabilities and losses in stage 2; the official code
    trains all in bfloat16."""
    quantization: Annotated[str, choice("none", "4bit")] = "none"
    """Quantisation of the frozen language model; `4bit` is NF4 by bitsandbytes
    (pip install 'pilot-flwr[quantization]')."""
    device_map: Annotated[str, choice("single", "auto")] = "single"
    """`auto` spreads the layers of the base model over all GPUs that a client sees; `single` uses
    one."""
    attention: Annotated[str, choice("sdpa", "eager", "flash_attention_2")] = "sdpa"
    """Attention implementation of the language model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile each decoder layer with torch.compile."""
    system_prompt: str = ""
    """Text at the start of every conversation; empty: none."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.revision and (not _REVISION.fullmatch(self.revision) or ".." in self.revision):
            raise ConfigError(
                f"`model.revision` is {self.revision!r} but must be a branch, a tag or a commit: "
                "letters, digits, '.', '_', '-' and '/', without '..'."
            )
        if self.revision and ("/" not in self.path or self.path.startswith(("/", ".", "~"))):
            raise ConfigError(
                f"`model.revision` is {self.revision!r} but must be empty with `model.path` "
                f"{self.path!r}, which is not a model on the Hugging Face hub."
            )

    @property
    def wire_dtype(self) -> str:
        """Data type of parameters that are sent, aggregated and checkpointed."""
        if self.upload_bits:
            return "bfloat16"
        return self.adapter_dtype if self.sent_dtype == "same" else self.sent_dtype

    @property
    def upload_bits(self) -> int:
        """Bits per parameter of a compressed upload, 0 if uploads are not compressed."""
        return {"int8": 8, "int4": 4}.get(self.sent_dtype, 0)
