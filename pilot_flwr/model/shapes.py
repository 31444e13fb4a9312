"""Shapes of all parameters, from a base model's configuration alone.

Known parts (Llama, Qwen2, CLIP, SigLIP) are counted here, so that a client answers the roster
query without torch, and a plan without transformers; any other model is built on the meta device.
Tests compare the two. Shapes are by group as in `pilot_flwr.algorithm.parameter_groups.GROUPS`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pilot_flwr.algorithm.parameter_groups import GROUPS, WHOLE, Sharing
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.model.architectures import check_targets, feature_size, is_plain, read_config
from pilot_flwr.model.checkpoints import PROJECTOR
from pilot_flwr.protocol import GroupName

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_LAYOUTS: dict[str, "Layout"] = {}


def group_shapes(
    config: ModelConfig, base: Any, *, tasks: tuple[str, ...], stage: int
) -> dict[GroupName, Shapes]:
    """Return the shapes of a stage's parameters; `tasks[0]` is the client's own task."""
    if not is_plain(base):
        from pilot_flwr.model.pilot_model import empty_model

        model = empty_model(config, base, tasks=tasks, stage=stage)
        return {g: {n: tuple(p.shape) for n, p in ps.items()} for g, ps in model.groups().items()}
    named = base_shapes(base)
    adapter = {n.split(PROJECTOR)[1]: s for n, s in named.items() if PROJECTOR in n}
    groups: dict[GroupName, Shapes] = {group: {} for group in GROUPS}
    groups["base"] = {n: s for n, s in named.items() if PROJECTOR not in n}
    groups["lora"] = lora_shapes(config, base)
    groups["own_task_adapter"] = adapter
    if config.client_adapter:
        groups["client_adapter"] = adapter
    if stage == 2:
        foreign = {f"{task}/{name}": s for task in tasks[1:] for name, s in adapter.items()}
        groups["foreign_task_adapters"] = foreign
        groups["cross_task_adapters"] = foreign if config.cross_task_adapters else {}
        groups["router"] = {"weight": (len(tasks), feature_size(base)[1])}
    return groups


def lora_shapes(config: ModelConfig, base: Any) -> Shapes:
    """Return the shapes of Θ_l, in the parameter order of peft's model."""
    if not is_plain(base):
        return group_shapes(config, base, tasks=("any",), stage=1)["lora"]
    text, rank = base.text_config, config.lora.rank
    shapes: Shapes = {}
    linear = {
        f"layers.{number}.{name}": shape
        for number in range(text.num_hidden_layers)
        for name, shape in decoder_linears(text).items()
    }
    check_targets(linear, config.lora.targets)
    for name, (outputs, inputs) in linear.items():
        if any(f".{name}".endswith(f".{target}") for target in config.lora.targets):
            shapes[f"{name}.lora_A"] = (rank, inputs)
            shapes[f"{name}.lora_B"] = (outputs, rank)
    return shapes


def decoder_linears(text: Any) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of a decoder layer's linear layers."""
    width, inner, head = text.hidden_size, text.intermediate_size, head_size(text)
    query, key = text.num_attention_heads * head, text.num_key_value_heads * head
    return {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, query),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def head_size(text: Any) -> int:
    """Return the width of one attention head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def decoder_shapes(text: Any) -> Shapes:
    """Return the shapes of one decoder layer."""
    shapes: Shapes = {}
    for name, (outputs, inputs) in decoder_linears(text).items():
        if text.model_type == "qwen2":
            bias = name.startswith("self_attn") and not name.endswith("o_proj")
        else:
            bias = text.attention_bias if name.startswith("self_attn") else text.mlp_bias
        shapes |= _linear(name, inputs, outputs, bias=bias)
    norms = ("input_layernorm", "post_attention_layernorm")
    return shapes | {f"{name}.weight": (text.hidden_size,) for name in norms}


def base_shapes(base: Any) -> Shapes:
    """Return the shapes of a known base model's parameters, by their names in transformers."""
    text, vision = base.text_config, base.vision_config
    width, channels = text.hidden_size, feature_size(base)[1]
    decoder, layer = "model.language_model.", decoder_shapes(text)
    shapes: Shapes = {f"model.vision_tower.{n}": s for n, s in _vision_shapes(vision)}
    if base.model_type == "llava_onevision":
        shapes["model.image_newline"] = (width,)
    biased = base.multimodal_projector_bias
    shapes |= _linear(f"model.{PROJECTOR}linear_1", channels, width, bias=biased)
    shapes |= _linear(f"model.{PROJECTOR}linear_2", width, width, bias=biased)
    shapes[f"{decoder}embed_tokens.weight"] = (text.vocab_size, width)
    for number in range(text.num_hidden_layers):
        shapes |= {f"{decoder}layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes[f"{decoder}norm.weight"] = (width,)
    if not base.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, width)
    return shapes


