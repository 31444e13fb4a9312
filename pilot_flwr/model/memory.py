"""How much GPU memory one client's training takes, from shapes alone.

Nothing is loaded and nothing is computed: the model is made of tensors without content, one
micro-batch runs through it, and what autograd keeps for the backward pass is added up. So the
figure follows the model, the stage, the LoRA and checkpointing as they are; what the
allocator and the kernels need on top is the allowance `RESERVE`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import feature_size
from pilot_flwr.model.base import empty_base
from pilot_flwr.model.lora import lora_layers, share_inputs
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.settings.model import ModelConfig

RESERVE = 0.1
"""Share of the sum that is added for fragmentation and the kernels' own workspace."""

_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in NF4 with double quantization: 4 bits, and scales for blocks of 64."""


@dataclass(frozen=True)
class MicroBatch:
    """Shape of what is trained on at a time.

    Attributes
    ----------
    examples : int
        Micro-batch size, one image each.
    rows, image_tokens : int
        Rows of an image, and the tokens that it takes.
    text_tokens, answer_tokens : int
        Tokens of an example besides its image's; those of them that carry a label.
    """

    examples: int
    rows: int
    image_tokens: int
    text_tokens: int = 128
    answer_tokens: int = 32


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak of one training step, by what they are for."""

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
        """Return how many examples fit into `size` bytes if `self` is what `batch` needs."""
        each = (self.activations + self.logits) / batch.examples
        fixed = self.base + self.adapters + self.gradients + self.optimizer
        return max(0, int((size / (1 + RESERVE) - fixed) / each))


def empty_model(
    config: ModelConfig, transformers_config: Any, *, tasks: tuple[str, ...], stage: int
) -> PilotModel:
    """Return a model of stage 1 or 2 without weights, on the meta device.

    Parameters
    ----------
    config : ModelConfig
        What to add to the base.
    transformers_config
        The base's configuration.
    tasks : tuple of str
        All T tasks; the first is the client's own.
    stage : int
        Architecture, 1 or 2.
    """
    base = empty_base(transformers_config).to(getattr(torch, config.dtype))
    with torch.device("meta"):
        model = PilotModel(base, config)
        model.enter_stage1(tasks[0])
        if stage == 2:
            model.enter_stage2(tasks, torch.Generator("cpu"))
    return model


def training_memory(model: PilotModel, batch: MicroBatch) -> Memory:
    """Estimate the peak of one training step in the model's stage.

    Parameters
    ----------
    model : PilotModel
        On the meta device, see `empty_model`. Its parameters are replaced; those that have
        gradients are trained.
    batch : MicroBatch
        What it is to be trained on.
    """
    groups = model.groups()
    trained = [p for named in groups.values() for p in named.values() if p.requires_grad]
    adapters = sum(p.nbytes for g, ps in groups.items() if g != "base" for p in ps.values())
    answers = batch.examples * batch.answer_tokens
    vocabulary = model.llava.lm_head.out_features
    parts = {
        "base": _base_bytes(model),
        "adapters": adapters,
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": 2 * sum(p.nbytes for p in trained),  # AdamW's two moments
        "activations": _activation_bytes(model, batch),
        # The logits in the model's precision and in float32, and the gradient of each.
        "logits": answers * vocabulary * 2 * (4 + getattr(torch, model.config.dtype).itemsize),
    }
    return Memory(**parts, reserve=int(RESERVE * sum(parts.values())))


def _base_bytes(model: PilotModel) -> int:
    parameters = list(model.groups()["base"].items())
    if model.config.quantization == "none":
        return sum(p.nbytes for _, p in parameters)
    quantized = {
        name: p.numel() * _NF4_BYTES
        for name, p in parameters
        if "language_model.layers" in name and p.ndim == 2
    }
    return int(sum(quantized.get(name, p.nbytes) for name, p in parameters))


def _activation_bytes(model: PilotModel, batch: MicroBatch) -> int:
    """Bytes that autograd keeps; with checkpointing, one layer's own are on top of the inputs."""
    with FakeTensorMode():
        _without_content(model)
        kept = _kept(model, batch)
        if not model.config.gradient_checkpointing:
            return kept
        decoder = model.llava.model.language_model
        decoder.activation_checkpointing_disable()
        return kept + (_kept(model, batch) - kept) // len(decoder.layers)


def _without_content(model: nn.Module) -> None:
    """Replace meta tensors by CPU tensors without content, so that autocast acts on them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _kept(model: PilotModel, batch: MicroBatch) -> int:
    tokens, channels = feature_size(model.llava.config)
    language_model = model.llava.model.language_model
    dtype = getattr(torch, model.config.dtype)
    model.train()
    share_inputs(lora_layers(model), True)  # as under the autocast of a GPU
    with _saved(model) as kept, torch.autocast("cpu", torch.bfloat16):
        rows = torch.empty(batch.examples * batch.rows, tokens, channels)
        connected = model.connector(rows)
        width = connected.features.shape[-1]
        image = connected.features.to(dtype).reshape(batch.examples, -1, width)
        # What an architecture adds to its rows or takes from them when it packs them.
        packed = (0, 0, 0, batch.image_tokens - image.shape[1])
        image = nn.functional.pad(image, packed) if packed[-1] else image
        text = torch.empty(batch.examples, batch.text_tokens, width, dtype=dtype)
        hidden = language_model(inputs_embeds=torch.cat([image, text], 1), use_cache=False)
        model.llava.lm_head(hidden.last_hidden_state[:, -batch.answer_tokens :])
    return sum(kept.values())


@contextmanager
def _saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd keeps, without the parameters': address → bytes."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # an address must not be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            alive.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        raise ModelError("An estimate of memory has no backward pass.")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept
