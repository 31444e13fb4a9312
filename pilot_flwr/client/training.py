"""Local training of one client in one exchange: E epochs of optimizer steps.

The loss of a step is ``L = L_ce + λ0 L_d`` in stage 1 and ``L = L_ce + λ1 L_b + λ2 L_z`` in stage 2
(docs/explanation/method.md, section 2); `total_loss` applies every coefficient, once. However a
step is split into micro-batches, its gradient is that of one batch, up to rounding (`accumulate`).
With `train.loss_reduction=micro_batch`, it is the mean of the micro-batches' gradients instead.

`Proximal` adds ``μ / 2 · ‖w − w_sent‖²``, a pull towards the parameters that the server sent: for
the shared model in FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys
2020, equation 2), for the personal one in Ditto (Li et al., "Ditto: Fair and Robust Federated
Learning Through Personalization", ICML 2021, algorithm 1). Beside a received LoRA
(`PilotModel.share`), only the personal LoRA is trained.
"""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pilot_flwr.algorithm.connector import ConnectorOutput, CrossTaskMoA
from pilot_flwr.algorithm.parameter_groups import (
    GROUPS,
    Groups,
    Sharing,
    set_trainable,
    trained_groups,
)
from pilot_flwr.client.batching import optimizer_steps
from pilot_flwr.client.mutual import Distillation, Teacher
from pilot_flwr.client.optimizer import RunSchedule, make_optimizer, moments_of
from pilot_flwr.client.parallel import Ranks
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.collator import IGNORE_INDEX, Batch, Collator
from pilot_flwr.data.examples import Example
from pilot_flwr.errors import TrainingError
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.slot import Visual
from pilot_flwr.protocol import LOSSES, GroupName, Losses, TrainingResult

ALONE = Ranks()

Encoder = Callable[[Iterable[Sequence[Example]]], Iterator[Visual]]
"""Maps batches of examples to H_v of each batch's images, batch by batch."""


def train(
    model: PilotModel,
    examples: Sequence[Example],
    *,
    collator: Collator,
    encode: Encoder,
    config: TrainConfig,
    generator: torch.Generator,
    progress: Callable[[str], None],
    proximal: "Proximal | None" = None,
    run_schedule: RunSchedule | None = None,
    teacher: Teacher | None = None,
    ranks: Ranks = ALONE,
) -> TrainingResult:
    """Train the groups of the model's stage in place; of the LoRA, `config.lora_matrices`.

    `generator`, on the CPU, draws the order of examples and dropout. `progress` gets a line at most
    every `config.log_every_seconds`. `proximal` is added to the loss of every step. Without
    `run_schedule`, optimizer and learning rates begin anew. `teacher` is trained as well, in every
    step after the model, with a separate optimizer; the result is that of the model.

    Each of the `ranks` computes its share of a step's micro-batches. The gradients are then added
    up, and each rank updates its shard of the parameters, for which alone it keeps AdamW's moments
    (ZeRO stage 1: Rajbhandari et al., SC 2020). `proximal` is given in rank 0 alone, where
    `run_schedule` receives the moments of all shards.

    Raises `TrainingError` if there is no example, or the loss or a gradient is not finite,
    `StateError` if the moments of `run_schedule` do not fit.
    """
    if not examples:
        raise TrainingError("There is no training example.")
    per_step = config.batch_size * config.accumulation_steps
    num_steps = config.epochs * math.ceil(len(examples) / per_step)
    parts = Sharing(trained_lora=config.lora_matrices, trained_adapter=model.share is None)
    set_trainable(model.groups(), stage=model.stage, sharing=parts)
    meter = _Meter(model, progress, num_steps, config.log_every_seconds)
    learner = _Learner(model, config, num_steps, ranks, proximal, run_schedule)
    model.train()
    with _dropout_seed(generator, model.device, ranks.rank):
        steps = [ranks.own(step) for step in optimizer_steps(examples, config, generator)]
        visuals = encode([examples[i] for i in part] for step in steps for part in step)
        take_step: Callable[..., None] = learner.step
        if teacher is not None:
            take_step = _together(learner, teacher, num_steps)
        for step in steps:
            batches = [collator.train_batch([examples[i] for i in part]) for part in step]
            take_step(batches, [next(visuals) for _ in batches], meter.update)
    model.eval()
    if run_schedule is not None:
        shards = ranks.gather(moments_of(model, learner.optimizer), torch.device("cpu"))
        run_schedule.moments = {name: t for shard in shards for name, t in shard.items()}
    return meter.result(len(examples))


