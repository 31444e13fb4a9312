"""Models whose every adapter does something, as after a training."""

import torch

from pilot_flwr.algorithm.parameter_groups import GROUPS
from pilot_flwr.client.private_state import PrivateState


def perturb(model, *, seed=0, scale=0.05):
    """Add noise to all that Pilot puts into a base model; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for group, named in model.groups().items():
        if group != "base":
            for parameter in named.values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += scale * noise.to(parameter)
    return model


def private_state(model):
    """Return the private part of a model, as a client saves it."""
    groups = {name: model.state(name) for name, row in GROUPS.items() if row.private}
    return PrivateState(model.stage, getattr(model.connector, "tasks", ()), groups)
