"""The models to measure, with random weights made on the device, and their batches.

To add a size, add a row to `SIZES` with a configuration that the package ships.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.data.collator import IGNORE_INDEX, Batch
from pilot_flwr.data.examples import Example, Turn
from pilot_flwr.model.architectures import feature_shape, known_config
from pilot_flwr.model.memory import MicroBatch
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.processor import (
    PIXELS,
    Inputs,
    Layout,
    PlaceholderTokenizer,
    Processor,
    collate,
    processor_without_tokenizer,
)
from pilot_flwr.model.slot import Visual

TASKS = ("vqa", "ocr", "captions")
"""T = 3 as in the paper; the first is the client's own."""

EXAMPLE = Example("fixed", (), (Turn("user", "a"), Turn("assistant", "b")))
"""A placeholder: `FixedData` only counts examples."""

IMAGE = "<image>"


class ImagePlaceholderTokenizer(PlaceholderTokenizer):
    """Replaces the tokenizer, and tells the visual tokens of an image from its other tokens."""

    image_token = context_image_token = IMAGE
    model_input_names = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Size:
    """A model to measure.

    Attributes
    ----------
    path : str
        Checkpoint with the model's configuration.
    lora : LoraConfig
        Θ_l.
    text_tokens, answer_tokens : int
        Tokens of an example besides its image's; those of them that carry a label.
    matrix : int
        Side of the square matrices by which the device's rate is measured.
    image : tuple of int
        Height and width of an example's image.
    layers : tuple of int
        Layers of decoder and vision tower; empty: all.
    """

    path: str
    lora: LoraConfig
    text_tokens: int = 128
    answer_tokens: int = 32
    matrix: int = 8192
    image: tuple[int, int] = (336, 336)
    layers: tuple[int, int] | tuple[()] = ()

    def config(self, *, checkpointing: bool = False, compiled: bool = False) -> ModelConfig:
        """Return the settings: a bfloat16 base with float32 adapters, sent as bfloat16."""
        plain = ModelConfig(path=self.path, dtype="bfloat16", sent_dtype="bfloat16", lora=self.lora)
        return replace(plain, gradient_checkpointing=checkpointing, compile=compiled)

    def base_config(self) -> Any:
        """Return the base's configuration, cut to `layers`."""
        config = known_config(self.config())
        return with_layers(config, *self.layers) if self.layers else config

    @property
    def processor(self) -> Processor:
        """The family's processor with the checkpoint's settings, but without its tokenizer."""
        return processor_of(self.path)

    @property
    def layout(self) -> Layout:
        """The layout of the image."""
        return self.processor.layout(self.image, alone=True)

    def image_tokens(self) -> list[bool]:
        """Return for each token of the image, delimiters included, whether it is a visual token."""
        return [
            token == IMAGE
            for token in re.findall(
                rf"{ImagePlaceholderTokenizer.letter}|<[^<>]+>", self.layout.text
            )
        ]

    def batch(self, micro_batch: int) -> MicroBatch:
        """Return the shape of a micro-batch, one image an example."""
        shape = feature_shape(self.base_config(), self.layout.shape)
        tokens = len(self.image_tokens())
        return MicroBatch(micro_batch, shape, tokens, self.text_tokens, self.answer_tokens)


@functools.cache
def processor_of(path: str) -> Processor:
    """Build a checkpoint's processor without its tokenizer."""
    return processor_without_tokenizer(ModelConfig(path=path), ImagePlaceholderTokenizer)