def _vision_shapes(vision: Any) -> Iterator[tuple[str, Shape]]:
    d, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    places, clip = (vision.image_size // patch) ** 2, vision.model_type == "clip_vision_model"
    if clip:
        yield "embeddings.class_embedding", (d,)
    yield "embeddings.patch_embedding.weight", (d, vision.num_channels, patch, patch)
    if not clip:
        yield "embeddings.patch_embedding.bias", (d,)
    yield "embeddings.position_embedding.weight", (places + clip, d)
    if clip:
        yield from _norm("pre_layrnorm", d)  # spelt so in transformers
    for number in range(vision.num_hidden_layers):
        layer = f"encoder.layers.{number}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}self_attn.{name}", d, d).items()
        yield from _norm(f"{layer}layer_norm1", d)
        yield from _norm(f"{layer}layer_norm2", d)
        yield from _linear(f"{layer}mlp.fc1", d, inner).items()
        yield from _linear(f"{layer}mlp.fc2", inner, d).items()
    yield from _norm("post_layernorm", d)
    if not clip and vision.vision_use_head:
        yield "head.probe", (1, 1, d)
        yield "head.attention.in_proj_weight", (3 * d, d)
        yield "head.attention.in_proj_bias", (3 * d,)
        yield from _linear("head.attention.out_proj", d, d).items()
        yield from _norm("head.layernorm", d)
        yield from _linear("head.mlp.fc1", d, inner).items()
        yield from _linear("head.mlp.fc2", inner, d).items()


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def numel(shapes: Mapping[str, Shape]) -> int:
    """Return the number of parameters."""
    return sum(math.prod(shape) for shape in shapes.values())


@dataclass(frozen=True)
class Layout:
    """Shapes and sizes of one client's parameters."""

    sent: dict[str, dict[str, list[int]]]
    """Group → tensor → shape of the shared parts of Θ_a and Θ_l, in `model.sent_dtype`."""
    private_bytes: int
    """Size of the private state after the last stage: ψ_s, T − 1 ψ_c, φ, and unshared tensors."""
    personal_bytes: int
    """Size of Ditto's second copy of Θ_a and Θ_l (`train.ditto`)."""
    moments_bytes: int
    """Size of AdamW's two moments of all tensors that the last stage trains (`train.schedule`)."""
    error_bytes: int
    """Size of the errors of compressed uploads (`model.sent_dtype`), 0 without compression."""


def layout_of(
    config: ModelConfig, tasks: tuple[str, ...], sharing: Sharing = WHOLE, *, stages: int = 2
) -> Layout:
    """Return a client's layout in a run of `stages` stages; only the last result is cached."""
    key = f"{config}/{len(tasks)}/{sharing}/{stages}"
    if key not in _LAYOUTS:
        _LAYOUTS.clear()  # one run, one layout
        # The last stage has every private and every sent tensor of the first.
        groups = group_shapes(config, read_config(config), tasks=tasks, stage=stages)
        width = DTYPE_BYTES[config.adapter_dtype]
        uploaded: list[GroupName] = [group for group, row in GROUPS.items() if row.sent]
        sent: dict[str, dict[str, list[int]]] = {
            group: {n: list(s) for n, s in groups[group].items() if sharing.sends(group, n)}
            for group in uploaded
        }
        private = sum(
            numel({n: s for n, s in shapes.items() if sharing.keeps(group, n)})
            for group, shapes in groups.items()
        )
        personal = sum(numel(groups[group]) for group in uploaded)
        trained = sum(
            numel({n: s for n, s in groups[group].items() if sharing.trains(group, n)})
            for group, row in GROUPS.items()
            if stages in row.stages
        )
        uploads = sum(math.prod(shape) for shapes in sent.values() for shape in shapes.values())
        _LAYOUTS[key] = Layout(
            sent,
            private_bytes=width * private,
            personal_bytes=width * personal,
            moments_bytes=2 * width * trained,
            error_bytes=DTYPE_BYTES[config.wire_dtype] * uploads if config.upload_bits else 0,
        )
    return _LAYOUTS[key]
