"""Settings of local training: typed, frozen and validated."""

from dataclasses import dataclass, field
from typing import Annotated

from pilot_flwr.config.rules import FRACTION, PART, POSITIVE, Section, check_limits, choice, minimum
from pilot_flwr.errors import ConfigError


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
class PersonalConfig(Section, prefix="train.personal"):
    """A personal model at every client, which never leaves it and by which the client is scored.

    A client trains the shared model and the personal one in an exchange, for half of the epochs
    each. With Θ̄ as the client received it, the personal parameters v minimise
    ``loss + pull / 2 · ‖v − Θ̄‖²``.
    """

    model: Annotated[str, choice("none", "whole", "beside")] = "none"
    """`whole`: a connector and a LoRA in place of the shared ones (Ditto); `beside`: a LoRA beside
    the received one, with the received connector (FedDPA, FedDAT). Needs an even `train.epochs`."""
    pull: Annotated[float, minimum(0)] = 0.0
    """Weight of the pull towards the received parameters (Ditto's λ)."""
    share: Annotated[float, PART] = 0.5
    """Weight of the personal LoRA; the received one has the rest."""
    weighting: Annotated[str, choice("fixed", "similarity")] = "fixed"
    """Weight of the personal LoRA in evaluation: `fixed` at `share`, or for every question `share`
    times its mean `similarity` to training examples of the client (FedDPA)."""
    instances: Annotated[int, minimum(1)] = 5
    """Number of these training examples."""
    distillation: Annotated[float, minimum(0)] = 0.0
    """Weight β of mutual distillation: both models are trained in every step, each also on the
    other's probabilities (FedDAT); 0: one is trained after the other."""
    temperature: Annotated[float, POSITIVE] = 3.0
    """Temperature T of the probabilities."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation > 0 and self.pull > 0:
            raise ConfigError(
                f"`train.personal.pull` is {self.pull:g} but must be 0 with "
                f"`train.personal.distillation={self.distillation:g}`, which pulls both models "
                "together."
            )

    @property
    def by_question(self) -> bool:
        """Whether every question has its own weight."""
        return self.model == "beside" and self.weighting == "similarity"

    @property
    def mutual(self) -> bool:
        """Whether both models are trained in every step."""
        return self.model == "beside" and self.distillation > 0


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
    personal: PersonalConfig = field(default_factory=PersonalConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self.stage1, "train.stage1")
        check_limits(self.stage2, "train.stage2")
        if self.personal.model != "none" and self.epochs % 2:
            raise ConfigError(
                f"`train.epochs` is {self.epochs} but must be even with "
                f"`train.personal.model={self.personal.model}`, which gives half of them to each "
                "of two models."
            )

    def stage(self, stage: int) -> StageConfig:
        """Return the configured learning rates of `stage` (1 or 2)."""
        return self.stage1 if stage == 1 else self.stage2
