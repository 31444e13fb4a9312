"""Estimate the GPU memory of a training step from shapes alone.

One micro-batch runs through tensors without content, and the bytes that autograd keeps for the
backward pass are added up. Importing transformers and peft takes ten seconds, so decoders of known
parts run here (`_decoder_layer`), with one and with two of their equal layers; any other base runs
as a whole. Tests compare the two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from pilot_flwr.algorithm.connector import Adapter, stage1_connector, stage2_connector
from pilot_flwr.algorithm.parameter_groups import (
    WHOLE,
    Sharing,
    group_parameters,
    set_trainable,
    trained_groups,
)
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import feature_size, is_plain
from pilot_flwr.model.shapes import (
    DTYPE_BYTES,
    Shapes,
    decoder_shapes,
    group_shapes,
    head_size,
    numel,
)
from pilot_flwr.protocol import GroupName

RESERVE = 0.1
"""Share added for the allocator's fragmentation and the kernels' workspace."""

_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in NF4 with double quantization: 4 bits, and scales for blocks of 64."""

Empty = Callable[..., Tensor]
"""From shape and `dtype` to a tensor without content."""

Decoder = tuple[Callable[[Tensor], Tensor], list[Tensor]]
"""A function from embeddings (B, L, C) to the last hidden states, and its parameters."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of one image per example; `answer_tokens` of the text tokens are labelled."""

    examples: int
    rows: int
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
    base: Any
    tasks: tuple[str, ...]
    number: int
    sharing: Sharing = WHOLE

    @functools.cached_property
    def groups(self) -> dict[GroupName, Shapes]:
        """Shapes by group; `residual` is empty until the caller fills it."""
        return group_shapes(self.config, self.base, tasks=self.tasks, stage=self.number)

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
    vocabulary, precision = stage.base.text_config.vocab_size, DTYPE_BYTES[stage.config.dtype]
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
        matrix = "language_model.layers" in name and len(shapes[name]) == 2
        return _NF4_BYTES if matrix and stage.config.quantization != "none" else width

    return int(sum(math.prod(shape) * bytes_each(name) for name, shape in shapes.items()))


def _activation_bytes(stage: Stage, batch: MicroBatch) -> int:
    """Count what autograd keeps: with checkpointing, all layers' inputs and the rest of one."""
    kept = _kept_by_plain_layers if is_plain(stage.base) else _kept_by_whole_model
    everything = kept(stage, batch, checkpointing=False)
    if not stage.config.gradient_checkpointing:
        return everything
    inputs = kept(stage, batch, checkpointing=True)
    return inputs + (everything - inputs) // int(stage.base.text_config.num_hidden_layers)


def _kept_by_plain_layers(stage: Stage, batch: MicroBatch, *, checkpointing: bool) -> int:
    connector = _connector(stage)
    _without_content(connector, _empty)
    one, two = (
        _kept(stage, batch, connector, _plain_decoder(stage, number, checkpointing), _empty)
        for number in (1, 2)
    )
    return one + (int(stage.base.text_config.num_hidden_layers) - 1) * (two - one)


def _kept_by_whole_model(stage: Stage, batch: MicroBatch, *, checkpointing: bool) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pilot_flwr.model.pilot_model import empty_model

    model = empty_model(stage.config, stage.base, tasks=stage.tasks, stage=stage.number)
    if residual := stage.groups["residual"]:
        with torch.device("meta"):
            model.set_residual({name: torch.empty(shape) for name, shape in residual.items()})
    set_trainable(model.groups(), stage=stage.number, sharing=stage.sharing)
    model.share_lora_inputs(True)  # as under the autocast of a GPU
    decoder, connector = model.train().llava.model.language_model, _connector(stage)
    if not checkpointing:
        decoder.activation_checkpointing_disable()

    def run(embeddings: Tensor) -> Tensor:
        hidden: Tensor = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden

    with FakeTensorMode():
        _without_content(connector, torch.empty)
        _without_content(decoder, torch.empty)
        return _kept(stage, batch, connector, (run, list(decoder.parameters())), torch.empty)