class _Learner:
    """Takes the optimizer steps of the parameters that are trained when it is made."""

    def __init__(
        self,
        model: PilotModel,
        config: TrainConfig,
        num_steps: int,
        ranks: Ranks,
        proximal: "Proximal | None" = None,
        run: RunSchedule | None = None,
    ) -> None:
        self.model, self.config, self.ranks, self.proximal = model, config, ranks, proximal
        groups = model.groups().values()
        self.trained = [p for named in groups for p in named.values() if p.requires_grad]
        self.shares = ranks.shard(self.trained)
        own = self.shares[ranks.rank]
        self.optimizer, self.schedule = make_optimizer(model, config, num_steps, run, own)

    def step(
        self,
        batches: list[Batch],
        visuals: list[Visual],
        note: Callable[[Losses], None],
        distillation: Distillation | None = None,
    ) -> None:
        """Train on one step's micro-batches; `note` gets the losses while there are gradients."""
        model, ranks = self.model, self.ranks
        losses = accumulate(model, batches, iter(visuals), self.config, ranks, distillation)
        if self.proximal is not None:
            losses += self.proximal.backpropagate()
        ranks.add_up([losses])
        ranks.add_up_gradients(self.trained)
        norms = _clip(model.groups(), self.config, stage=model.stage)
        note(_checked(losses, norms, stage=model.stage))
        self.optimizer.step()
        for rank, share in enumerate(self.shares):
            ranks.spread(share, source=rank)
        self.schedule.step()
        model.zero_grad()  # not the shard of this rank alone


def _together(learner: _Learner, teacher: Teacher, num_steps: int) -> Callable[..., None]:
    """Return a step of the model and then of its teacher, each distilled from the other before."""
    model, config = learner.model, learner.config
    with teacher.active():
        second = _Learner(model, config, num_steps, learner.ranks)

    def step(batches: list[Batch], visuals: list[Visual], note: Callable[[Losses], None]) -> None:
        with teacher.active(), torch.no_grad(), autocast(model.device, config.autocast):
            pairs = zip(batches, visuals, strict=True)
            targets = [model(batch.to(model.device), visual).logits for batch, visual in pairs]
        from_teacher = Distillation(teacher.config, targets)
        learner.step(batches, visuals, note, from_teacher)
        from_model = Distillation(teacher.config, from_teacher.logits)
        with teacher.active():
            second.step(batches, visuals, lambda losses: None, from_model)

    return step


def total_loss(ce: Tensor, connector: ConnectorOutput, config: TrainConfig) -> Tensor:
    """``L_ce + λ0 L_d + λ1 L_b + λ2 L_z``; a term that the stage lacks is zero."""
    return (
        ce
        + config.difference_loss.weight * connector.difference
        + config.balance_weight * connector.balance
        + config.z_weight * connector.z
    )


