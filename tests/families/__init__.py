"""Small random checkpoints in the on-disk format of each model family's real ones.

`WRITERS[name](folder)` writes config, weights, tokenizer, image processor, processor and chat
template, the same for the same `seed`, and returns the folder. To add a family, add a row to
`_FAMILIES`: a function that returns a `Family` of the smallest sizes at which its image processor
and its projector still take all their steps.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForImageTextToText

from families import templates
from families import vocabularies as words

IMAGE = "<image>"
NOISE = 0.1
"""Spread of the noise added to every initial weight, so that each one matters."""


class Family(NamedTuple):
    """One small checkpoint, before it is written."""

    config: Any
    tokenizer: Any
    image_processor: Any
    processor: dict[str, Any]
    """Content of ``processor_config.json``; Qwen's have none and name their class elsewhere."""
    template: str
    stops: tuple[str, ...]
    """Tokens of ``generation_config.json`` that end an answer."""
    template_file: str = "chat_template.json"


def llava():
    """LLaVA-1.5: CLIP with a class token, Llama."""
    tokens = words.sentence_pieces(words.LLAMA | {"pad_token": "<pad>"}, more=(IMAGE,))
    config = transformers.LlavaConfig(
        text_config=_text("llama", tokens),
        vision_config=_clip(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
    )
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    values = _llava_values("LlavaProcessor", "default", num_additional_image_tokens=1)
    return Family(config, tokens, images, values, templates.LLAVA, ("</s>",))


def interleave():
    """LLaVA-Interleave: SigLIP without a class token, Qwen2, tied embeddings."""
    tokens = words.bytes_pairs(
        {"eos_token": "<|im_end|>", "pad_token": "<pad>"}, more=("<|im_start|>", IMAGE)
    )
    config = transformers.LlavaConfig(
        text_config=_text("qwen2", tokens),
        vision_config=_siglip(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    images = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    values = _llava_values("LlavaProcessor", "full", num_additional_image_tokens=0)
    return Family(config, tokens, images, values, templates.INTERLEAVE, ("<|im_end|>",))


def llava_next():
    """LLaVA-1.6 with Mistral: the image and its crops, unpadded, a newline after each line."""
    tokens = words.sentence_pieces(words.LLAMA | {"pad_token": "<pad>"}, more=(IMAGE,))
    grid = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    config = transformers.LlavaNextConfig(
        text_config=_text("mistral", tokens, sliding_window=None),
        vision_config=_clip(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=grid,
    )
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=grid,
    )
    values = _llava_values("LlavaNextProcessor", "default", num_additional_image_tokens=1)
    return Family(config, tokens, images, values, templates.LLAVA_MISTRAL, ("</s>",))


def llava_onevision():
    """LLaVA-OneVision: SigLIP, Qwen2; crops by the image's size, packed with newlines."""
    tokens = words.bytes_pairs(
        {"eos_token": "<|im_end|>", "pad_token": "<pad>"}, more=("<|im_start|>", IMAGE, "<video>")
    )
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaOnevisionConfig(
        text_config=_text("qwen2", tokens),
        vision_config=_siglip(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    values = {
        "image_token": IMAGE,
        "num_image_tokens": 4,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_feature_select_strategy": "full",
    }
    return Family(config, tokens, images, values, templates.ONEVISION, ("<|im_end|>",))


def qwen25_vl():
    """Qwen2.5-VL: windowed attention in the tower, a patch merger, images of their own size."""
    tokens = words.bytes_pairs(words.QWEN, more=words.QWEN_MORE)
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(None, tokens, rope_parameters=_rope([2, 1, 1])),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **_qwen_tokens(tokens),
    )
    images = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 16}
    )
    stops = ("<|im_end|>", "<|endoftext|>")
    return Family(config, tokens, images, {}, templates.QWEN25, stops)


def qwen3_vl():
    """Qwen3-VL: as Qwen2.5-VL, and deepstack features for the first decoder layers."""
    tokens = words.bytes_pairs(words.QWEN, more=words.QWEN_MORE)
    rope = _rope([2, 1, 1]) | {"mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config=_text(None, tokens, head_dim=8, rope_parameters=rope),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **_qwen_tokens(tokens),
    )
    images = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 16},
        patch_size=16,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    stops = ("<|im_end|>", "<|endoftext|>")
    return Family(config, tokens, images, {}, templates.QWEN3, stops)


def internvl():
    """InternVL3: tiles and a thumbnail, pixel shuffle, a LayerNorm in the projector."""
    tokens = words.bytes_pairs(words.QWEN, more=words.QWEN_MORE, named=words.INTERNVL_NAMED)
    config = transformers.InternVLConfig(
        text_config=_text("qwen2", tokens),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": True,
            "image_size": [28, 28],
            "patch_size": [7, 7],
        },
        image_token_id=tokens.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, max_patches=6, crop_to_patches=False
    )
    values = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
    stops = ("<|im_end|>",)
    template = templates.INTERNVL
    return Family(config, tokens, images, values, template, stops, "chat_template.jinja")