def _kept(
    stage: Stage,
    batch: MicroBatch,
    connector: nn.Module,
    decoder: Decoder,
    empty: Empty,
) -> int:
    """Sum up the bytes that autograd keeps of one micro-batch besides the parameters."""
    run_decoder, parameters = decoder
    (tokens, channels), dtype = feature_size(stage.base), getattr(torch, stage.config.dtype)
    width, vocabulary = stage.base.text_config.hidden_size, stage.base.text_config.vocab_size
    head = empty((vocabulary, width), dtype=dtype)
    with _saved([*connector.parameters(), head, *parameters]) as kept:
        with torch.autocast("cpu", torch.bfloat16):
            rows = empty((batch.examples * batch.rows, tokens, channels), dtype=torch.float32)
            image = connector(rows).features.to(dtype).reshape(batch.examples, -1, width)
            # Packing adds tokens to the rows or drops some.
            packed = (0, 0, 0, batch.image_tokens - image.shape[1])
            image = functional.pad(image, packed) if packed[-1] else image
            text = empty((batch.examples, batch.text_tokens, width), dtype=dtype)
            with torch.autocast("cpu", enabled=False):  # autocast cannot concatenate float16
                embeddings = torch.cat([image, text], 1)
            hidden = run_decoder(embeddings)
            functional.linear(hidden[:, -batch.answer_tokens :], head)
    return sum(kept.values())


def _connector(stage: Stage) -> nn.Module:
    config, shapes = stage.config, stage.groups["own_task_adapter"]
    width, channels = shapes["linear_1.weight"]
    with torch.device("meta"):
        projector = Adapter(channels, width, bias="linear_1.bias" in shapes)
        projector.to(getattr(torch, config.adapter_dtype))
        connector: nn.Module = stage1_connector(projector, config)
        if stage.number == 2:
            connector = stage2_connector(
                projector,
                config,
                tasks=stage.tasks,
                client_adapter=connector.client_adapter,  # type: ignore[arg-type]
                generator=torch.Generator(),
            )
    named = nn.ModuleDict({"model": nn.ModuleDict({"multi_modal_projector": connector})})
    groups = group_parameters(named, own_task=stage.tasks[0])
    set_trainable(groups, stage=stage.number, sharing=stage.sharing)
    return connector


def _plain_decoder(stage: Stage, layers: int, checkpointing: bool) -> Decoder:
    """Build `layers` decoder layers and the last norm, as transformers runs them."""
    text, dtype = stage.base.text_config, getattr(torch, stage.config.dtype)
    weights = [
        {name: _empty(shape, dtype=dtype) for name, shape in decoder_shapes(text).items()}
        | _lora_tensors(stage)
        for _ in range(layers)
    ]
    norm = _empty((text.hidden_size,), dtype=dtype)

    def decoder(hidden: Tensor) -> Tensor:
        shape = (1, hidden.shape[1], head_size(text))
        rotation = _empty(shape, dtype=dtype), _empty(shape, dtype=dtype)  # cosine and sine
        for layer in weights:

            def run(x: Tensor, layer: Mapping[str, Tensor] = layer) -> Tensor:
                return _decoder_layer(stage, layer, x, rotation)

            hidden = _checkpointed(run, hidden) if checkpointing else run(hidden)
        return _rms_norm(norm, hidden)

    return decoder, [norm, *(tensor for layer in weights for tensor in layer.values())]


