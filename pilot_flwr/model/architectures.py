"""The base architectures: their configuration, and how images become rows of features and tokens.

An image is one or more *rows*: crops of equal size that the vision tower sees, each giving N
features of D channels. The connector maps rows to rows, and `ModelSpec.pack`, without trained
parameters, turns these into image tokens: LLaVA-OneVision reassembles its crops.

To add an architecture, add a row to `SPECS` under its ``model_type``. It has to be a Hugging Face
model with ``model.vision_tower``, ``model.multi_modal_projector`` (two linear layers with a GELU
between them) and ``model.language_model``. Another checkpoint of a known architecture needs only a
file in ``conf/model/``. Configurations made of the parts in `_DEFAULTS` are read without
transformers, which takes seconds to import; all others by transformers' ``AutoConfig``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.checkpoints import check_template, check_weights, find_file, reference_config

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels."""


class ImageShape(NamedTuple):
    """One image of a batch: its number of rows, and its original size in pixels."""

    rows: int
    height: int
    width: int


class Visual(NamedTuple):
    """H_v of a batch: the rows of all images in order, (R, N, D), and the images.

    Rows behind those of the images are seen by the connector alone (`train.text_only`).
    """

    features: Tensor
    images: tuple[ImageShape, ...]


@dataclass(frozen=True)
class ModelSpec:
    """The differences between architectures."""

    model_class: str
    """Name of the class in transformers."""
    count_tokens: Callable[[Any, Sequence[Size]], list[int]]
    """From configuration and image sizes of one example to the number of tokens of each image."""
    count_rows: Callable[[Any, Sequence[Size]], list[int]]
    """The same for the number of rows."""
    crops: Callable[[Any, Sequence[Image.Image]], list[Tensor]]
    """From image processor and images of one example to the rows (rows, 3, height, width)."""
    pack: Callable[[Any, Tensor, Sequence[ImageShape]], Tensor]
    """From model, connected rows (R, N, C) and images of a batch to the image tokens (S, C)."""
    has_video: bool = False
    """Whether transformers' processor class needs a video library, unused here: its parts are then
    loaded one by one."""


def spec_of(config: Any) -> ModelSpec:
    """Return the `SPECS` row of a base model's configuration."""
    if config.model_type not in SPECS:
        raise ModelError(
            f"`model.path` is a model of type {config.model_type!r} but must be one of "
            f"{', '.join(SPECS)}."
        )
    if config.projector_hidden_act != "gelu":
        raise ModelError(
            f"`model.path` has a projector with {config.projector_hidden_act!r} but must have "
            "'gelu'."
        )
    return SPECS[config.model_type]


