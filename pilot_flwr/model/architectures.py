"""The families of base models, and how to read a checkpoint's configuration.

Pilot's connector takes the place of the projector, the base model's own connector, and the model's
forward pass does everything else: image tokens, packing, positions and masks. So a family is one
row of `SPECS`: where its vision tower and its projector are, which layer of the projector is the
last, and how features merge into tokens. docs/how-to/add-base-model.md adds one. Another checkpoint
of a family needs only a file in ``conf/model/``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.checkpoints import (
    check_template,
    check_weights,
    find_file,
    reference_config,
    user_cache,
)
from pilot_flwr.run.atomic import write_text
from pilot_flwr.run.provenance import code_hash

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_CONFIGURATIONS = ("config.json", "preprocessor_config.json", "processor_config.json")
_KEPT_SECONDS = 30 * 86400


@dataclass(frozen=True)
class ModelSpec:
    """One family: module paths are relative to the ``model`` of its class in transformers."""

    projector: str = "multi_modal_projector"
    last: str = "linear_2"
    """The projector's last layer, or that layer's parameter."""
    tower: str = "vision_tower"
    side: Callable[[Any], int] = lambda config: 1
    """Maps the configuration to the root of the number of features that a token merges."""
    square: bool = True
    """Whether a token merges a square of the image's grid, or features that adjoin in H_v."""
    besides: str = ""
    """A module list in the tower whose outputs reach the language model besides H_v."""
    whole: int = 0
    """Index of the whole image among the rows of a cropped image: 0 or -1."""
    crops_alone: bool = False
    """Whether an image is cropped only if its example has no other."""
    feature_map: bool = False
    """Whether the tower, which may be of any class, returns a feature map (B, D, H, W)."""
    processor: str = ""
    """Class of its processor, if transformers' auto classes have none for the family."""


def _gemma_side(config: Any) -> int:
    patches = config.vision_config.image_size // config.vision_config.patch_size
    return int(patches // config.mm_tokens_per_image**0.5)


_LLAVA = ModelSpec()
_QWEN3 = ModelSpec(
    projector="visual.merger",
    last="linear_fc2",
    tower="visual",
    side=lambda config: int(config.vision_config.spatial_merge_size),
    square=False,
    besides="visual.deepstack_merger_list",
)
_IDEFICS = ModelSpec(
    projector="connector",
    last="modality_projection.proj",
    tower="vision_model",
    side=lambda config: int(config.scale_factor),
    whole=-1,
)

SPECS: dict[str, ModelSpec] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": ModelSpec(crops_alone=True),
    "internvl": ModelSpec(whole=-1),
    "gemma3": ModelSpec(last="mm_input_projection_weight", side=_gemma_side),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_5_vl": ModelSpec(
        projector="visual.merger", last="mlp.2", tower="visual", side=_QWEN3.side, square=False
    ),
    "qwen3_vl": _QWEN3,
    "fast_vlm": ModelSpec(feature_map=True, processor="LlavaProcessor"),
}
"""Family by transformers' ``model_type``."""


def spec_of(config: Any) -> ModelSpec:
    """Return the family of a base model's configuration; raise `ModelError` for an unknown one."""
    if config.model_type not in SPECS:
        raise ModelError(
            f"`model.path` is a model of type {config.model_type!r} but must be one of "
            f"{', '.join(SPECS)}. docs/how-to/add-base-model.md adds a family."
        )
    return SPECS[config.model_type]


