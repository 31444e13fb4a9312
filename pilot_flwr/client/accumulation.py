"""One optimizer step's loss and gradients, over as many micro-batches as memory asks for.

``L = L_ce + λ0 L_d`` in stage 1 and ``L = L_ce + λ1 L_b + λ2 L_z`` in stage 2 (design section
2); every coefficient is applied here, once, in `total_loss`. However a step is split, its gradient
is that of one batch, up to rounding: see `accumulate`.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pilot_flwr.connector import ConnectorOutput, CrossTaskMoA
from pilot_flwr.data.collator import IGNORE_INDEX, Batch
from pilot_flwr.losses import load_balancing_loss, router_z_loss
from pilot_flwr.model.architectures import Visual
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.settings.pilot import TrainConfig

LOSSES = ("total", "ce", "difference", "balance", "z", "proximal")
"""Names of the losses: the total with, its parts without coefficients."""

Losses = dict[str, float]
"""Mean over the optimizer steps, by name."""


def total_loss(ce: Tensor, connector: ConnectorOutput, config: TrainConfig) -> Tensor:
    """``L_ce + λ0 L_d + λ1 L_b + λ2 L_z``; the parts that a stage does not have are zero."""
    return (
        ce
        + config.difference_loss.weight * connector.difference
        + config.balance_weight * connector.balance
        + config.z_weight * connector.z
    )


def autocast(device: torch.device, choice: str) -> contextlib.AbstractContextManager[object]:
    """Return the context for forward passes and generation that `train.autocast` chooses."""
    enabled = choice == "bfloat16" or (choice == "auto" and device.type == "cuda")
    if not enabled:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def accumulate(
    model: PilotModel, batches: list[Batch], visuals: Iterator[Visual], config: TrainConfig
) -> Tensor:
    """Backpropagate one optimizer step's micro-batches; return its losses, float64.

    Parameters
    ----------
    model : PilotModel
        Its gradients are added to.
    batches : list of Batch
        The step's micro-batches.
    visuals : iterator of Visual
        H_v of each, in the same order.
    config : TrainConfig
        Coefficients and precision.

    Returns
    -------
    Tensor
        All of `LOSSES`, on the model's device. Nothing here waits for the device to have a value.

    Notes
    -----
    Cross-entropy is the mean over the answer tokens of the whole step, the difference loss that
    over its images. L_b is no mean over micro-batches, as it is a product of two means: so with
    several of them the router's losses are computed once, over the tokens of the whole step. The
    router is linear in H_v, so this costs little, and H_v of the whole step fits in memory.
    """
    num_tokens = sum(int((b.labels[:, 1:] != IGNORE_INDEX).sum()) for b in batches)
    step = [next(visuals) for _ in batches]
    rows = [len(visual.features) if visual.images else 0 for visual in step]
    split = len(batches) > 1 and any(rows)
    router = model.connector if split and isinstance(model.connector, CrossTaskMoA) else None
    losses = torch.zeros(len(LOSSES), dtype=torch.float64, device=model.device)
    if router is not None:
        parts = _router_losses(router, [v.features for v in step if v.images], model.device)
        losses += _backpropagate(parts.balance.new_zeros(()), parts, config)
    for batch, visual, count in zip(batches, step, rows, strict=True):
        with autocast(model.device, config.autocast):
            output = model(batch.to(model.device), visual)
        summed = nn.functional.cross_entropy(output.logits.float(), output.labels, reduction="sum")
        share = count / max(1, sum(rows))
        of_router = share if router is None else 0.0
        found = output.connector
        parts = ConnectorOutput(
            found.features, share * found.difference, of_router * found.balance, of_router * found.z
        )
        losses += _backpropagate(summed / num_tokens, parts, config)
    return losses


def _router_losses(
    connector: CrossTaskMoA, step: list[Tensor], device: torch.device
) -> ConnectorOutput:
    """Return L_b and L_z over all tokens of a step; `step` has its H_v, each (R, N, D)."""
    features = torch.cat([part.to(device, connector.router.weight.dtype) for part in step])
    logits = connector.router_logits(features)
    return ConnectorOutput(
        features,
        logits.new_zeros(()),
        load_balancing_loss(logits.softmax(-1)),
        router_z_loss(logits),
    )


def _backpropagate(ce: Tensor, parts: ConnectorOutput, config: TrainConfig) -> Tensor:
    loss = total_loss(ce, parts, config)
    loss.backward()  # type: ignore[no-untyped-call]
    values = (loss, ce, parts.difference, parts.balance, parts.z)
    losses = torch.zeros(len(LOSSES), dtype=torch.float64, device=loss.device)
    losses[: len(values)] = torch.stack([value.detach().double() for value in values])
    return losses