def _checkpointed(run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Run a layer and keep its input only."""
    hidden.abs()  # this operator keeps its input
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda packed: packed):
        return run(hidden)


def _lora_tensors(stage: Stage) -> dict[str, Tensor]:
    """Return Θ_l and the residual of the first layer, by their names in it."""
    prefix, tensors = "layers.0.", {}
    for group, kind in (("lora", stage.config.adapter_dtype), ("residual", "float32")):
        for name, shape in stage.groups[group].items():  # type: ignore[index]
            if name.startswith(prefix):
                tensor = _empty(shape, dtype=getattr(torch, kind))
                trained = group == "lora" and stage.trains("lora", name)
                tensors[f"{name.removeprefix(prefix)}.{group}"] = tensor.requires_grad_(trained)
    return tensors


def _decoder_layer(
    stage: Stage, weights: Mapping[str, Tensor], hidden: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """Run a layer of Llama or Qwen2, op by op as in transformers and peft."""
    text, lora = stage.base.text_config, stage.config.lora

    def linear(name: str, x: Tensor) -> Tensor:
        y = functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        dtype = y.dtype
        for group, dropout in (("lora", lora.dropout), ("residual", 0.0)):
            if (a := weights.get(f"{name}.lora_A.{group}")) is not None:
                dropped = functional.dropout(x, dropout) if dropout else x
                b = weights[f"{name}.lora_B.{group}"]
                y = y + functional.linear(functional.linear(dropped, a), b) * lora.alpha
        return y.to(dtype)

    def rotate(x: Tensor) -> Tensor:
        cos, sin = (part[:, None] for part in rotation)
        half = x.shape[-1] // 2
        return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), -1) * sin)

    x = _rms_norm(weights["input_layernorm.weight"], hidden)
    query, key, value = (
        linear(f"self_attn.{n}_proj", x).view(*x.shape[:2], -1, head_size(text)).transpose(1, 2)
        for n in "qkv"
    )
    repeats = text.num_attention_heads // text.num_key_value_heads
    length = hidden.shape[1]
    attention = functional.scaled_dot_product_attention(
        rotate(query),
        _repeat_heads(rotate(key), repeats),
        _repeat_heads(value, repeats),
        # transformers builds a mask for tensors without values; a real run has none.
        attn_mask=_empty((len(hidden), 1, length, length), dtype=torch.bool),
    )
    attention = attention.transpose(1, 2).contiguous().flatten(2).contiguous()
    hidden = hidden + linear("self_attn.o_proj", attention)
    x = _rms_norm(weights["post_attention_layernorm.weight"], hidden)
    gated = functional.silu(linear("mlp.gate_proj", x)) * linear("mlp.up_proj", x)
    return hidden + linear("mlp.down_proj", gated)


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) if times > 1 else x


def _rms_norm(weight: Tensor, hidden: Tensor) -> Tensor:
    x = hidden.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x.to(hidden.dtype)


def _without_content(module: nn.Module, empty: Empty) -> None:
    """Replace meta tensors by CPU tensors without content, for autocast to act on."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            tensor = empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(tensor, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, empty(buffer.shape, dtype=buffer.dtype))


class _Tensor(torch.Tensor):
    """A tensor without content that autocast takes for a CPU tensor; operators run on `meta`.

    torch's own `FakeTensorMode` imports ``torch._dynamo``, which takes seconds.
    """

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> _Tensor:
        tensor: _Tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
        )
        tensor.meta = meta
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on the meta device."""

        def meta(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.meta if isinstance(value, _Tensor) else value.to("meta")
            return torch.device("meta") if isinstance(value, torch.device) else value

        result = _on_meta(func, tree_map(meta, args), tree_map(meta, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, result)


_POINTWISE = ("abs", "add", "div", "eq", "gelu", "mul", "neg", "pow", "rsqrt", "sub", "where")
"""Operators whose meta kernels are in Python and import ``torch._dynamo`` too."""


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    if name in _POINTWISE:
        tensors = [value for value in args if isinstance(value, Tensor)]
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        like = max(tensors, key=Tensor.numel).expand(shape)
        order = sorted(range(len(shape)), key=like.stride, reverse=True)  # its memory order
        dense = torch.empty([shape[dim] for dim in order], dtype=dtype, device="meta")
        return dense.permute([order.index(dim) for dim in range(len(shape))])
    if name == "addmm":
        shape, dtype = torch.Size((len(args[1]), args[2].shape[1])), args[1].dtype
    elif name == "cat":
        parts, dim = args[0], args[1] if len(args) > 1 else 0
        shape, dtype = list(parts[0].shape), parts[0].dtype
        shape[dim] = sum(part.shape[dim] for part in parts)
    elif name in ("logsumexp", "mean"):
        return args[0].sum(*args[1:])
    else:
        return func(*args, **kwargs)
    return torch.empty(shape, dtype=dtype, device="meta")


def _empty(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    return _Tensor(torch.empty(*shape, dtype=dtype, device="meta"))


@contextmanager
def _saved(parameters: list[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd keeps, without the parameters': address → bytes."""
    own = {_storage(p)._cdata for p in parameters}
    kept: dict[int, int] = {}
    alive = []  # no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in own:
            alive.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        raise ModelError("An estimate of memory has no backward pass.")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, _Tensor) else tensor).untyped_storage()