def with_layers(config: Any, decoder: int, vision: int) -> Any:
    """Cut a configuration to the first layers of decoder and vision tower.

    The last decoder layer and the last layer of Qwen2.5-VL's tower attend to everything, as in the
    whole model; the outputs that Qwen3-VL's tower hands to the decoder are of its last layers.
    """
    text, tower = config.text_config, config.vision_config
    text.num_hidden_layers = decoder
    if getattr(text, "layer_types", None):
        text.layer_types = [*text.layer_types[: decoder - 1], "full_attention"]
    setattr(tower, "depth" if hasattr(tower, "depth") else "num_hidden_layers", vision)
    if hasattr(tower, "fullatt_block_indexes"):
        tower.fullatt_block_indexes = [vision - 1]
    if hasattr(tower, "deepstack_visual_indexes"):
        number = len(tower.deepstack_visual_indexes)
        tower.deepstack_visual_indexes = list(range(vision - number, vision))
    return config


PAPER = LoraConfig(rank=64, alpha=128)

SIZES = {
    "llava-1.5-7b": Size("llava-hf/llava-1.5-7b-hf", PAPER),
    "qwen2.5-vl-3b": Size("Qwen/Qwen2.5-VL-3B-Instruct", PAPER, image=(480, 640)),
    "llava-interleave-0.5b": Size("llava-hf/llava-interleave-qwen-0.5b-hf", PAPER),
    "tiny": Size("tiny-llava", LoraConfig(rank=8, alpha=16), 24, 6, matrix=256),
}


def make_base(size: Size, device: torch.device) -> Any:
    """Return the base in bfloat16 with random weights, made on the device."""
    config = size.base_config()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


class FixedData:
    """The same micro-batch for every step, on the host like real data.

    Stands for both the collator and the features kept in memory; what reading rows and images
    takes is not measured.

    Parameters
    ----------
    size : Size
        Number of tokens, and the image's size.
    config
        The base's configuration.
    """

    def __init__(self, size: Size, config: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = size.layout
        vocabulary = range(5, min(400, config.text_config.vocab_size))
        words = torch.tensor([word for word in vocabulary if word != config.image_token_id])
        text = words[torch.randint(len(words), (1, size.text_tokens), generator=generator)]
        word = int(text[0, 0])
        image = [config.image_token_id if visual else word for visual in size.image_tokens()]
        self.input_ids = torch.cat([torch.tensor([image]), text], 1)
        self.labels = self.input_ids.clone()
        self.labels[:, : -size.answer_tokens] = IGNORE_INDEX
        self.types: Inputs = {}
        if size.processor.original.return_mm_token_type_ids:
            types = (self.input_ids == config.image_token_id).long()
            self.types = {size.processor.token_types_name: types}
        shape = feature_shape(config, self.layout.shape)
        self.features = torch.randn(shape, generator=generator).bfloat16()
        # An output of the tower besides H_v has a row for each of the image's tokens.
        beside = sum(size.image_tokens()), config.text_config.hidden_size
        self.beside = torch.randn(beside, generator=generator).bfloat16()
        self.pixels = torch.randn(self.layout.shape, generator=generator)

    def train_batch(self, examples: Sequence[Example]) -> Batch:
        """Return the tokens, as `pilot_flwr.data.collator.Collator` does."""
        rows = len(examples)
        ids, labels = (tokens.repeat(rows, 1) for tokens in (self.input_ids, self.labels))
        types = {name: tokens.repeat(rows, 1) for name, tokens in self.types.items()}
        return Batch(ids, torch.ones_like(ids), labels, types)

    def encoder(self, model: PilotModel) -> Any:
        """Return a function from batches to H_v, as `FeatureCache` has it."""

        def encode(parts: Iterable[Sequence[Example]]) -> Iterator[Visual]:
            for part in parts:
                rows = len(part)
                features, beside = (
                    torch.cat([kept] * rows).to(model.device)
                    for kept in (self.features, self.beside)
                )
                yield Visual(
                    features,
                    (self.layout.rows,) * rows,
                    collate([self.layout.others] * rows, together=(1,) * rows),
                    (self.layout.shape,) * rows,
                    (beside,) * model.num_besides,
                )

        return encode

    def images(self, rows: int) -> Inputs:
        """Return the image inputs of a base model that sees the pixels."""
        return collate([{PIXELS: self.pixels} | self.layout.others] * rows, together=(1,) * rows)
