"""Small checkpoints of every family, by transformers alone: they load, and images fit texts."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import WRITERS
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

SIZES = [(28, 28), (20, 61), (64, 30), (90, 90), (7, 100), (150, 97)]


@pytest.fixture(scope="module", params=list(WRITERS))
def checkpoint(request, tmp_path_factory):
    folder = WRITERS[request.param](tmp_path_factory.mktemp("base"))
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval(), image_text_processor(folder)


def image_text_processor(folder):
    """Load a checkpoint's processor without its part for videos, which needs torchvision."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(config.model_type, "LlavaProcessor"))
    parts = kind.get_attributes()
    kept = [part for part in parts if part != "video_processor"]
    without = {"video_processor": None} if len(kept) < len(parts) else {}
    silent = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: kept)})
    return silent.from_pretrained(folder, **without)


def image(height, width):
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encode(processor, images):
    content = [{"type": "image"} for _ in images]
    content += [{"type": "text", "text": "What is in the image?"}]
    tokenizer = processor.tokenizer  # SmolVLM's processor would ask its video processor
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    options = {"images": [images]} if images else {}
    return processor(text=[text], add_special_tokens=not begun, return_tensors="pt", **options)


def visual_tokens(model, inputs):
    """Count the rows that the model makes of the images."""
    known = inspect.signature(model.model.get_image_features).parameters
    output = model.model.get_image_features(
        **{name: value for name, value in inputs.items() if name in known}
    )
    features = output.pooler_output
    if isinstance(features, (tuple, list)):
        return sum(len(part) for part in features)
    return features.flatten(0, -2).shape[0]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [*([size] for size in SIZES), SIZES[:2], SIZES[1:5]], ids=str)
def test_a_text_has_as_many_image_tokens_as_its_images_have_features(checkpoint, sizes):
    model, processor = checkpoint
    inputs = encode(processor, [image(*size) for size in sizes])
    places = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert places == visual_tokens(model, inputs) > 0


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[], SIZES[:1], SIZES[2:4]], ids=len)
def test_checkpoints_generate(checkpoint, sizes):
    model, processor = checkpoint
    inputs = encode(processor, [image(*size) for size in sizes])
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    ids, start = inputs["input_ids"][0], inputs["input_ids"].shape[1]
    assert torch.equal(tokens[0, :start], ids) and len(tokens[0]) > start


@torch.no_grad()
def test_answers_depend_on_the_images(checkpoint):
    """Otherwise the tests on these checkpoints could not detect a wrong connector."""
    model, processor = checkpoint
    first, other = (
        model(**encode(processor, [one])).logits[0, -1]
        for one in (image(64, 64), Image.new("RGB", (64, 64)))
    )
    assert (first - other).abs().max() > 1e-2


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Two?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    {"role": "user", "content": [{"type": "text", "text": "Three?"}]},
]
QWEN3 = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Two?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SMOLVLM = (
    "<|im_start|>User:<image>Two?<end_of_utterance>\nAssistant: Yes.<end_of_utterance>\n"
    "User: Three?<end_of_utterance>\nAssistant:"
)
INTERLEAVE = (
    "<|im_start|>user\n<image>\nTwo?<|im_end|>\n<|im_start|>assistant\n\nYes."
    "<|im_end|>\n<|im_start|>user\n\nThree?<|im_end|>\n<|im_start|>assistant\n"
)
RENDERED = {
    "llava-1.5": "USER: <image>\nTwo? ASSISTANT: Yes. USER: Three? ASSISTANT:",
    "interleave": INTERLEAVE,
    "llava-next": "[INST] <image>\nTwo? [/INST] Yes.</s> [INST] Three? [/INST]",
    "onevision": "<|im_start|>user <image>\nTwo?<|im_end|><|im_start|>assistant \nYes."
    "<|im_end|><|im_start|>user \nThree?<|im_end|><|im_start|>assistant\n",
    "qwen2.5-vl": f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{QWEN3}",
    "qwen3-vl": QWEN3,
    "internvl": "<|im_start|>user\n<IMG_CONTEXT>\nTwo?<|im_end|>\n<|im_start|>assistant\nYes."
    "<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n",
    "gemma3": "<bos><start_of_turn>user\n<start_of_image>Two?<end_of_turn>\n"
    "<start_of_turn>model\nYes.<end_of_turn>\n<start_of_turn>user\nThree?<end_of_turn>\n"
    "<start_of_turn>model\n",
    "idefics3": SMOLVLM,
    "smolvlm": SMOLVLM,
    "fastvlm": f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{INTERLEAVE}",
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_conversations_are_rendered_as_on_the_hub(tmp_path, name):
    folder = WRITERS[name](tmp_path)
    values, _ = transformers.ProcessorMixin.get_processor_dict(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        MESSAGES,
        chat_template=values["chat_template"],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == RENDERED[name]


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_seed_decides_every_byte(tmp_path, name):
    folders = [
        Path(WRITERS[name](tmp_path / str(number), seed=seed))
        for number, seed in enumerate((0, 0, 1))
    ]
    first, again, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == again
    assert {n for n in first if first[n] != other[n]} == {"model.safetensors"}