def merge_of(config: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that maps H_v to the features that each visual token merges."""
    from pilot_flwr.algorithm.connector import merge_features

    spec = spec_of(config)
    return functools.partial(merge_features, side=spec.side(config), square=spec.square)


def token_channels(config: Any) -> int:
    """Return the number of channels of the features that a visual token merges."""
    layers = getattr(config, "vision_feature_layer", None)
    layered = len(layers) if isinstance(layers, list | tuple) else 1
    shuffled = getattr(config, "downsample_ratio", 1)  # InternVL, before its projector
    merged = spec_of(config).side(config) / shuffled
    return int(config.vision_config.hidden_size * layered * merged**2)


def feature_shape(config: Any, pixels: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of H_v for `pixels` of a shape: (R, N, D), or (R, D) for packed patches."""
    channels = token_channels(config) // spec_of(config).side(config) ** 2
    if len(pixels) == 2:
        return pixels[0], channels
    *rows, _, height, width = pixels
    vision = config.vision_config
    if spec_of(config).feature_map:
        return math.prod(rows), _map_size(vision, pixels[-3:]), channels
    edge = vision.patch_size[0] if isinstance(vision.patch_size, list) else vision.patch_size
    patches = (height // edge) * (width // edge)
    count = int(patches * getattr(config, "downsample_ratio", 1) ** 2)
    # CLIP's class token is kept by LLaVA's strategy `full` alone.
    kept = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return math.prod(rows), count + (kept and "clip" in vision.model_type), channels


def _map_size(vision: Any, pixels: tuple[int, ...]) -> int:
    """Return H x W of a tower's feature map, by a forward pass on the meta device."""
    import torch
    import transformers

    with missing_package_explained(), torch.device("meta"):
        tower = transformers.AutoModel.from_config(vision).eval()
        features = tower(torch.empty(1, *pixels)).last_hidden_state
    if features.dim() != 4 or features.shape[1] != vision.hidden_size:
        raise ModelError(
            f"The vision tower in `model.path` returns features of shape {tuple(features.shape)} "
            f"but must return a map (B, D, H, W) of D = {vision.hidden_size} channels, "
            "`vision_config.hidden_size`."
        )
    return int(features.shape[-2:].numel())


@contextlib.contextmanager
def missing_package_explained() -> Iterator[None]:
    """Turn the error of a package that a base model's class needs into a `ModelError`."""
    try:
        yield
    except ImportError as error:
        needed = " ".join(str(error).split())
        raise ModelError(f"The base model in `model.path` needs a package: {needed}") from error


def read_config(config: ModelConfig) -> Any:
    """Read a checkpoint's configuration; return an object of transformers' class."""
    try:
        read = _read(find_file(config, "config.json"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`model.path` is {config.path!r}, which cannot be read: {error}"
        ) from error
    check_files(config)
    return read


def known_config(config: ModelConfig) -> Any:
    """Read the configuration without the network: the checkpoint's, else the shipped one."""
    file = known_file(config)
    if file is None:
        return read_config(config)
    read = _read(file)
    check_files(config)
    return read


def check_files(config: ModelConfig) -> None:
    """Raise `ModelError` for damaged weights or an unfit chat template on this machine."""
    check_weights(config)
    check_template(config)


class Decoder(NamedTuple):
    """A base model's family, and its decoder's sizes."""

    family: str
    layers: int
    width: int
    vocabulary: int


def decoder_of(config: ModelConfig) -> Decoder:
    """Return the sizes of a base model's decoder; they are `remembered`."""

    def read() -> Decoder:
        base = known_config(config)
        text = base.text_config
        return Decoder(base.model_type, text.num_hidden_layers, text.hidden_size, text.vocab_size)

    check_files(config)
    return Decoder(*remembered("decoders", config, (), read))


def remembered(kind: str, config: ModelConfig, key: object, compute: Callable[[], T]) -> T:
    """Return the dict or list that `compute` derives from a base model's configuration.

    It is computed once and kept in the user's cache as JSON, under the content of the configuration
    and of the processor's files, `key`, and the versions of this package and of the libraries.
    """
    file = known_file(config)
    if file is None:
        return compute()
    files = (Path(file).with_name(name) for name in _CONFIGURATIONS)
    contents = [path.read_bytes() for path in files if path.is_file()]
    versions = [code_hash(), *map(importlib.metadata.version, ("peft", "torch", "transformers"))]
    folder = user_cache() / "base" / _digest(versions)[:16]
    path = folder / f"{kind}-{_digest((contents, config.revision, key))}.json"
    with contextlib.suppress(OSError, ValueError):
        found: T = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict | list):
            return found
    value = compute()
    with contextlib.suppress(OSError):
        if not folder.is_dir():
            folder.mkdir(parents=True)
            _remove_old(folder.parent)
        write_text(path, json.dumps(value))
    return value


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _remove_old(folder: Path) -> None:
    """Remove the folders of versions that have added no file for a month."""
    for version in folder.iterdir():
        if time.time() - version.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(version, ignore_errors=True)


def known_file(config: ModelConfig) -> str | None:
    """Return the configuration's file on this machine: the checkpoint's, else the shipped one."""
    try:
        return find_file(config, "config.json", download=False)
    except (OSError, ValueError):
        reference = reference_config(config.path)
        return None if reference is None else str(reference)


def _read(file: str | Path) -> Any:
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    original = isinstance(values, dict) and "text_config" not in values
    if original and (keys := sorted(key for key in values if key.startswith("mm_"))):
        raise ModelError(
            f"`model.path` has a config.json in the original LLaVA format ({keys[0]!r}, no "
            "'text_config'). Convert the checkpoint to the Hugging Face format, or name a "
            "converted one, such as llava-hf/llava-1.5-7b-hf."
        )
    import transformers

    read = transformers.AutoConfig.from_pretrained(  # nosec B615  # a local file
        str(file), trust_remote_code=False
    )
    spec_of(read)
    return read


def check_targets(linear: Iterable[str], targets: Iterable[str]) -> None:
    """Raise `ModelError` for a LoRA target that matches no linear layer; peft would skip it."""
    names = [f".{name}" for name in linear]
    if unknown := [t for t in targets if not any(n.endswith(f".{t}") for n in names)]:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ModelError(
            f"`model.lora.targets` names {unknown} but must name linear layers, of {known}."
        )
