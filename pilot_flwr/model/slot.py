"""The place of a base model's connector, in which Pilot's reads kept features."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pilot_flwr.algorithm.connector import ConnectorOutput, CrossTaskMoA, TaskClientConnector
from pilot_flwr.model.processor import Inputs


class Visual(NamedTuple):
    """H_v of a batch's images, in order, and the base model's image inputs."""

    features: Tensor
    """(R, N, D), rows of N features, or (R, D)."""
    images: tuple[int, ...]
    """The rows of every image."""
    inputs: Inputs
    """Image inputs of the base model, without pixels; empty without images."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the images' pixels, for their stand-in."""
    besides: tuple[Tensor, ...] = ()
    """Outputs of `ModelSpec.besides` of all images."""
    zeros: int = 0
    """The last images that the connector alone sees (`train.text_only`)."""

    @property
    def weight(self) -> int:
        """Number of images that L_d is a mean over; rows count as images."""
        return len(self.features) if self.features.dim() == 3 else len(self.images)

    @property
    def shown(self) -> int:
        """Rows of the images in the text."""
        return sum(self.images[: len(self.images) - self.zeros])


class Slot(nn.Module):
    """Stands in the base model in place of its connector."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.pilot: TaskClientConnector | CrossTaskMoA | None = None
        self.visual: Visual | None = None
        """Kept features; without them the features of the tower are noted in `seen`."""
        self.seen: Tensor | None = None
        self.output: ConnectorOutput | None = None
        # In a tuple, so that torch does not register it: only new adapters start from it.
        self._projector = (projector,)

    @property
    def projector(self) -> nn.Module:
        """The base model's connector, in the adapters' precision."""
        return self._projector[0]

    def forward(self, features: Tensor) -> Tensor:
        """Return the tokens of the kept features."""
        if self.visual is None:
            self.seen = features
            projected: Tensor = self.projector(features.to(next(self.projector.parameters())))
            return projected
        tokens = self.connect().features
        rows = len(self.visual.features)
        return tokens[: len(tokens) * self.visual.shown // rows]

    def connect(self) -> ConnectorOutput:
        """Run the connector on the kept features; without any, all is empty or zero."""
        assert self.visual is not None
        features, like = self.visual.features, next(self.projector.parameters())
        if len(features):
            assert self.pilot is not None
            self.output = self.pilot(features.to(like), self.visual.images)
        else:
            zero = torch.zeros((), device=like.device)
            self.output = ConnectorOutput(features, zero, zero, zero)
        return self.output


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's forward pass."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
