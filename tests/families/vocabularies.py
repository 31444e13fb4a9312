"""Small tokenizers of the families' kinds, with the special tokens that the real ones have."""

import transformers
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits text: newlines stay together."""

_TEXT = "USER: What is in the image? ASSISTANT: two zebras and one giraffe user assistant\n\n"
_WORDS = ("▁USER", "▁ASSISTANT", "▁What", "▁is", "▁in", "▁two", "▁zebras", "▁one", "USER")

LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
GEMMA_MORE = ("<start_of_turn>", "<end_of_turn>")
GEMMA_NAMED = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_MORE = (
    "<|im_start|>",
    *(f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad")),
    *(f"<|{name}|>" for name in ("image_pad", "video_pad")),
)
INTERNVL_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SMOL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
}
SMOL_MORE = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SMOL_NAMED = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
}


def sentence_pieces(special, *, more=(), named=None, gemma=False):
    """Llama's and Gemma's kind: "▁" for a blank, bytes for unknown characters, a first token.

    Llama's puts a "▁" in front of a text; Gemma's does not, and knows two newlines as one token.
    """
    first = special["bos_token"]
    order = special.values() if gemma else ("<unk>", first, "</s>")
    vocabulary = {token: number for number, token in enumerate(order)}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    words = [*_WORDS, "\n\n"] if gemma else _WORDS
    merges = []
    letters = set("".join(words)) | set(":?.,abcdefghijklmnopqrstuvwxyzAWE▁")
    for letter in sorted(letters):
        vocabulary.setdefault(letter, len(vocabulary))
    for word in words:
        for end in range(1, len(word)):
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    model = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        model.normalizer = normalizers.Replace(" ", "▁")
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    model.decoder = decoders.Sequence(steps)
    model.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
    )
    return _fast(model, special, more, named)


def bytes_pairs(special, *, more=(), named=None, digits=False):
    """Qwen's and SmolLM2's kind, a byte-level BPE; SmolLM2's splits as GPT-2's, digits apart."""
    model = Tokenizer(models.BPE())
    if digits:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    else:
        steps = [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits))
    model.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model.decoder = decoders.ByteLevel()
    tokens = [*special.values(), *more, *(named or {}).values()]
    trainer = trainers.BpeTrainer(
        vocab_size=350 + len(tokens),
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([_TEXT] * 3, trainer)
    return _fast(model, special, more, named)


def _fast(model, special, more, named):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        extra_special_tokens=list(more),
        model_specific_special_tokens=named or {},
        **special,
    )
