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
        Size of the private state after stage 2: ψ_s, T − 1 ψ_c and φ, and what is not shared.
    """

    sent: dict[str, dict[str, list[int]]]
    private_bytes: int


def layout_of(config: ModelConfig, tasks: tuple[str, ...], sharing: Sharing = WHOLE) -> Layout:
    """Return the shapes of a federation's parameters; half a second for a 7B model, once.

    Raises
    ------
    ModelError
        The base model's configuration cannot be read.
    """
    key = f"{config}/{len(tasks)}/{sharing}"
    if key not in _KNOWN:
        _KNOWN.clear()  # one run, one layout
        _KNOWN[key] = _layout(config, read_config(config), tasks, sharing)
    return _KNOWN[key]


def _layout(
    config: ModelConfig, transformers_config: Any, tasks: tuple[str, ...], sharing: Sharing
) -> Layout:
    # In stage 2, as nothing is private or sent in stage 1 that is not there in stage 2.
    groups = empty_model(config, transformers_config, tasks=tasks, stage=2).groups()
    width = getattr(torch, config.adapter_dtype).itemsize
    return Layout(
        sent={
            group: {n: list(p.shape) for n, p in groups[group].items() if sharing.sends(group, n)}
            for group, row in GROUPS.items()
            if row.sent
        },
        private_bytes=width
        * sum(
            p.numel()
            for g, named in groups.items()
            for n, p in named.items()
            if sharing.keeps(g, n)
        ),
    )
