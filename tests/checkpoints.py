"""Small random checkpoints in the on-disk format of the real ones, processor included.

The chat templates are those of the hub's checkpoints, so that labels are tested against them.
"""

import json

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE = "<image>"
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5 as on the hub: no end token after an answer, images before text."""

QWEN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""LLaVA-OneVision as on the hub: the generation prompt is not how an answered turn begins."""


INTERLEAVE_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""LLaVA-Interleave as on the hub: a prompt ends between two newlines, which are one token."""

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits text: newlines stay together."""


def llama_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Llama's kind: a blank before every word, bytes for unknown characters, a first token."""
    words = ["▁USER", "▁ASSISTANT", "▁What", "▁is", "▁in", "▁two", "▁zebras", "▁one", "USER"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for character in sorted(set("".join(words)) | set(":?.,abcdefghijklmnopqrstuvwxyzAWE▁")):
        vocabulary.setdefault(character, len(vocabulary))
    for word in words:
        for end in range(1, len(word)):
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    model = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    model.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE],
    )


def tokenizer(*, eos: str, more: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """Qwen's kind: a byte-level BPE, here over a few words, with the templates' special tokens."""
    words = ["USER: What is in the image? ASSISTANT: two zebras and one giraffe user assistant\n\n"]
    special = [eos, "<pad>", IMAGE, *more]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(words * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=[IMAGE, *more],
    )


def text_config(kind, vocabulary):
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return (LlamaConfig if kind == "llama" else Qwen2Config)(**sizes)


def write_llava_15(folder):
    """LLaVA-1.5's kind: CLIP with a class token, Llama, Vicuna's template."""
    tokens = llama_tokenizer()
    config = LlavaConfig(
        text_config=text_config("llama", len(tokens)),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            image_size=28,
            patch_size=14,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=8,
        ),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(folder, transformers.LlavaForConditionalGeneration, config, processor)


def write_interleave(folder):
    """LLaVA-Interleave's kind: SigLIP without a class token, Qwen2, tied embeddings."""
    tokens = tokenizer(eos="<|im_end|>", more=("<|im_start|>",))
    config = LlavaConfig(
        text_config=text_config("qwen2", len(tokens)),
        vision_config=_siglip(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    processor = transformers.LlavaProcessor(
        transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        tokens,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=INTERLEAVE_TEMPLATE,
    )
    return _save(folder, transformers.LlavaForConditionalGeneration, config, processor)


def write_onevision(folder):
    """LLaVA-OneVision: crops by the image's size, packed with newlines."""
    tokens = tokenizer(eos="<|im_end|>", more=("<|im_start|>", "<video>"))
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        text_config=text_config("qwen2", len(tokens)),
        vision_config=_siglip(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    # Written by hand: transformers' class for the processor needs a library for videos.
    values = {
        "image_token": IMAGE,
        "num_image_tokens": 4,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_feature_select_strategy": "full",
    }
    image_processor = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    path = _save(folder, transformers.LlavaOnevisionForConditionalGeneration, config, tokens)
    image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    (folder / "processor_config.json").write_text(json.dumps(values))
    return path


WRITERS = {
    "llava-1.5": write_llava_15,
    "interleave": write_interleave,
    "onevision": write_onevision,
}


def _siglip():
    return SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_use_head=False,
    )


def _save(folder, model_class, config, processor):
    torch.manual_seed(0)
    model = model_class(config)
    tokens = getattr(processor, "tokenizer", processor)
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
