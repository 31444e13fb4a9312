"""AdamW for one rank's shard of the trained parameters: its rates and its moments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pilot_flwr.config.train import TrainConfig
from pilot_flwr.errors import StateError
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import State


@dataclass
class RunSchedule:
    """The schedule of a whole run (`train.schedule=run`), at one of its exchanges.

    `exchange` counts from 0. `moments` is AdamW's state after the client's last training, by
    ``<group>/<tensor>/<quantity>``; `train` replaces it.
    """

    exchange: int
    exchanges: int
    moments: State = field(default_factory=dict)


def rate_factor(step: int, *, warmup: int, total: int) -> float:
    """Return a step's share of the peak learning rate: linear warm-up, then a cosine to zero.

    ``(s + 1) / (w + 1)`` in the w steps of warm-up, as a rate of zero would waste the first step;
    then ``(1 + cos π(s − w)/(n − w)) / 2``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, total - warmup))))


def make_optimizer(
    model: PilotModel,
    config: TrainConfig,
    num_steps: int,
    run: RunSchedule | None,
    shard: Sequence[nn.Parameter],
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW for a shard, and its rates: one for LoRA, one for the connector, cosine to 0."""
    rates = config.stage(model.stage)
    of_lora = set(model.groups()["lora"].values())
    lora = [p for p in shard if p in of_lora]
    connector = [p for p in shard if p not in of_lora]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": config.lr_scale * rates.lora_lr},
            {"params": connector, "lr": config.lr_scale * rates.connector_lr},
        ],
        weight_decay=config.weight_decay,
        # Unfused, it allocates temporary tensors as large as all trained parameters.
        fused=True if model.device.type == "cuda" else None,
    )
    if run is not None:
        _restore(model, optimizer, run.moments)
    first, total = (run.exchange * num_steps, run.exchanges * num_steps) if run else (0, num_steps)
    warmup = int(config.warmup_ratio * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(first + step, warmup=warmup, total=total)
    )
    return optimizer, schedule


def moments_of(model: PilotModel, optimizer: torch.optim.Optimizer) -> State:
    """Copy AdamW's state to the CPU, by the names of `RunSchedule.moments`."""
    return {
        f"{group}/{name}/{quantity}": value.detach().to("cpu", copy=True)
        for group, named in model.groups().items()
        for name, parameter in named.items()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def _restore(model: PilotModel, optimizer: torch.optim.Optimizer, moments: State) -> None:
    """Load what `moments_of` returned; a tensor that it lacks is new and starts without moments.

    Raises `StateError` for moments of unknown tensors, or of another layout than AdamW's.
    """
    kept: dict[str, State] = {}
    for key, value in moments.items():
        name, _, quantity = key.rpartition("/")
        kept.setdefault(name, {})[quantity] = value.clone()
    names = {p: f"{g}/{n}" for g, named in model.groups().items() for n, p in named.items()}
    if unknown := kept.keys() - names.values():
        raise StateError(f"The moments are of tensors that the model lacks: {sorted(unknown)[:3]}.")
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if found := kept.get(names[parameter]):
            shapes = {quantity: tuple(value.shape) for quantity, value in found.items()}
            expected = tuple(parameter.shape)
            if shapes != {"step": (), "exp_avg": expected, "exp_avg_sq": expected}:
                raise StateError(
                    f"The moments of `{names[parameter]}` have shapes {shapes} but must be `step` "
                    f"(), `exp_avg` and `exp_avg_sq` {expected}."
                )
            state["state"][index] = found
    optimizer.load_state_dict(state)
