"""Local training of one client for one round: E epochs of mini-batches.

The loss and the gradients of an optimizer step are in `pilot_flwr.client.accumulation`. Gradients
are clipped to `train.max_grad_norm` group by group (those of `pilot_flwr.model.parameters`), see
`_clip`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from pilot_flwr.client.accumulation import LOSSES, Losses, accumulate, autocast, total_loss
from pilot_flwr.client.proximal import Proximal
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.examples import Example
from pilot_flwr.errors import TrainingError
from pilot_flwr.model.architectures import Visual
from pilot_flwr.model.parameters import (
    GroupName,
    Groups,
    Sharing,
    set_trainable,
    trained_groups,
)
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.settings.pilot import TrainConfig

__all__ = [
    "LOSSES",
    "Encoder",
    "Losses",
    "TrainingResult",
    "autocast",
    "check_finite",
    "total_loss",
    "train",
]

Encoder = Callable[[Iterable[Sequence[Example]]], Iterator[Visual]]
"""From batches of examples to H_v of each batch's images, one batch after the other."""


@dataclass(frozen=True)
class TrainingResult:
    """What happened in one local training.

    Attributes
    ----------
    losses : Losses
        All of `LOSSES`.
    steps, examples : int
        Optimizer steps taken; examples of the data set (not times epochs).
    seconds : float
        Wall time.
    gradients : dict
        Group → number of its parameters (elements) that received a gradient.
    """

    losses: Losses
    steps: int
    examples: int
    seconds: float
    gradients: dict[GroupName, int]


def train(
    model: PilotModel,
    examples: Sequence[Example],
    *,
    collator: Collator,
    encode: Encoder,
    config: TrainConfig,
    generator: torch.Generator,
    progress: Callable[[str], None],
    proximal: Proximal | None = None,
) -> TrainingResult:
    """Train what the model's stage trains, in place; of the LoRA, `config.lora_matrices`.

    Parameters
    ----------
    model : PilotModel
        In the stage to train, with all states loaded.
    examples : sequence of Example
        The client's training split.
    collator, encode
        Make token tensors and visual features of examples.
    config : TrainConfig
        Epochs, batches, optimizer, coefficients.
    generator : torch.Generator
        CPU generator of the order of examples and of dropout.
    progress : callable
        Gets a line now and then, at most every `config.log_every_seconds`.
    proximal : Proximal, optional
        Added to the loss of every optimizer step.

    Raises
    ------
    TrainingError
        There is no example, or the loss or a gradient is not finite.
    """
    if not examples:
        raise TrainingError("There is no training example.")
    per_step = config.batch_size * config.accumulation_steps
    num_steps = config.epochs * math.ceil(len(examples) / per_step)
    parts = Sharing(trained_lora=config.lora_matrices)
    set_trainable(model.groups(), stage=model.stage, sharing=parts)
    meter = _Meter(model, progress, num_steps, config.log_every_seconds)
    optimizer, schedule = _optimizer(model, config, num_steps)
    model.train()
    with _dropout_seed(generator, model.device):
        steps = _steps(len(examples), config, generator)
        visuals = encode([examples[i] for i in part] for step in steps for part in step)
        for step in steps:
            batches = [collator.train_batch([examples[i] for i in part]) for part in step]
            losses = accumulate(model, batches, visuals, config)
            if proximal is not None:
                losses += proximal.backpropagate()
            norms = _clip(meter.groups, config.max_grad_norm, stage=model.stage)
            meter.update(_checked(losses, norms, stage=model.stage))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    return meter.result(len(examples))


def check_finite(model: PilotModel) -> None:
    """Check what the model's stage has trained, before it is kept or sent.

    Raises
    ------
    TrainingError
        A trained tensor holds NaN or Inf.
    """
    groups = model.groups()
    for group in trained_groups(model.stage):
        for name, parameter in groups[group].items():
            if not torch.isfinite(parameter).all():
                raise _diverged(f"After training, `{name}` of {group} is not finite", model.stage)