def autocast(device: torch.device, choice: str) -> contextlib.AbstractContextManager[object]:
    """Return the context for forward passes and generation that `train.autocast` chooses."""
    if choice == "bfloat16" or (choice == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def accumulate(
    model: PilotModel,
    batches: list[Batch],
    visuals: Iterator[Visual],
    config: TrainConfig,
    ranks: Ranks = ALONE,
    distillation: Distillation | None = None,
) -> Tensor:
    """Backpropagate one optimizer step's micro-batches; return its `LOSSES` in float64.

    `batches` are those of this rank; the caller adds up gradients and losses over the `ranks`.

    `visuals` yields H_v of each batch. The losses stay on the model's device: nothing here waits
    for a value.

    L_ce is averaged over the answer tokens of the whole step, L_d over its images. L_b is a product
    of two means, so it cannot be averaged over micro-batches: with several of them, the router's
    losses are computed once, over all tokens of the step. The router is linear in H_v, so this is
    cheap, and rank 0, which computes them, holds H_v of the whole step in memory.

    With `train.loss_reduction=micro_batch` each loss is averaged over a micro-batch, and the step's
    is the mean of its micro-batches'. `distillation` adds its loss, averaged like L_ce.
    """
    per_batch = config.loss_reduction == "micro_batch"
    own_tokens = sum(int((b.labels[:, 1:] != IGNORE_INDEX).sum()) for b in batches)
    step = [next(visuals) for _ in batches]
    images = [visual.weight for visual in step]
    num_batches, num_tokens, num_images = ranks.totals(len(batches), own_tokens, sum(images))
    split = num_batches > 1 and num_images > 0 and not per_batch
    router = model.connector if split and isinstance(model.connector, CrossTaskMoA) else None
    losses = torch.zeros(len(LOSSES), dtype=torch.float64, device=model.device)
    if router is not None:
        dtype = router.router.weight.dtype
        own = {str(i): v.features for i, v in enumerate(step) if len(v.features)}
        states = ranks.gather({n: f.to(model.device, dtype) for n, f in own.items()}, model.device)
        sizes = ranks.collect([n for v in step for n in v.images])
        if ranks.rank == 0:
            features = torch.cat([tensor for state in states for tensor in state.values()])
            _, balance, z = router.route(features, [n for part in sizes for n in part])
            zero = balance.new_zeros(())
            parts = ConnectorOutput(features, zero, balance, z)
            losses += _backpropagate(zero, parts, config)
    for batch, visual, count in zip(batches, step, images, strict=True):
        with autocast(model.device, config.autocast):
            output = model(batch.to(model.device), visual)
        summed = nn.functional.cross_entropy(output.logits.float(), output.labels, reduction="sum")
        share, answers = count / max(1, num_images), num_tokens
        if per_batch:
            share, answers = 1 / num_batches, num_batches * len(output.labels)
        of_router = share if router is None else 0.0
        out = output.connector
        parts = ConnectorOutput(
            out.features, share * out.difference, of_router * out.balance, of_router * out.z
        )
        more: dict[str, Tensor] = {}
        if distillation is not None:
            more["distillation"] = distillation.loss(output.logits) / answers
        losses += _backpropagate(summed / answers, parts, config, **more)
    return losses


def _backpropagate(
    ce: Tensor, parts: ConnectorOutput, config: TrainConfig, **more: Tensor
) -> Tensor:
    """Backpropagate the total loss; the terms `more` have their coefficients."""
    loss = total_loss(ce, parts, config)
    for term in more.values():
        loss = loss + term
    loss.backward()  # type: ignore[no-untyped-call]
    router = {"balance": parts.balance, "z": parts.z}
    return _losses(total=loss, ce=ce, difference=parts.difference, **router, **more)


def _losses(**values: Tensor) -> Tensor:
    """Stack detached losses in the order of `LOSSES`, as float64; missing ones are zero."""
    zero = values["total"].new_zeros(())
    return torch.stack([values.get(name, zero).detach().double() for name in LOSSES])


class Proximal:
    """``weight / 2 · ‖w − anchor‖²``; the anchor is the parameters' present value."""

    def __init__(self, parameters: Iterable[nn.Parameter], weight: float) -> None:
        self.weight = weight
        self.anchored = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def backpropagate(self) -> Tensor:
        """Add the term's gradient to the parameters'; return its `LOSSES` in float64."""
        squares = [
            (parameter.float() - anchor.float()).square().sum()
            for parameter, anchor in self.anchored
        ]
        loss = 0.5 * self.weight * torch.stack(squares).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return _losses(total=loss, proximal=loss)


def sent_parameters(
    model: PilotModel, sharing: Sharing, groups: Collection[GroupName] = tuple(GROUPS)
) -> list[nn.Parameter]:
    """Return w of `Proximal`: the parameters of `groups` that are sent and trained."""
    return [
        parameter
        for group, named in model.groups().items()
        for name, parameter in named.items()
        if group in groups and sharing.sends(group, name) and sharing.trains(group, name)
    ]


def check_finite(model: PilotModel) -> None:
    """Raise `TrainingError` if a trained tensor holds NaN or Inf."""
    groups = model.groups()
    for group in trained_groups(model.stage):
        for name, parameter in groups[group].items():
            if not torch.isfinite(parameter).all():
                raise _diverged(f"After training, `{name}` of {group} is not finite", model.stage)


def _clip(groups: Groups, config: TrainConfig, *, stage: int) -> dict[str, Tensor]:
    """Clip gradients to a norm of `config.max_grad_norm`; return the norms before, by name.

    By default each trained group is clipped separately: the normalized difference loss does not
    depend on the scale of x_s, so its gradient grows as 1/‖x_s‖, and x_s is zero after identity
    initialisation. Clipped together with the other groups, ψ_s would shrink their gradients by an
    order of magnitude.
    """
    parts = {str(group): list(groups[group].values()) for group in trained_groups(stage)}
    if config.clipping == "global":
        parts = {"all trained parameters": [p for part in parts.values() for p in part]}
    return {
        name: nn.utils.clip_grad_norm_(part, config.max_grad_norm) for name, part in parts.items()
    }


def _checked(losses: Tensor, norms: dict[str, Tensor], *, stage: int) -> Losses:
    """Return the losses by name; raise if the total or a gradient's norm is not finite.

    Nothing else in a step waits for the device: all numbers are copied together.
    """
    # Without a gradient, as of a connector that saw only text, the norm is a zero on the CPU.
    found_norms = torch.stack([norm.to(losses.device) for norm in norms.values()])
    values = torch.cat([losses, found_norms.double()]).tolist()
    found = dict(zip(LOSSES, values[: len(LOSSES)], strict=True))
    if not math.isfinite(found["total"]):
        raise _diverged(f"The loss is {found['total']}", stage)
    for group, norm in zip(norms, values[len(LOSSES) :], strict=True):
        if not math.isfinite(norm):
            raise _diverged(f"The norm of the gradient of {group} is {norm}", stage)
    return found


def _diverged(problem: str, stage: int) -> TrainingError:
    return TrainingError(
        f"{problem} in stage {stage}; lower `train.stage{stage}.lora_lr` or `.connector_lr`, "
        "or `train.lr_scale`."
    )


@contextlib.contextmanager
def _dropout_seed(generator: torch.Generator, device: torch.device, rank: int) -> Iterator[None]:
    """Seed torch's global generators, which dropout uses, during this training only."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        yield


class _Meter:
    """Accumulates losses, gradient counts and time, and reports progress."""

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
        """Count one step's losses and gradients, before the gradients are cleared."""
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
        """Return the means over all steps and the wall time."""
        return TrainingResult(
            losses={name: value / self.steps for name, value in self.sums.items()},
            steps=self.steps,
            examples=num_examples,
            seconds=time.perf_counter() - self.started,
            gradients=self.gradients,
        )