def gemma3():
    """Gemma 3: average pooling, an RMSNorm and one matrix; local and global attention."""
    tokens = words.sentence_pieces(
        words.GEMMA, more=words.GEMMA_MORE, named=words.GEMMA_NAMED, gemma=True
    )
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config=_text(None, tokens, head_dim=8, sliding_window=16, layer_types=layers),
        vision_config=_siglip(image_size=56),
        mm_tokens_per_image=4,
        boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
        image_token_index=tokens.image_token_id,
    )
    images = transformers.Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    values = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    stops = ("<eos>", "<end_of_turn>")
    return Family(config, tokens, images, values, templates.GEMMA3, stops)


def smolvlm(*, kind="SmolVLM"):
    """SmolVLM2: SigLIP for crops of any shape, pixel shuffle and one matrix, row and column tags.

    SmolVLM, its predecessor, is an Idefics3.
    """
    more, named = words.SMOL_MORE, words.SMOL_NAMED
    if kind == "Idefics3":  # its tokenizer has the tokens without their names
        more, named = (*more, *named.values()), None
    tokens = words.bytes_pairs(words.SMOL, more=more, named=named, digits=True)
    config = getattr(transformers, f"{kind}Config")(
        text_config=_text("llama", tokens).to_dict(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_id=tokens.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokens.pad_token_id,
        scale_factor=2,
    )
    images = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 96},
        max_image_size={"longest_edge": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    values = {"image_seq_len": 4, "processor_class": f"{kind}Processor"}
    stops = ("<end_of_utterance>",)
    return Family(config, tokens, images, values, templates.SMOLVLM, stops)


def fast_vlm(vision=None):
    """FastVLM: a convolutional tower of any class, whose feature map is H_v; Llama."""
    tokens = words.bytes_pairs(
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, more=("<|im_start|>", IMAGE)
    )
    config = transformers.FastVlmConfig(
        text_config=_text("llama", tokens),
        vision_config=vision or _efficientnet(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        image_seq_length=16,
    )
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    values = _llava_values("LlavaProcessor", "full", num_additional_image_tokens=0)
    values |= {"patch_size": 8}
    stops, file = ("<|im_end|>",), "chat_template.jinja"
    return Family(config, tokens, images, values, templates.FASTVLM, stops, file)


_FAMILIES = {
    "llava-1.5": llava,
    "interleave": interleave,
    "llava-next": llava_next,
    "onevision": llava_onevision,
    "qwen2.5-vl": qwen25_vl,
    "qwen3-vl": qwen3_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "idefics3": functools.partial(smolvlm, kind="Idefics3"),
    "smolvlm": smolvlm,
    "fastvlm": fast_vlm,
}


def write(name, folder, *, seed=0):
    """Write the checkpoint of a row of `_FAMILIES` into `folder`; return its path."""
    family, folder = _FAMILIES[name](), Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(family.config)
        for parameter in model.parameters():  # biases and Gemma's projector would be zero
            parameter.data += NOISE * torch.randn_like(parameter)
        for key, tensor in model.state_dict().items():
            if "running_" in key:  # statistics of batch normalization
                tensor += NOISE * torch.randn_like(tensor)
    model.get_output_embeddings().weight.data[model.config.image_token_id] = 0  # never an answer
    stops = [family.tokenizer.convert_tokens_to_ids(token) for token in family.stops]
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config.pad_token_id = family.tokenizer.pad_token_id
    model.save_pretrained(folder)
    family.tokenizer.save_pretrained(folder)
    kind = type(model).__name__.replace("ForConditionalGeneration", "Processor")
    kind = family.processor.get("processor_class", kind)
    _json(folder / "preprocessor_config.json", family.image_processor, processor_class=kind)
    if family.processor:
        _json(folder / "processor_config.json", family.processor)
    if family.template_file.endswith(".json"):
        _json(folder / family.template_file, {"chat_template": family.template})
    else:
        (folder / family.template_file).write_text(family.template)
    return str(folder)


WRITERS = {name: functools.partial(write, name) for name in _FAMILIES}


def _json(path, values, **more):
    values = json.loads(values.to_json_string()) if hasattr(values, "to_json_string") else values
    path.write_text(json.dumps(values | more, indent=2) + "\n")


def _text(kind, tokens, **more):
    """Return a decoder's configuration; without a kind, the values of one."""
    sizes = {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    } | more
    return transformers.AutoConfig.for_model(kind, **sizes) if kind else sizes


def _clip():
    return transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
    )


def _siglip(image_size=28):
    return transformers.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        image_size=image_size,
        patch_size=14,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_use_head=False,
    )


def _efficientnet():
    """Return a tower of stride 8 with squeeze-and-excitation in every block."""
    return transformers.EfficientNetConfig(
        width_coefficient=0.02,  # at least 8 channels, 24 in place of the last 1280
        depth_coefficient=1.0,
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        kernel_sizes=[3, 3, 5],
        strides=[1, 2, 2],
        num_block_repeats=[1, 1, 2],
        expand_ratios=[1, 6, 6],
        hidden_act="relu6",
        hidden_dim=24,
        hidden_size=24,  # not EfficientNet's own: the projector reads it
        initializer_range=0.8,  # less would leave a constant, after so many convolutions
    )


def _llava_values(processor, strategy, **more):
    return more | {
        "image_token": IMAGE,
        "patch_size": 14,
        "processor_class": processor,
        "vision_feature_select_strategy": strategy,
    }


def _rope(section):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


def _qwen_tokens(tokens):
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [tokens.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    return dict(zip(keys, ids, strict=True))
