"""The base architectures: how images become rows of visual features, and rows become tokens.

An image is one or more *rows*: crops of equal size that the vision tower sees, each giving N
features of D channels. The connector maps rows to rows; what an architecture does between the
connector and the language model (LLaVA-OneVision puts its crops together again) has no
parameters that are trained and is its `ModelSpec.pack`.

To add an architecture, add a row to `SPECS` under its ``model_type``. It has to be a Hugging Face
model with ``model.vision_tower``, ``model.multi_modal_projector`` (two linear layers with a GELU
between them) and ``model.language_model``. For another checkpoint of an architecture that is
there, a file in ``conf/model/`` is enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_onevision import modeling_llava_onevision as onevision

from pilot_flwr.errors import ModelError

Size = tuple[int, int]
"""Height and width in pixels."""


class ImageShape(NamedTuple):
    """One image of a batch: how many rows it has, and its original size in pixels."""

    rows: int
    height: int
    width: int


class Visual(NamedTuple):
    """H_v of a batch's images.

    Attributes
    ----------
    features : Tensor
        Shape (R, N, D): the rows of all images, one image after the other.
    images : tuple of ImageShape
        The images, in the batch's order; their rows add up to R.
    """

    features: Tensor
    images: tuple[ImageShape, ...]


@dataclass(frozen=True)
class ModelSpec:
    """What differs between architectures.

    Attributes
    ----------
    model_class : str
        Name of the class in transformers.
    count_tokens : callable
        From (model configuration, sizes of one example's images) to the number of tokens that
        each image takes.
    count_rows : callable
        The same, to the rows that each image is.
    crops : callable
        From (image processor, one example's images) to one tensor (rows, 3, height, width) for
        each image.
    pack : callable
        From (model, connected rows (R, N, C), the batch's images) to the embeddings (S, C) that
        go to the places of the image tokens.
    has_video : bool
        Whether transformers' processor class also treats videos, for which it needs a library
        that nothing here does; its parts are then loaded one by one.
    """

    model_class: str
    count_tokens: Callable[[Any, Sequence[Size]], list[int]]
    count_rows: Callable[[Any, Sequence[Size]], list[int]]
    crops: Callable[[Any, Sequence[Image.Image]], list[Tensor]]
    pack: Callable[[Any, Tensor, Sequence[ImageShape]], Tensor]
    has_video: bool = False


def spec_of(config: Any) -> ModelSpec:
    """Return the row of a transformers model configuration.

    Raises
    ------
    ModelError
        The architecture has none, or its projector is not two layers with a GELU.
    """
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


def feature_size(config: Any) -> tuple[int, int]:
    """Return N and D: features of one row, and their channels."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # CLIP has a class token, which the strategy `default` drops and `full` keeps; SigLIP has none.
    has_class_token = "clip_vision" in vision.model_type
    kept = has_class_token - (config.vision_feature_select_strategy == "default")
    layers = config.vision_feature_layer
    return int(patches + kept), vision.hidden_size * (1 if isinstance(layers, int) else len(layers))


def select_features(config: Any, hidden_states: Sequence[Tensor]) -> Tensor:
    """Return the configured layers' features (R, N, D) from the vision tower's hidden states."""
    layers = config.vision_feature_layer
    chosen = [hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    features = torch.cat(chosen, dim=-1)
    return features[:, 1:] if config.vision_feature_select_strategy == "default" else features


def _llava_tokens(config: Any, sizes: Sequence[Size]) -> list[int]:
    return [feature_size(config)[0]] * len(sizes)


def _llava_rows(config: Any, sizes: Sequence[Size]) -> list[int]:
    return [1] * len(sizes)


def _llava_crops(image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
    pixels = image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    return list(pixels.split(1))


def _llava_pack(llava: Any, rows: Tensor, images: Sequence[ImageShape]) -> Tensor:
    return rows.flatten(0, 1)


def _onevision_tokens(config: Any, sizes: Sequence[Size]) -> list[int]:
    """One image is cut into crops by its size; of several images each is one row.

    What packing makes of the crops is counted by the model's own code, on tensors without content.
    """
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
    """Count the whole image, and its crops if it is the conversation's only one."""
    if len(sizes) != 1:
        return [1] * len(sizes)
    grid, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [onevision.image_size_to_num_patches(list(size), grid, side) for size in sizes]


def _onevision_crops(image_processor: Any, images: Sequence[Image.Image]) -> list[Tensor]:
    processed = image_processor(images=[list(images)], return_tensors="pt")
    pixels = processed["pixel_values"]
    if len(images) > 1:
        return [crops[:1] for crops in pixels]
    return list(pixels)


def _onevision_pack(llava: Any, rows: Tensor, images: Sequence[ImageShape]) -> Tensor:
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
        "LlavaForConditionalGeneration", _llava_tokens, _llava_rows, _llava_crops, _llava_pack
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
