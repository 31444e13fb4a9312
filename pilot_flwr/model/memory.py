"""Estimate the GPU memory of a training step from shapes alone.

One micro-batch runs through connector and decoder in torch's `FakeTensorMode`, with one and with
two of the decoder's equal layers, and the bytes that autograd keeps for the backward pass are added
up. The result is `remembered`, because the computation takes seconds.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pilot_flwr.algorithm.parameter_groups import (
    WHOLE,
    Sharing,
    decoder_matrix,
    set_trainable,
    trained_groups,
)
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import decoder_of, known_config, remembered
from pilot_flwr.model.shapes import DTYPE_BYTES, Shapes, group_shapes, numel
from pilot_flwr.protocol import GroupName

RESERVE = 0.1
"""Share added for the allocator's fragmentation and the kernels' workspace."""

_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in NF4 with double quantization: 4 bits, and scales for blocks of 64."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of one image per example; `answer_tokens` of the text tokens are labelled."""

    examples: int
    features: tuple[int, ...]
    """Shape of H_v of one image, (R, N, D) or (R, D)."""
    image_tokens: int
    text_tokens: int = 128
    answer_tokens: int = 32


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak of one training step."""

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reserve: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def largest_micro_batch(self, size: int, batch: MicroBatch) -> int:
        """Return how many examples fit into `size` bytes, given that `batch` needs `self`."""
        each = (self.activations + self.logits) / batch.examples
        fixed = self.base + self.adapters + self.gradients + self.optimizer
        return max(0, int((size / (1 + RESERVE) - fixed) / each))


@dataclass(frozen=True)
class Stage:
    """One stage of one client: its parameters' shapes, and which are trained and sent."""

    config: ModelConfig
    tasks: tuple[str, ...]
    number: int
    sharing: Sharing = WHOLE

    @functools.cached_property
    def groups(self) -> dict[GroupName, Shapes]:
        """Shapes by group; `residual` is empty until the caller fills it."""
        return group_shapes(self.config, tasks=self.tasks, stage=self.number)

    def count(self, counts: Callable[[GroupName, str], bool]) -> dict[GroupName, int]:
        """Count each group's parameters in the tensors that `counts` selects."""
        return {
            group: numel({n: shape for n, shape in shapes.items() if counts(group, n)})
            for group, shapes in self.groups.items()
        }

    def trains(self, group: GroupName, name: str) -> bool:
        """Whether this stage trains a tensor."""
        return group in trained_groups(self.number) and self.sharing.trains(group, name)


def training_memory(stage: Stage, batch: MicroBatch) -> Memory:
    """Estimate the peak of one training step."""
    width = DTYPE_BYTES[stage.config.adapter_dtype]
    trained = width * sum(stage.count(stage.trains).values())
    # The residual is in float32 whatever the adapters are.
    bytes_of = {"base": 0, "residual": 4}
    adapters = sum(bytes_of.get(g, width) * numel(shapes) for g, shapes in stage.groups.items())
    answers = batch.examples * batch.answer_tokens
    vocabulary = decoder_of(stage.config).vocabulary
    precision = DTYPE_BYTES[stage.config.dtype]
    parts = {
        "base": _base_bytes(stage),
        "adapters": adapters,
        "gradients": trained,
        "optimizer": 2 * trained,  # AdamW's two moments
        "activations": _activation_bytes(stage, batch),
        # The logits in the model's precision and in float32, and the gradient of each.
        "logits": answers * vocabulary * 2 * (4 + precision),
    }
    return Memory(**parts, reserve=int(RESERVE * sum(parts.values())))


def _base_bytes(stage: Stage) -> int:
    width, shapes = DTYPE_BYTES[stage.config.dtype], stage.groups["base"]

    def bytes_each(name: str) -> float:
        matrix = decoder_matrix(name, shapes[name])
        return _NF4_BYTES if matrix and stage.config.quantization != "none" else width

    return int(sum(math.prod(shape) * bytes_each(name) for name, shape in shapes.items()))


def _activation_bytes(stage: Stage, batch: MicroBatch) -> int:
    """Count what autograd keeps: with checkpointing, all layers' inputs and the rest of one."""
    layers = decoder_of(stage.config).layers

    def kept() -> dict[str, int]:
        found = {}
        for name, checkpointing in (("all", False), ("inputs", True)):
            one, two = (_kept(stage, batch, n, checkpointing=checkpointing) for n in (1, 2))
            found[name] = one + (layers - 1) * (two - one)
        return found

    key = (repr(stage), tuple(stage.groups["residual"].items()), batch)
    bytes_of = remembered("activations", stage.config, key, kept)
    if not stage.config.gradient_checkpointing:
        return bytes_of["all"]
    return bytes_of["inputs"] + (bytes_of["all"] - bytes_of["inputs"]) // layers


def _kept(stage: Stage, batch: MicroBatch, layers: int, *, checkpointing: bool) -> int:
    """Return the bytes that autograd keeps of one micro-batch besides the parameters."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pilot_flwr.model.pilot_model import empty_model

    config = replace(stage.config, gradient_checkpointing=checkpointing)
    base = _with_layers(known_config(stage.config), layers)
    model = empty_model(config, base, tasks=stage.tasks, stage=stage.number)
    if residual := {n: s for n, s in stage.groups["residual"].items() if _layer(n) < layers}:
        with torch.device("meta"):
            model.set_residual({name: torch.empty(shape) for name, shape in residual.items()})
    set_trainable(model.groups(), stage=stage.number, sharing=stage.sharing)
    model.share_lora_inputs(True)  # as under the autocast of a GPU
    decoder, head, connector = model.train().decoder, model.base.lm_head, model.connector
    rows, *shape = batch.features
    dtype, width = getattr(torch, stage.config.dtype), base.text_config.hidden_size
    with FakeTensorMode():
        for part in (decoder, head, connector):
            _without_content(part)
        parameters = [p for part in (decoder, head, connector) for p in part.parameters()]
        with _saved(parameters) as kept, torch.autocast("cpu", torch.bfloat16):
            features = torch.empty(batch.examples * rows, *shape, dtype=torch.float32)
            image = connector(features, [rows] * batch.examples).features
            image = image.to(dtype).reshape(batch.examples, -1, width)
            # Packing adds tokens to the rows or drops some.
            packed = (0, 0, 0, batch.image_tokens - image.shape[1])
            image = functional.pad(image, packed) if packed[-1] else image
            text = torch.empty(batch.examples, batch.text_tokens, width, dtype=dtype)
            with torch.autocast("cpu", enabled=False):  # autocast cannot concatenate float16
                embeddings = torch.cat([image, text], 1)
            hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            head(hidden[:, -batch.answer_tokens :])
    return sum(kept.values())


def _with_layers(base: Any, layers: int) -> Any:
    """Return the base model's configuration with another number of equal decoder layers."""
    base = copy.deepcopy(base)
    text = base.text_config
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return base


def _layer(name: str) -> int:
    """Return the number of the decoder layer that a LoRA belongs to."""
    return int(name.removeprefix("layers.").split(".")[0])


def _without_content(module: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors, for autocast to act on."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(tensor, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


@contextmanager
def _saved(parameters: list[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd keeps, without the parameters': address → bytes."""
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, int] = {}
    alive = []  # no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            alive.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        raise ModelError("An estimate of memory has no backward pass.")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept
