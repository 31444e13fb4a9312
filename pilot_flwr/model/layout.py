"""What is sent and what is kept, tensor by tensor, known without loading the base model."""

from dataclasses import dataclass
from typing import Any

import torch

from pilot_flwr.model.base import read_config
from pilot_flwr.model.memory import empty_model
from pilot_flwr.model.parameters import GROUPS, WHOLE, Sharing
from pilot_flwr.settings.model import ModelConfig

_KNOWN: dict[str, "Layout"] = {}


@dataclass(frozen=True)
class Layout:
    """Shapes of one client's parameters.

    Attributes
    ----------
    sent : dict
        Group → tensor → shape, of Θ_a and Θ_l; all of type `model.sent_dtype`.
    private_bytes : int
        Size of the private state after the last stage: ψ_s, T − 1 ψ_c, φ, and what is not shared.
    personal_bytes : int
        Size of a personal model of all that is sent or could be (`train.ditto`).
    """

    sent: dict[str, dict[str, list[int]]]
    private_bytes: int
    personal_bytes: int


def layout_of(
    config: ModelConfig, tasks: tuple[str, ...], sharing: Sharing = WHOLE, *, stages: int = 2
) -> Layout:
    """Return the shapes of a federation's parameters; half a second for a 7B model, once.

    Parameters
    ----------
    config : ModelConfig
        Base model, adapters and LoRA.
    tasks : tuple of str
        All T tasks.
    sharing : Sharing
        What is sent, and what is kept.
    stages : int
        `strategy.stages`: what is private is counted after the last of them.

    Raises
    ------
    ModelError
        The base model's configuration cannot be read.
    """
    key = f"{config}/{len(tasks)}/{sharing}/{stages}"
    if key not in _KNOWN:
        _KNOWN.clear()  # one run, one layout
        _KNOWN[key] = _layout(config, read_config(config), tasks, sharing, stages)
    return _KNOWN[key]


def _layout(
    config: ModelConfig,
    transformers_config: Any,
    tasks: tuple[str, ...],
    sharing: Sharing,
    stages: int,
) -> Layout:
    # In the last stage, as nothing is private or sent in stage 1 that is not there in stage 2.
    groups = empty_model(config, transformers_config, tasks=tasks, stage=stages).groups()
    width = getattr(torch, config.adapter_dtype).itemsize
    rows = [group for group, row in GROUPS.items() if row.sent]
    return Layout(
        sent={
            group: {n: list(p.shape) for n, p in groups[group].items() if sharing.sends(group, n)}
            for group in rows
        },
        private_bytes=width
        * sum(
            p.numel()
            for g, named in groups.items()
            for n, p in named.items()
            if sharing.keeps(g, n)
        ),
        personal_bytes=width * sum(p.numel() for group in rows for p in groups[group].values()),
    )