def _optimizer(
    model: PilotModel, config: TrainConfig, num_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with one learning rate for the LoRA and one for the connector, cosine to zero."""
    rates = config.stage(model.stage)
    groups = model.groups()
    lora = [p for p in groups["lora"].values() if p.requires_grad]
    connector = [p for g in trained_groups(model.stage) if g != "lora" for p in groups[g].values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": config.lr_scale * rates.lora_lr},
            {"params": connector, "lr": config.lr_scale * rates.connector_lr},
        ],
        weight_decay=config.weight_decay,
        # The other way on a GPU has temporary tensors as large as all that is trained.
        fused=True if model.device.type == "cuda" else None,
    )
    # Rounded down: transformers' warm-up begins at rate zero, which would waste the only step
    # of a very short training.
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, int(config.warmup_ratio * num_steps), num_steps
    )
    return optimizer, schedule


def _clip(groups: Groups, max_norm: float, *, stage: int) -> dict[GroupName, Tensor]:
    """Scale the gradient of each trained group to a norm of at most `max_norm`, by itself.

    The normalized difference loss does not depend on the scale of x_s, so its gradient grows
    as 1/‖x_s‖, and after identity initialisation x_s begins at zero. Clipped together, ψ_s
    would shrink the gradients of Θ_l and ψ_t with its own, by an order of magnitude.

    Returns the norms before, by group.
    """
    return {
        group: nn.utils.clip_grad_norm_(groups[group].values(), max_norm)
        for group in trained_groups(stage)
    }


def _checked(losses: Tensor, norms: dict[GroupName, Tensor], *, stage: int) -> Losses:
    """Return the losses by name, unless one or a gradient is not finite.

    The one place of a step that waits for the device: all its numbers come over together.
    """
    # Without a gradient, as for a connector that saw text alone, a norm is a zero on the CPU.
    found_norms = torch.stack([norm.to(losses.device) for norm in norms.values()])
    values = torch.cat([losses, found_norms.double()]).tolist()
    found = dict(zip(LOSSES, values[: len(LOSSES)], strict=True))
    if not math.isfinite(found["total"]):
        raise _diverged(f"The loss is {found['total']}", stage)
    for group, norm in zip(norms, values[len(LOSSES) :], strict=True):
        if not math.isfinite(norm):
            raise _diverged(f"The norm of the gradient of {group} is {norm}", stage)
    return found


def _diverged(what: str, stage: int) -> TrainingError:
    return TrainingError(
        f"{what} in stage {stage}; lower `train.stage{stage}.lora_lr` or `.connector_lr`, "
        "or `train.lr_scale`."
    )


def _steps(
    num_examples: int, config: TrainConfig, generator: torch.Generator
) -> list[list[list[int]]]:
    """Return the micro-batches of every optimizer step of every epoch, in random order."""
    steps = []
    for _ in range(config.epochs):
        order = torch.randperm(num_examples, generator=generator).tolist()
        parts = [
            order[start : start + config.batch_size]
            for start in range(0, num_examples, config.batch_size)
        ]
        steps += [
            parts[start : start + config.accumulation_steps]
            for start in range(0, len(parts), config.accumulation_steps)
        ]
    return steps


@contextlib.contextmanager
def _dropout_seed(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators, which dropout uses, for this training alone."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Meter:
    """Means of the losses, what had gradients, the time, and a progress line now and then."""

    def __init__(
        self, model: PilotModel, progress: Callable[[str], None], num_steps: int, every: float
    ) -> None:
        self.groups = model.groups()
        self.progress, self.num_steps, self.every = progress, num_steps, every
        self.sums: Losses = {}
        self.steps = 0
        self.gradients: dict[GroupName, int] = {}
        self.started = self.last = time.perf_counter()

    def update(self, losses: Losses) -> None:
        """Note one step's losses and gradients, before they are cleared."""
        self.steps += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for group, parameters in self.groups.items():
            count = sum(p.numel() for p in parameters.values() if p.grad is not None)
            self.gradients[group] = max(count, self.gradients.get(group, 0))
        if time.perf_counter() - self.last >= self.every:
            self.last = time.perf_counter()
            self.progress(f"step {self.steps}/{self.num_steps}, loss {losses['total']:.4f}")

    def result(self, num_examples: int) -> TrainingResult:
        """Return the means over all steps, and the time since this meter was made."""
        return TrainingResult(
            losses={name: value / self.steps for name, value in self.sums.items()},
            steps=self.steps,
            examples=num_examples,
            seconds=time.perf_counter() - self.started,
            gradients=self.gradients,
        )
