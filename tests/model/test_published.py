"""The shipped configurations of the hub's checkpoints against what is published about them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

from pilot_flwr.config.loading import config_folder, load_config
from pilot_flwr.config.model import LoraConfig
from pilot_flwr.model.checkpoints import ASSETS

CONFIGS = ASSETS / "configs"

# Vicuna-13B with 64 more tokens, CLIP ViT-L/14-336, two linear layers, and a newline.
VICUNA_13B = 13_015_864_320 + 2 * 64 * 5120 + 303_507_456 + (1024 + 1 + 5120 + 1) * 5120 + 5120

PARAMETERS = {
    "llava-hf/llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "llava-hf/llava-v1.6-vicuna-13b-hf": VICUNA_13B,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.03,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "OpenGVLab/InternVL3-2B-hf": 2_088_957_440,
    "OpenGVLab/InternVL3-8B-hf": 7_944_373_760,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 507_482_304,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2_246_784_880,
}
"""Parameters as published for the weights' files, in billions where no more digits are known, or
the sum of published parts."""


def folder(name):
    return str(CONFIGS / name.replace("/", "--"))


@pytest.fixture(scope="module", params=list(PARAMETERS))
def built(request):
    config = AutoConfig.from_pretrained(folder(request.param))
    with torch.device("meta"):
        return request.param, AutoModelForImageTextToText.from_config(config)


def test_a_configuration_gives_the_published_number_of_parameters(built):
    name, model = built
    count = sum(parameter.numel() for parameter in model.parameters())
    published = PARAMETERS[name]
    assert published in (count, round(count / 1e9, 2))


def test_the_default_lora_targets_are_all_linear_layers_of_the_decoder(built):
    """So no file in conf/model/ has to list them."""
    _, model = built
    text = model.get_decoder()
    linear = {n for n, module in text.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.rpartition(".")[2] for name in linear} == set(LoraConfig().targets)


# For an image of 480 × 640 pixels, as the papers say.
PIXELS = {
    # Of the five grids, 672 × 672 keeps most of it: 2 × 2 crops, and the whole image.
    "llava-hf/llava-v1.6-mistral-7b-hf": (1, 5, 3, 336, 336),
    "llava-hf/llava-v1.6-vicuna-13b-hf": (1, 5, 3, 336, 336),
    # 768 × 768 loses nothing: 2 × 2 crops, and the whole image.
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (1, 5, 3, 384, 384),
    # Sides to the nearest multiple of 28: 476 × 644, in patches of 14 × 14 and two frames.
    "Qwen/Qwen2.5-VL-3B-Instruct": (34 * 46, 3 * 2 * 14 * 14),
    "Qwen/Qwen2.5-VL-7B-Instruct": (34 * 46, 3 * 2 * 14 * 14),
    # Both sides are multiples of 32: patches of 16 × 16.
    "Qwen/Qwen3-VL-4B-Instruct": (30 * 40, 3 * 2 * 16 * 16),
    "Qwen/Qwen3-VL-8B-Instruct": (30 * 40, 3 * 2 * 16 * 16),
    # The ratio is that of 3 × 4 crops, and the whole image.
    "OpenGVLab/InternVL3-2B-hf": (13, 3, 448, 448),
    "OpenGVLab/InternVL3-8B-hf": (13, 3, 448, 448),
    "google/gemma-3-4b-it": (1, 3, 896, 896),
    "google/gemma-3-12b-it": (1, 3, 896, 896),
    # 1536 × 2048 in crops of 512, or 1152 × 1536 in crops of 384: 3 × 4, and the whole image.
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (1, 13, 3, 512, 512),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (1, 13, 3, 384, 384),
}


@pytest.mark.parametrize("name", PIXELS)
def test_an_image_processor_cuts_an_image_as_published(name):
    processor = AutoImageProcessor.from_pretrained(folder(name))
    image = Image.fromarray(np.zeros((480, 640, 3), np.uint8))
    # InternVL's processor asks for crops, whatever its image processor's file says.
    options = {"crop_to_patches": True} if name.startswith("OpenGVLab") else {}
    inputs = processor(images=[image], return_tensors="pt", **options)
    assert tuple(inputs["pixel_values"].shape) == PIXELS[name]


@pytest.mark.parametrize("name", [n for n in PARAMETERS if "Qwen" not in n and "llava" not in n])
def test_the_tokens_of_a_crop_are_those_of_the_projector(name):
    """(side / patch / shuffle)², with Gemma's pooling of 4 × 4 patches."""
    config = AutoConfig.from_pretrained(folder(name))
    values = json.loads((CONFIGS / name.replace("/", "--") / "processor_config.json").read_text())
    vision = config.vision_config
    side, patch = (
        size[0] if isinstance(size, list | tuple) else size
        for size in (vision.image_size, vision.patch_size)
    )
    merged = {
        "internvl": lambda: round(1 / config.downsample_ratio),
        "gemma3": lambda: 4,
        "smolvlm": lambda: config.scale_factor,
    }[config.model_type]()
    tokens = values.get("image_seq_length") or values["image_seq_len"]
    assert tokens == (side // patch // merged) ** 2


def test_every_model_in_conf_has_its_configuration_here():
    """So that `plan` answers without the network."""
    named = {
        load_config(f"model={file.stem}").model.path
        for file in (config_folder() / "model").glob("*.yaml")
    } - {"tiny-llava"}
    shipped = {path.name.removesuffix(".json") for path in CONFIGS.iterdir()}
    assert {name.replace("/", "--") for name in named} == shipped