def read_config(config: ModelConfig) -> Any:
    """Read a checkpoint's configuration; attributes are named as in transformers' class."""
    try:
        read = _read(find_file(config, "config.json"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`model.path` is {config.path!r}, which cannot be read: {error}"
        ) from error
    check_weights(config)
    check_template(config)
    return read


def known_config(config: ModelConfig) -> Any:
    """Read the configuration without the network: the checkpoint's, else the shipped one."""
    reference = reference_config(config.path)
    if reference is None:
        return read_config(config)
    try:
        read = _read(find_file(config, "config.json", download=False))
    except (OSError, ValueError):
        return _read(reference)
    check_weights(config)
    check_template(config)
    return read


def _read(file: str | Path) -> Any:
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    original = isinstance(values, dict) and "text_config" not in values
    if original and (keys := sorted(key for key in values if key.startswith("mm_"))):
        raise ModelError(
            f"`model.path` has a config.json in the original LLaVA format ({keys[0]!r}, no "
            "'text_config'). Convert the checkpoint to the Hugging Face format, or name a "
            "converted one, such as llava-hf/llava-1.5-7b-hf."
        )
    if (read := _plain_config(values)) is None:
        import transformers

        read = transformers.AutoConfig.from_pretrained(  # nosec B615  # a local file
            str(file), trust_remote_code=False
        )
    spec_of(read)
    return read


_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_BASE: dict[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
_SIDES = range(384, 2305, 384)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llava": _BASE | {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    "llava_onevision": _BASE
    | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    | {"vision_aspect_ratio": "anyres_max_9"}
    | {"image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES]},
    "clip_vision_model": _VISION
    | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _VISION
    | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    | {"vision_use_head": True},
    "llama": _TEXT
    | {"vocab_size": 32000, "intermediate_size": 11008}
    | {"attention_bias": False, "mlp_bias": False},
    "qwen2": _TEXT | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
}
"""transformers' defaults of the values used here, by ``model_type``."""


def is_plain(config: Any) -> bool:
    """Whether a configuration was read without transformers, so that `shapes` knows its parts."""
    return isinstance(config, SimpleNamespace)


def _plain_config(values: Mapping[str, Any]) -> SimpleNamespace | None:
    """Build a configuration of known parts; None if transformers has to read it."""
    text = _plain_part(values.get("text_config"), ("llama", "qwen2"))
    vision = _plain_part(values.get("vision_config"), ("clip_vision_model", "siglip_vision_model"))
    if values.get("model_type") not in SPECS or text is None or vision is None:
        return None
    base = SimpleNamespace(**{**_DEFAULTS[values["model_type"]], **values})
    base.text_config, base.vision_config = text, vision
    base.tie_word_embeddings = base.tie_word_embeddings or text.tie_word_embeddings
    heads = text.num_attention_heads
    text.num_key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    if text.model_type == "llama":
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.rope_parameters = {"rope_theta": getattr(text, "rope_theta", 10000.0)} | (
        getattr(text, "rope_parameters", None) or {}
    )
    usual = text.hidden_size % heads == 0 and not getattr(text, "use_sliding_window", False)
    return base if usual else None


def _plain_part(values: Any, types: Sequence[str]) -> SimpleNamespace | None:
    """Complete one part with its defaults; None for an unknown type or an invalid size."""
    if not isinstance(values, dict) or values.get("model_type") not in types:
        return None
    defaults = _DEFAULTS[values["model_type"]]
    part = {**defaults, **values}
    sizes = [part[name] for name, default in defaults.items() if type(default) is int]
    sizes += [part[name] for name in ("num_key_value_heads", "head_dim") if part.get(name)]
    valid = all(type(size) is int and size > 0 for size in sizes)
    return SimpleNamespace(**part) if valid else None


def check_targets(linear: Iterable[str], targets: Iterable[str]) -> None:
    """Raise `ModelError` for a LoRA target that matches no linear layer; peft would skip it."""
    names = [f".{name}" for name in linear]
    if unknown := [t for t in targets if not any(n.endswith(f".{t}") for n in names)]:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ModelError(
            f"`model.lora.targets` names {unknown} but must name linear layers, of {known}."
        )


def feature_size(config: Any) -> tuple[int, int]:
    """Return N and D: the features of one row and their channels."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # CLIP has a class token, which the strategy `default` drops and `full` keeps; SigLIP has none.
    has_class_token = "clip_vision" in vision.model_type
    kept = has_class_token - (config.vision_feature_select_strategy == "default")
    layers = config.vision_feature_layer
    return int(patches + kept), vision.hidden_size * (1 if isinstance(layers, int) else len(layers))


def select_features(config: Any, hidden_states: Sequence[Tensor]) -> Tensor:
    """Return the configured layers' features (R, N, D) from the vision tower's hidden states."""
    import torch

    layers = config.vision_feature_layer
    chosen = [hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    features = torch.cat(chosen, dim=-1)
    return features[:, 1:] if config.vision_feature_select_strategy == "default" else features


def _llava_crops(image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
    pixels = image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    return list(pixels.split(1))


def _onevision_tokens(config: Any, sizes: Sequence[Size]) -> list[int]:
    """Count the tokens that remain after packing, by the model's own code on meta tensors."""
    import torch
    from transformers.models.llava_onevision import modeling_llava_onevision as onevision

    tokens = feature_size(config)[0]
    counts = []
    for size, rows in zip(sizes, _onevision_rows(config, sizes), strict=True):
        features = torch.empty(rows, tokens, 1, device="meta")
        (packed,), _ = onevision.LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=config),
            [features],
            [list(size)],
            image_newline=torch.empty(1, device="meta"),
            vision_aspect_ratio=config.vision_aspect_ratio,
        )
        counts.append(len(packed))
    return counts


def _onevision_rows(config: Any, sizes: Sequence[Size]) -> list[int]:
    """Count the whole image, and its crops if it is the example's only image."""
    if len(sizes) != 1:
        return [1] * len(sizes)
    from transformers.models.llava_onevision import modeling_llava_onevision as onevision

    grid, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [onevision.image_size_to_num_patches(list(size), grid, side) for size in sizes]


def _onevision_crops(image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
    pixels = image_processor(images=[list(images)], return_tensors="pt")["pixel_values"]
    return [crops[:1] for crops in pixels] if len(images) > 1 else list(pixels)


def _onevision_pack(llava: Any, rows: Tensor, images: Sequence[ImageShape]) -> Tensor:
    import torch

    parts = torch.split(rows, [image.rows for image in images])
    packed, _ = llava.model.pack_image_features(
        parts,
        torch.tensor([[image.height, image.width] for image in images]),
        image_newline=llava.model.image_newline,
        vision_aspect_ratio=llava.config.vision_aspect_ratio,
    )
    return torch.cat(packed)


SPECS: dict[str, ModelSpec] = {
    "llava": ModelSpec(
        "LlavaForConditionalGeneration",
        count_tokens=lambda config, sizes: [feature_size(config)[0]] * len(sizes),
        count_rows=lambda config, sizes: [1] * len(sizes),
        crops=_llava_crops,
        pack=lambda llava, rows, images: rows.flatten(0, 1),
    ),
    "llava_onevision": ModelSpec(
        "LlavaOnevisionForConditionalGeneration",
        _onevision_tokens,
        _onevision_rows,
        _onevision_crops,
        _onevision_pack,
        has_video=True,
    ),
}
"""Architecture by transformers' ``model_type``."""
