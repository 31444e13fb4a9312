"""The one base model that a process keeps from turn to turn, and from run to run."""

import torch

from pilot_flwr.model.base import load_base
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.settings.model import ModelConfig

_WARM: dict[tuple[str, str, str], PilotModel] = {}


def warm_model(config: ModelConfig, *, reduction: str, device: torch.device) -> PilotModel:
    """Return this process's one base model; it is loaded at the first call and then kept."""
    key = (repr(config), reduction, str(device))
    if key not in _WARM:
        _WARM.clear()  # one base at a time: two may not fit
        _WARM[key] = PilotModel(load_base(config, device), config, reduction=reduction)
    return _WARM[key]
