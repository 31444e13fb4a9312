"""Load a model that was tuned with Pilot, without the code that tuned it.

This file is part of the exported folder. It needs only torch, transformers, peft, safetensors and
Pillow::

    from modeling_pilot import load

    model, processor = load(".")

`model` is a `peft.PeftModel` around the base model: LoRA in the language model, Pilot's connector
in place of the base's own, the projector. It generates as the base model does. The folder contains

    connector.json           architecture of the connector, and the base model
    connector.safetensors    its weights
    lora/                    the LoRA in peft's own format
    base/                    the base model, if it is not published

Pilot: Xiong et al., AAAI 2025, arXiv 2501.13985.
"""

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING_NAMES,
    processor_class_from_name,
)

FORMAT = "pilot-export-2"


class Connector(nn.Module):
    """Takes the place of the base model's projector, of which every adapter ψ is a copy.

    Stage 1 is ``ψ_t(H) + ψ_s(H)``. Stage 2 is ``ψ_s(H) + Σ_i P_i h_i`` with ``P = softmax(H W_φ)``
    per visual token, ``h_1 = ψ_t^1(H)`` for the own task and ``h_i = ψ_t^i(H) + ψ_c^i(H)`` for the
    others. `description`, the entry `connector` of ``connector.json``, may omit ψ_s and all ψ_c.
    """

    def __init__(self, description: dict[str, Any], projector: nn.Module) -> None:
        super().__init__()

        def adapter() -> nn.Module:
            return copy.deepcopy(projector)

        self.tasks = list(description["tasks"])
        self.stage = int(description["stage"])
        self.side, self.square = int(description["side"]), bool(description["square"])
        self.client_adapter = adapter() if description["client_adapter"] else None
        if self.stage == 1:
            self.task_adapter = adapter()
        else:
            self.task_adapters = nn.ModuleDict({task: adapter() for task in self.tasks})
            crossed = self.tasks[1:] if description.get("cross_task_adapters", True) else []
            self.cross_task_adapters = nn.ModuleDict({task: adapter() for task in crossed})
            self.router = nn.Linear(description["router_channels"], len(self.tasks), bias=False)
        self.router_dtype = getattr(torch, description.get("router_dtype", "float32"))
        self.to(getattr(torch, description["dtype"]))

    def forward(self, features: Tensor) -> Tensor:
        """Return x_img in the dtype of `features`."""
        inputs = features.to(next(self.parameters()).dtype)
        if self.stage == 1:
            output = _tokens(self.task_adapter, inputs)
            if self.client_adapter is not None:
                output = output + _tokens(self.client_adapter, inputs)
        else:
            output = self._mixture(inputs)
        return output.to(features.dtype)

    def _mixture(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            dtype = self.router_dtype
            parts = self._parts(inputs).to(dtype)
            logits = nn.functional.linear(parts, self.router.weight.to(dtype))
        probs = logits.softmax(-1, dtype=torch.float32).to(dtype)
        mixed = None if self.client_adapter is None else _tokens(self.client_adapter, inputs)
        for index, task in enumerate(self.tasks):
            expert = _tokens(self.task_adapters[task], inputs)
            if task in self.cross_task_adapters:
                expert = expert + _tokens(self.cross_task_adapters[task], inputs)
            weight = probs[..., index, None].to(expert.dtype)
            mixed = weight * expert if mixed is None else torch.addcmul(mixed, weight, expert)
        assert mixed is not None
        return mixed

    def _parts(self, features: Tensor) -> Tensor:
        """Return the `side`² features that each visual token merges, side by side."""
        *batch, count, channels = features.shape
        if self.square and self.side > 1:
            edge = round(count**0.5) // self.side
            grid = features.reshape(*batch, edge, self.side, edge, self.side, channels)
            features = grid.transpose(-4, -3)
        return features.reshape(*batch, count // self.side**2, self.side**2 * channels)


def _tokens(adapter: nn.Module, features: Tensor) -> Tensor:
    """Return an adapter's tokens (..., S, C); some projectors give those of an image as a grid."""
    tokens: Tensor = adapter(features)
    return tokens.flatten(features.dim() - 2, -2)


def load(folder: str | Path = ".", base: str | Path | None = None, **options: Any) -> Any:
    """Return model and processor: `load_model` and `load_processor`."""
    return load_model(folder, base, **options), load_processor(folder, base)


def load_model(folder: str | Path = ".", base: str | Path | None = None, **options: Any) -> Any:
    """Return the model.

    Parameters
    ----------
    folder : str or Path
        The exported folder.
    base : str or Path, optional
        The base model, if not as in ``connector.json``.
    **options
        For the base model's `from_pretrained`, for instance ``device_map="auto"``,
        ``dtype=torch.bfloat16`` or a `quantization_config`.

    Raises
    ------
    ValueError
        A file is of another format, or a key is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    description = _describe(folder)
    source = _source(folder, description, base)
    options.setdefault("dtype", getattr(torch, description["base"]["dtype"]))
    options.setdefault("use_safetensors", True)  # weights in another format would be unpickled
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(  # nosec B615  # has it
        **source, output_loading_info=True, **options
    )
    if problems := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
        raise ValueError(f"The base model does not fit its own class: {problems}")
    place = description["connector"]["place"]
    connector = Connector(description["connector"], model.model.get_submodule(place))
    _fill(connector.state_dict(), folder / "connector.safetensors")
    model.model.set_submodule(place, connector.to(model.device))
    model.generation_config.eos_token_id = description["end_token_ids"]
    lora = peft.PeftConfig.from_pretrained(str(folder / "lora"))
    model = peft.PeftModel(model, lora, autocast_adapter_dtype=False)
    _load_lora(model, folder / "lora" / "adapter_model.safetensors")
    return model.eval()


def load_processor(folder: str | Path = ".", base: str | Path | None = None) -> Any:
    """Return the base model's processor, set to pad text on the left, and images as in the tuning.

    Without torchvision, processors that also take videos take images alone. A family without an
    automatic class of processor has none for videos.
    """
    folder = Path(folder)
    description = _describe(folder)
    source = _source(folder, description, base)
    kind: Any = transformers.AutoProcessor
    options: dict[str, None] = {}
    if importlib.util.find_spec("torchvision") is None:
        config = transformers.AutoConfig.from_pretrained(**source)  # nosec B615  # has revision
        kind, options = _for_images(config.model_type)
    processor = kind.from_pretrained(**source, **options)  # nosec B615  # has revision
    processor.tokenizer.padding_side = "left"  # answers begin where prompts end
    pad = description["image_aspect_ratio"] == "pad"
    official = description["image_reading"] == "official"
    _read_as_in_tuning(processor.image_processor, pad=pad, official=official)
    return processor


def _for_images(model_type: str) -> tuple[Any, dict[str, None]]:
    """Return a family's processor class without its part for videos, and options for loading."""
    if model_type not in PROCESSOR_MAPPING_NAMES:
        return transformers.AutoProcessor, {}
    family: Any = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
    parts = family.get_attributes()
    kept = [part for part in parts if part != "video_processor"]

    class ImageTextProcessor(family):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return kept

    return ImageTextProcessor, {"video_processor": None} if kept != parts else {}


def to_rgb(image: Image.Image, *, official: bool) -> Image.Image:
    """Return an image in RGB as viewers show it, or as LLaVA's code reads it."""
    if not official:
        image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # greys of 12 or 16 bits; 258 is TIFF's BitsPerSample
        (bits, *_) = getattr(image, "tag_v2", {}).get(258, (16,))
        values = np.asarray(image).astype(np.int32)
        if bits > 16 or values.min() < 0 or values.max() > 65_535:
            raise ValueError("Grey values must have 8 to 16 bits.")
        levels = values >> (bits - 8)
        if transparent is not None and not official:
            levels[values == transparent] = 255
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "F" or (isinstance(transparent, tuple) and max(transparent) > 255):
        raise ValueError("Colours must have 8 bits, and greys at most 16.")
    if official:
        image = image.copy()
        image.info.pop("transparency", None)  # Pillow would warn of a palette's
    if not image.has_transparency_data or official:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    white = Image.new("RGBA", pixels.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, pixels).convert("RGB")


def expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre the image, in RGB, on a square, as LLaVA-1.5 does."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _read_as_in_tuning(image_processor: Any, *, pad: bool, official: bool) -> None:
    """Let the image processor first convert images to RGB, and pad them in its mean colour."""
    colour = tuple(math.floor(255 * mean) for mean in image_processor.image_mean)
    kind = type(image_processor)

    def read(images: Any) -> Any:
        if isinstance(images, list | tuple):
            return [read(image) for image in images]
        if isinstance(images, Image.Image):
            pixels = to_rgb(images, official=official)
            return expand_to_square(pixels, colour) if pad else pixels
        if pad:
            raise ValueError("This model's images are padded: give them as PIL images.")
        return images

    def preprocess(self: Any, images: Any, *args: Any, **options: Any) -> Any:
        return kind.preprocess(self, read(images), *args, **options)

    image_processor.__class__ = type(kind.__name__, (kind,), {"preprocess": preprocess})


def _describe(folder: Path) -> dict[str, Any]:
    description: dict[str, Any] = json.loads((folder / "connector.json").read_text("utf-8"))
    if (found := description.get("format")) != FORMAT:
        raise ValueError(f"connector.json has format {found!r} but must have {FORMAT!r}.")
    return description


def _source(folder: Path, description: dict[str, Any], base: str | Path | None) -> dict[str, str]:
    origin = description["base"]
    own = folder / "base" if origin["included"] else origin["path"]
    source = {"pretrained_model_name_or_path": str(base or own)}
    if origin["revision"] and base is None:
        source["revision"] = origin["revision"]
    return source


def _load_lora(model: Any, file: Path) -> None:
    """Take the LoRA's values and dtype from a file, which must have exactly its keys.

    `PeftModel.from_pretrained` only warns of a missing key and ignores an unexpected one.
    """
    own = {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    state = load_file(file)
    for name, parameter in own.items():
        if name in state and state[name].shape == parameter.shape:
            parameter.data = parameter.data.to(state[name].dtype)
    _fill(own, file)


def _fill(own: dict[str, Any], file: Path) -> None:
    state = load_file(file)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"{file.name}: missing {missing}, unexpected {unexpected}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{file.name}: `{name}` has shape {tuple(tensor.shape)} but must have "
                f"{tuple(own[name].shape)}"
            )
        own[name].data.copy_(tensor)
