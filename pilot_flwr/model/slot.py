"""Put Pilot's connector, which reads kept features, in the place of the base model's projector."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pilot_flwr.algorithm.connector import ConnectorOutput, CrossTaskMoA, TaskClientConnector
from pilot_flwr.model.processor import Inputs


class Visual(NamedTuple):
    """H_v of a batch's images, in order, and the base model's image inputs."""

    features: Tensor
    """(R, N, D), rows of N features, or (R, D), rows of one."""
    images: tuple[int, ...]
    """Number of rows of every image."""
    inputs: Inputs
    """Image inputs of the base model, without pixels; empty without images."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the images' pixels, for `stand_in`."""
    besides: tuple[Tensor, ...] = ()
    """Outputs of the modules of `ModelSpec.besides`, all images joined."""
    zeros: int = 0
    """Number of images, the last ones, that the connector alone sees (`train.text_only`)."""

    @property
    def weight(self) -> int:
        """Number of images that L_d is a mean over; rows of shape (N, D) count as images."""
        return len(self.features) if self.features.dim() == 3 else len(self.images)

    @property
    def shown(self) -> int:
        """Number of rows of the images that the language model sees."""
        return sum(self.images[: len(self.images) - self.zeros])


class Slot(nn.Module):
    """Takes the place of the projector in the base model."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.pilot: TaskClientConnector | CrossTaskMoA | None = None
        self.visual: Visual | None = None
        """Kept features; None while images are encoded, when `seen` gets the tower's features."""
        self.seen: Tensor | None = None
        self.output: ConnectorOutput | None = None
        # In a tuple, so that torch does not register it: only new adapters start from it.
        self._projector = (projector,)

    @property
    def projector(self) -> nn.Module:
        """The base model's own connector, in the adapters' precision."""
        return self._projector[0]

    def forward(self, features: Tensor) -> Tensor:
        """Return the tokens of the kept features; without any, note and project `features`."""
        if self.visual is None:
            self.seen = features
            projected: Tensor = self.projector(features.to(next(self.projector.parameters())))
            return projected
        tokens = self.connect().features
        rows = len(self.visual.features)
        return tokens[: len(tokens) * self.visual.shown // rows]

    def connect(self) -> ConnectorOutput:
        """Run the connector on the kept features; of no image, return no tokens and zero losses."""
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
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward pass in the block."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def no_features(pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
    """Return a feature map of one number per image, which `Slot` ignores."""
    zeros = pixel_values.new_zeros(len(pixel_values), 1, 1, 1)
    return BaseModelOutputWithPooling(last_hidden_state=zeros)


def unchanged(hidden: Tensor, *inputs: Any, **options: Any) -> Tensor:
    """Return a layer's first input in place of its output."""
    return hidden


def zero_patches(convolution: nn.Conv2d | nn.Conv3d, pixels: Tensor) -> Tensor:
    """Return zeros of the shape of a patch embedding's output; they take no memory."""
    kernel, stride = convolution.kernel_size, convolution.stride
    space = pixels.shape[-len(kernel) :]
    patches = ((n - k) // s + 1 for n, k, s in zip(space, kernel, stride, strict=True))
    return pixels.new_zeros(()).expand(len(pixels), convolution.out_channels, *patches)
