"""A checkpoint's processor, and the layout of an image of a given size.

The tokens of an image and the model's image inputs besides pixels depend on the image's size alone.
So they are computed once per size, from a blank image: training on kept features decodes no image.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pilot_flwr.config.model import ModelConfig
from pilot_flwr.model.architectures import (
    ModelSpec,
    feature_shape,
    known_config,
    known_file,
    spec_of,
)
from pilot_flwr.model.checkpoints import locate

if TYPE_CHECKING:
    import PIL.Image

Size = tuple[int, int]
"""Height and width in pixels."""

Inputs = dict[str, Tensor]
"""Image inputs of a base model, by their names in its forward pass."""

PIXELS = "pixel_values"
_VIDEO = "video_processor"
_TOGETHER = "batch_num_images"
_MASK = "pixel_attention_mask"
_INPUTS = (PIXELS, _TOGETHER, "image_sizes", "image_grid_thw", _MASK)
_MOST_LAYOUTS = 4096
_PROBES = ((480, 640), (640, 480), (200, 200))

# The layout does not depend on pixel values, so these steps are skipped.
_BLANK = {"do_rescale": False, "do_normalize": False, "resample": 0}


class Layout(NamedTuple):
    """Text and inputs of images of one size."""

    text: str
    """Replaces the image token in a conversation."""
    shape: tuple[int, ...]
    """Shape of the pixels."""
    others: Inputs
    """The inputs besides pixels: sizes and grids."""

    @property
    def rows(self) -> int:
        """Number of rows of H_v: crops, or patches where the tower packs them."""
        return rows_of(self.shape)


def rows_of(shape: Sequence[int]) -> int:
    """Return the number of rows of H_v for pixels of this shape."""
    return int(torch.Size(shape[:-3] if len(shape) > 3 else shape[:1]).numel())


def processor_class(config: Any) -> Any:
    """Return a family's class of processor without its part for videos, which needs torchvision."""
    from transformers.models.auto import processing_auto as auto

    name = auto.PROCESSOR_MAPPING_NAMES.get(config.model_type, spec_of(config).processor)
    family: Any = auto.processor_class_from_name(name)

    class ImageTextProcessor(family):  # type: ignore[misc]
        without: Mapping[str, None] = dict.fromkeys({_VIDEO}.intersection(family.get_attributes()))
        """Arguments of `from_pretrained` that leave the part out."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in family.get_attributes() if name != _VIDEO]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """Accept any tokenizer, also `PlaceholderTokenizer`."""

    return ImageTextProcessor


class PlaceholderTokenizer:
    """Replaces the tokenizer where an image's tokens are only counted.

    Every special token that a processor asks for is `letter`; those that it names itself are in
    angle brackets.
    """

    letter = "\N{BLACK SQUARE}"
    init_kwargs: Mapping[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if "token" not in name:
            raise AttributeError(name)
        return 0 if name.endswith("_id") else self.letter

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return an id."""
        return [0]

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return an id."""
        return 0

    def add_special_tokens(self, tokens: Any) -> None:
        """Add nothing: every token is known."""

    @classmethod
    def count(cls, text: str) -> int:
        """Return the number of special tokens in a text."""
        return len(re.findall(rf"{cls.letter}|<[^<>]+>", text))


class Processor:
    """A checkpoint's tokenizer, chat template and image processor.

    `original` is transformers' processor of the family's `spec`.
    """

    def __init__(self, processor: Any, spec: ModelSpec) -> None:
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.image_token: str = processor.image_token
        self.crops_alone = spec.crops_alone
        self.original = processor
        merged = processor._merge_kwargs(
            tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt"
        )
        self._options = merged["images_kwargs"]
        self._layout = functools.lru_cache(_MOST_LAYOUTS)(self._blank_layout)

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool = False) -> str:
        """Render a conversation."""
        text: str = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.original.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    @property
    def image_token_ids(self) -> set[int]:
        """Ids of the tokens that belong to an image."""
        return set(self.original.image_token_ids)

    def token_types(self, ids: list[int]) -> list[int] | None:
        """Return 1 for tokens of images and 0 for others; None if the model needs no types."""
        if not self.original.return_mm_token_type_ids:
            return None
        (types,) = self.original.create_mm_token_type_ids([ids])
        return [int(kind) for kind in types]

    @property
    def token_types_name(self) -> str:
        """The name of `token_types` in the model's forward pass."""
        names = self.original.model_input_names
        return "token_type_ids" if "token_type_ids" in names else "mm_token_type_ids"

    def image_texts(self, sizes: Sequence[Size]) -> list[str]:
        """Return the texts that replace the image tokens of one example."""
        return [self.layout(size, alone=len(sizes) == 1).text for size in sizes]

    def layout(self, size: Size, *, alone: bool) -> Layout:
        """Return the layout of an image; `alone` says whether it is its example's only one."""
        return self._layout(size, alone or not self.crops_alone)

    def inputs(self, image: "PIL.Image.Image", *, alone: bool) -> Inputs:
        """Return an image's inputs."""
        return self._process(image, alone=alone)[0]

    def _blank_layout(self, size: Size, alone: bool) -> Layout:
        from PIL import Image  # a plan needs none

        height, width = size
        blank = Image.new("RGB", (width, height))
        inputs, text = self._process(blank, alone=alone, **_BLANK)
        shape = tuple(inputs.pop(PIXELS).shape)
        inputs.pop(_MASK, None)  # large, and without it all is valid
        return Layout(text, shape, inputs)

    def _process(
        self, image: "PIL.Image.Image", *, alone: bool, **options: Any
    ) -> tuple[Inputs, str]:
        together = self.crops_alone and not alone
        images = [[image] * 2] if together else [image]
        processed, (text, *_) = self.original._process_images(images, **(self._options | options))
        inputs = {name: processed[name] for name in _INPUTS if name in processed}
        return {n: t[: len(t) // 2] if together else t for n, t in inputs.items()}, text


def stand_in(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return pixels without content, for a model that reads kept features.

    `shapes` are those of the images' pixels. All values are 1: some models take zeros for padding.
    """
    rows, (_, *rest) = sum(shape[0] for shape in shapes), shapes[0]
    one = torch.ones((), device=device, dtype=dtype)
    if len({tuple(shape[1:]) for shape in shapes}) == 1:
        return one.expand(rows, *rest)
    return _padded([one.expand(shape) for shape in shapes])


def collate(images: Sequence[Mapping[str, Tensor]], *, together: Sequence[int] = ()) -> Inputs:
    """Join the inputs of several images; pad smaller ones with zeros, as transformers does.

    `together` has the number of images of every example, for families that need it.
    """
    joined = {name: _padded([image[name] for image in images]) for name in images[0]}
    return joined | ({_TOGETHER: torch.tensor(together)} if _TOGETHER in joined else {})


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    shapes = torch.tensor([tensor.shape[1:] for tensor in tensors])
    missing = shapes.amax(0) - shapes
    padding = [[n for m in reversed(row.tolist()) for n in (0, m)] for row in missing]
    return torch.cat(
        [
            torch.nn.functional.pad(tensor, pad) if any(pad) else tensor
            for tensor, pad in zip(tensors, padding, strict=True)
        ]
    )


def planned_image(config: ModelConfig, size: Size) -> tuple[tuple[int, ...], int]:
    """Return the shape of H_v of an image and the number of its tokens; needs no tokenizer."""
    read = known_config(config)
    layout = processor_without_tokenizer(config).layout(size, alone=True)
    return feature_shape(read, layout.shape), PlaceholderTokenizer.count(layout.text)


def probe_images(config: ModelConfig) -> list[object]:
    """Return shapes and token counts of images of three sizes, and the normalization settings."""
    processor = processor_without_tokenizer(config)
    layouts = [processor.layout(size, alone=True) for size in _PROBES]
    names = ("image_mean", "image_std", "resample", "do_rescale", "do_normalize", "rescale_factor")
    settings = processor.image_processor.to_dict()
    return [
        [[list(layout.shape), PlaceholderTokenizer.count(layout.text)] for layout in layouts],
        {name: settings.get(name) for name in names},
    ]


def processor_without_tokenizer(
    config: ModelConfig, placeholder: type[PlaceholderTokenizer] = PlaceholderTokenizer
) -> Processor:
    """Build a checkpoint's processor with a placeholder for its tokenizer."""
    import transformers

    read = known_config(config)
    folder = str(Path(known_file(config) or locate(config)).parent)
    values, _ = transformers.ProcessorMixin.get_processor_dict(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)  # nosec B615  # local files
    family = processor_class(read)
    processor = family.from_args_and_dict([images, placeholder()], values | family.without)
    return Processor(processor, spec_of(read))
