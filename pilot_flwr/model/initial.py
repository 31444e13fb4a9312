"""What a federation starts from, read without loading the base model.

The server needs the pretrained projector (every task adapter's start) and one LoRA that all
clients share. Shapes come from the checkpoint's configuration on the meta device, the
projector's few tensors from its safetensors files; the base itself stays on disk.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from pilot_flwr.errors import ModelError
from pilot_flwr.model.base import empty_base, read_config
from pilot_flwr.model.parameters import Sharing, State
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.shipped import checkpoint_path
from pilot_flwr.settings.model import ModelConfig

PROJECTOR = "multi_modal_projector."
"""In the names of the projector's tensors, before what they are called in an adapter."""


class InitialState(NamedTuple):
    """Start of a federation.

    Attributes
    ----------
    adapter : State
        The pretrained projector, as all that is sent in `model.sent_dtype`.
    lora : State
        Θ_l: A uniform in ±1/√(inputs) as peft draws it, B zero.
    """

    adapter: State
    lora: State

    def sent(self, sharing: Sharing) -> "InitialState":
        """Return what of it is sent, and so what the server has."""
        return InitialState(
            {n: t for n, t in self.adapter.items() if sharing.sends("own_task_adapter", n)},
            {n: t for n, t in self.lora.items() if sharing.sends("lora", n)},
        )


def initial_state(config: ModelConfig, *, seed: int) -> InitialState:
    """Read the projector and draw Θ_l.

    Parameters
    ----------
    config : ModelConfig
        Base model and LoRA.
    seed : int
        Of the LoRA's A matrices.

    Raises
    ------
    ModelError
        The checkpoint cannot be read or has no projector.
    """
    dtype = getattr(torch, config.wire_dtype)
    lora = draw_lora(_lora_shapes(config), dtype, seed=seed)
    return InitialState(_read_projector(config, dtype), lora)


def draw_lora(shapes: Mapping[str, torch.Size], dtype: torch.dtype, *, seed: int) -> State:
    """Draw Θ_l: the same at the server and, of what is never sent, at every client.

    Parameters
    ----------
    shapes : Mapping[str, Size]
        Of all its tensors, in the model's order.
    dtype : torch.dtype
        `model.sent_dtype`.
    seed : int
        The run's.
    """
    generator = torch.Generator().manual_seed(seed)
    lora: State = {}
    for name, shape in shapes.items():
        lora[name] = torch.zeros(shape, dtype=dtype)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(shape[1])
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            lora[name] = drawn.to(dtype)
    return lora


def _lora_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    base = empty_base(read_config(config))
    with torch.device("meta"):
        model = PilotModel(base, config)
        model.enter_stage1("any")
    return {name: p.shape for name, p in model.groups()["lora"].items()}


def _read_projector(config: ModelConfig, dtype: torch.dtype) -> State:
    state: State = {}
    for file in _weight_files(config):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if PROJECTOR in name:
                    state[name.split(PROJECTOR)[1]] = tensors.get_tensor(name).to(dtype)
    if not state:
        raise ModelError(f"`model.path` is {config.path!r}, which has no tensor `{PROJECTOR}*`.")
    return state


def _weight_files(config: ModelConfig) -> list[str]:
    """Return the safetensors files that hold the projector."""
    folder, revision = checkpoint_path(config.path), config.revision or None
    index = cached_file(
        folder,
        "model.safetensors.index.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    if index is None:
        names = ["model.safetensors"]
    else:
        weights = json.loads(Path(index).read_text())["weight_map"]
        names = sorted({file for name, file in weights.items() if PROJECTOR in name})
    try:
        return [str(cached_file(folder, name, revision=revision)) for name in names]
    except OSError as error:
        raise ModelError(
            f"`model.path` is {config.path!r}, whose weights are missing: {error}"
        ) from error
