"""Write a random LLaVA checkpoint of a real one's size and format.

Run ``python benchmarks/random_base.py FOLDER`` for one of 0.5 B parameters (1.1 GB), and use it
with ``pilot-flwr run model.path=FOLDER model.dtype=bfloat16``: how long loading, switching and
sending take at that size shows without any download.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from pilot_flwr.model.checkpoints import checkpoint_path


class Size(NamedTuple):
    """Sizes of a checkpoint to make: a CLIP tower and a Llama.

    The attention has `heads` of 64 each, or, if that is 0, as many as fill the width.
    """

    vision_width: int
    vision_layers: int
    width: int
    inner: int
    layers: int
    vocabulary: int
    heads: int = 0


HALF_BILLION = Size(768, 12, 1024, 4096, 22, 32000)
TINY = Size(64, 2, 64, 128, 2, 512)


def write_random_base(folder: Path, size: Size) -> int:
    """Write a random LLaVA in bfloat16 with the shipped tokenizer; return its parameter count.

    Images are 56 x 56 pixels in patches of 14, so that one image is 16 tokens, as for tiny-llava.
    """
    image_size, patch_size, head = 56, 14, 64
    base = checkpoint_path("tiny-llava")
    processor = transformers.AutoProcessor.from_pretrained(base)  # nosec B615  # a folder
    processor.patch_size = patch_size
    processor.image_processor.size = {"shortest_edge": image_size}
    processor.image_processor.crop_size = {"height": image_size, "width": image_size}
    processor.save_pretrained(folder)
    shipped = transformers.AutoConfig.from_pretrained(base)  # nosec B615  # a folder
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=size.vision_width,
            intermediate_size=4 * size.vision_width,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_width // head,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads or size.width // head,
            num_key_value_heads=size.heads or size.width // head,
            head_dim=head,
            vocab_size=size.vocabulary,
            pad_token_id=shipped.text_config.pad_token_id,
            bos_token_id=shipped.text_config.bos_token_id,
            eos_token_id=shipped.text_config.eos_token_id,
        ),
        image_token_index=shipped.image_token_id,
        image_seq_length=(image_size // patch_size) ** 2,
    )
    model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Write the checkpoint of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--tiny", action="store_true", help="about 0.3 M parameters")
    options = parser.parse_args()
    number = write_random_base(options.folder, TINY if options.tiny else HALF_BILLION)
    print(f"{number:,} parameters in {options.folder}")


if __name__ == "__main__":
    main()
