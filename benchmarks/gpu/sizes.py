"""The models to measure, with random weights made on the device, and their batches.

To add a size, add a row to `SIZES` with a configuration that the package ships.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.data.collator import IGNORE_INDEX, Batch
from pilot_flwr.data.examples import Example, Turn
from pilot_flwr.model.architectures import feature_shape, known_config
from pilot_flwr.model.memory import MicroBatch
from pilot_flwr.model.slot import Visual

TASKS = ("vqa", "ocr", "captions")
"""T = 3 as in the paper; the first is the client's own."""

EXAMPLE = Example("fixed", (), (Turn("user", "a"), Turn("assistant", "b")))
"""A placeholder: `FixedData` only counts examples."""


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
    """

    path: str
    lora: LoraConfig
    text_tokens: int
    answer_tokens: int
    matrix: int

    def config(self, *, checkpointing: bool = False, compiled: bool = False) -> ModelConfig:
        """Return the settings: a bfloat16 base with float32 adapters, sent as bfloat16."""
        plain = ModelConfig(path=self.path, dtype="bfloat16", sent_dtype="bfloat16", lora=self.lora)
        return replace(plain, gradient_checkpointing=checkpointing, compile=compiled)

    def batch(self, micro_batch: int) -> MicroBatch:
        """Return the shape of a micro-batch, one image an example."""
        tokens, channels = feature_size(known_config(self.config()))
        shape = (1, tokens, channels)
        return MicroBatch(micro_batch, shape, tokens, self.text_tokens, self.answer_tokens)


def feature_size(config: Any) -> tuple[int, int]:
    """Return N and D of one image, of a tower with images of one size."""
    side = config.vision_config.image_size
    _, tokens, channels = feature_shape(config, (1, 3, side, side))
    return tokens, channels


PAPER = LoraConfig(rank=64, alpha=128)

SIZES = {
    "llava-1.5-7b": Size("llava-hf/llava-1.5-7b-hf", PAPER, 128, 32, 8192),
    "llava-interleave-0.5b": Size("llava-hf/llava-interleave-qwen-0.5b-hf", PAPER, 128, 32, 8192),
    "tiny": Size("tiny-llava", LoraConfig(rank=8, alpha=16), 24, 6, 256),
}


def make_base(size: Size, device: torch.device) -> Any:
    """Return the base in bfloat16 with random weights, made on the device."""
    config = known_config(size.config())
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
        Number of tokens.
    config
        The base's configuration.
    """

    def __init__(self, size: Size, config: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens, channels = feature_size(config)
        self.side = config.vision_config.image_size
        text = torch.randint(5, 400, (1, size.text_tokens), generator=generator)
        image = torch.full((1, tokens), config.image_token_id)
        self.input_ids = torch.cat([image, text], 1)
        self.labels = self.input_ids.clone()
        self.labels[:, : -size.answer_tokens] = IGNORE_INDEX
        self.features = torch.randn(1, tokens, channels, generator=generator).bfloat16()
        self.pixels = torch.randn(1, 3, self.side, self.side, generator=generator)

    def train_batch(self, examples: Sequence[Example]) -> Batch:
        """Return the tokens, as `pilot_flwr.data.collator.Collator` does."""
        rows = len(examples)
        mask = torch.ones_like(self.input_ids)
        tokens = (t.repeat(rows, 1) for t in (self.input_ids, mask, self.labels))
        return Batch(*tokens, {})

    def encoder(self, device: torch.device) -> Any:
        """Return a function from batches to H_v, as `FeatureCache` has it."""

        def encode(parts: Iterable[Sequence[Example]]) -> Iterator[Visual]:
            for part in parts:
                rows = len(part)
                stand_in = torch.ones(1).expand(rows, 3, self.side, self.side)
                features = self.features.repeat(rows, 1, 1).to(device)
                yield Visual(features, (1,) * rows, {"pixel_values": stand_in})

        return encode

    def pixel_values(self, rows: int) -> Tensor:
        """Return the images, shape (rows, 3, side, side)."""
        return self.pixels.repeat(rows, 1, 1, 1)
