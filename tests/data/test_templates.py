"""Labels under the chat templates of the hub's checkpoints, against vectors made by hand.

A vector is written down as the text of each token; labelled tokens are in the second list.
"""

import re
from typing import NamedTuple

import pytest
from families import WRITERS
from PIL import Image

from pilot_flwr.data.collator import IGNORE_INDEX, Collator
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.model.loading import load_processor

IMAGE = KeptImage(Image.new("RGB", (28, 28)))


def make(name, tmp_path, **options):
    processor = load_processor(WRITERS[name](tmp_path))
    # Two tokens for every image keep the vectors short.
    processor.image_texts = lambda sizes: [2 * processor.image_token] * len(sizes)
    return Collator(processor, max_length=256, **options)


def conversation(*texts, images=(IMAGE,)):
    roles = ["user", "assistant"] * len(texts)
    return Example("e1", images, tuple(map(Turn, roles, texts)))


def read(collator, example):
    """Return the whole text, and the text of each run of labelled tokens."""
    ids, labels = collator.tokenize(example)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    runs, current = [], []
    for token, label in zip([*ids, None], [*labels, IGNORE_INDEX], strict=True):
        if label != IGNORE_INDEX:
            current.append(token)
        elif current:
            runs.append(collator.tokenizer.decode(current))
            current = []
    return collator.tokenizer.decode(ids), runs


ONE = ("<image>\nWhat is in the image?", "two zebras")
TWO = (*ONE, "And else?", "one giraffe")


class Vector(NamedTuple):
    """The text of a conversation's tokens, without and with the system prompt ``A chat.``."""

    plain: str
    system: str
    """How the text begins."""
    turns: str
    """How it continues."""
    labelled: tuple[str, str]


def chat_ml(image, *, blank="\n", end="\n", text="", default=""):
    """ChatML of Qwen's kinds: what follows a role, an end token and an image or stands for it."""
    head = f"<|im_start|>{{}}{blank}{text}"
    turn = f"{head}{{}}<|im_end|>{end}"
    return Vector(
        turn.format("system", default) if default else "",
        turn.format("system", "A chat."),
        f"<|im_start|>user{blank}{image}What is in the image?<|im_end|>{end}"
        + turn.format("assistant", "two zebras")
        + turn.format("user", "And else?")
        + turn.format("assistant", "one giraffe"),
        ("two zebras<|im_end|>", "one giraffe<|im_end|>"),
    )


QWEN = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
SMOL = Vector(
    "<|im_start|>",
    "<|im_start|>System: A chat.<end_of_utterance>\n",
    "User:<image><image>What is in the image?<end_of_utterance>\n"
    "Assistant: two zebras<end_of_utterance>\nUser: And else?<end_of_utterance>\n"
    "Assistant: one giraffe<end_of_utterance>\n",
    (" two zebras<end_of_utterance>", " one giraffe<end_of_utterance>"),
)
VECTORS = {
    # Vicuna-v1: the template has no end token, the tokenizer's is put there.
    "llava-1.5": Vector(
        "<s> ",
        "<s> A chat. ",
        "USER: <image><image>\nWhat is in the image? ASSISTANT: two zebras</s>"
        "USER: And else? ASSISTANT: one giraffe</s>",
        ("two zebras</s>", "one giraffe</s>"),
    ),
    # ChatML: the template's own end token, and nothing after it.
    "interleave": chat_ml("<image><image>\n", text="\n"),
    # The generation prompt is empty: an answer begins behind the user's turn.
    "llava-next": Vector(
        "<s> ",
        "<s> <<SYS>>\nA chat.\n<</SYS>>\n\n",
        "[INST] <image><image>\nWhat is in the image? [/INST] two zebras</s> "
        "[INST] And else? [/INST] one giraffe</s> ",
        ("two zebras</s>", "one giraffe</s>"),
    ),
    "onevision": chat_ml("<image><image>\n", blank=" ", end="", text="\n"),
    # A conversation without a system prompt gets one.
    "qwen2.5-vl": chat_ml(QWEN, default="You are a helpful assistant."),
    "qwen3-vl": chat_ml(QWEN),
    "internvl": chat_ml("<IMG_CONTEXT><IMG_CONTEXT>\n"),
    # The system prompt stands in the first question, and the assistant is called model.
    "gemma3": Vector(
        "<bos><start_of_turn>user\n",
        "<bos><start_of_turn>user\nA chat.\n\n",
        "<start_of_image><start_of_image>What is in the image?<end_of_turn>\n"
        "<start_of_turn>model\ntwo zebras<end_of_turn>\n<start_of_turn>user\nAnd else?"
        "<end_of_turn>\n<start_of_turn>model\none giraffe<end_of_turn>\n",
        ("two zebras<end_of_turn>", "one giraffe<end_of_turn>"),
    ),
    # The prompt ends in a colon, so the blank before an answer is learnt.
    "idefics3": SMOL,
    "smolvlm": SMOL,
    # A conversation without a system prompt gets one.
    "fastvlm": chat_ml("<image><image>\n", text="\n")._replace(
        plain="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    ),
}


@pytest.mark.parametrize("system", ["", "A chat."])
@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.family("labels")
def test_only_answers_and_their_end_tokens_carry_labels(tmp_path, name, system):
    vector = VECTORS[name]
    text, labelled = read(make(name, tmp_path, system_prompt=system), conversation(*TWO))
    assert text == (vector.system if system else vector.plain) + vector.turns
    assert tuple(labelled) == vector.labelled


@pytest.mark.parametrize(
    ("name", "turns", "text", "labelled"),
    [
        (
            "llava-1.5",  # an answer that is also part of the question, of the role, of the markup
            ("<image>\nassistant or A?", "A"),
            "<s> USER: <image><image>\nassistant or A? ASSISTANT: A</s>",
            ["A</s>"],
        ),
        (
            "interleave",
            ("<image>\nassistant?", "assistant"),
            "<|im_start|>user\n<image><image>\nassistant?<|im_end|>\n"
            "<|im_start|>assistant\n\nassistant<|im_end|>\n",
            ["assistant<|im_end|>"],
        ),
        (
            "gemma3",
            ("<image>\nuser or model?", "model"),
            "<bos><start_of_turn>user\n<start_of_image><start_of_image>user or model?"
            "<end_of_turn>\n<start_of_turn>model\nmodel<end_of_turn>\n",
            ["model<end_of_turn>"],
        ),
        (
            "smolvlm",
            ("<image>\nUser?", "User: Assistant:"),
            "<|im_start|>User:<image><image>User?<end_of_utterance>\n"
            "Assistant: User: Assistant:<end_of_utterance>\n",
            [" User: Assistant:<end_of_utterance>"],
        ),
    ],
)
def test_an_answer_is_found_where_it_stands(tmp_path, name, turns, text, labelled):
    assert read(make(name, tmp_path), conversation(*turns)) == (text, labelled)


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("turns", [ONE, TWO])
@pytest.mark.family("labels")
def test_a_prompt_is_exactly_what_stands_before_the_last_answers_labels(tmp_path, name, turns):
    collator = make(name, tmp_path)
    example = conversation(*turns)
    ids, labels = collator.tokenize(example)
    end = max(n for n, label in enumerate(labels) if label != IGNORE_INDEX)
    start = max(n for n in range(end) if labels[n] == IGNORE_INDEX) + 1
    assert collator.prompt_batch([example]).input_ids[0].tolist() == ids[:start]


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.family("labels")
def test_generation_stops_where_labels_end(tmp_path, name):
    collator = make(name, tmp_path)
    (token,) = {re.search(r"<[^<]+>$", answer)[0] for answer in VECTORS[name].labelled}
    assert collator.tokenizer.convert_ids_to_tokens(collator.end_token_id()) == token


def test_a_hand_made_vector_of_llamas_tokens(tmp_path):
    """Vicuna-v1 with Llama's tokenizer: a first token, blanks before words, bytes."""
    ids, labels = (collator := make("llava-1.5", tmp_path)).tokenize(conversation(*ONE))
    tokens = collator.tokenizer.convert_ids_to_tokens(ids)
    question = ["<0x0A>", *"What", "▁is", "▁in", "▁t", *"he", "▁i", *"mage", "?"]
    before = ["<s>", "▁USER", ":", "▁", "<image>", "<image>", *question, "▁ASSISTANT", ":"]
    assert tokens == [*before, "▁two", "▁zebras", "</s>"]
    assert labels == [IGNORE_INDEX] * len(before) + ids[-3:]


def test_newlines_on_both_sides_of_a_prompts_end_are_one_token(tmp_path):
    """As in Qwen's vocabulary; a prompt that ended between the two would be another one."""
    collator = make("interleave", tmp_path)
    ids, labels = collator.tokenize(conversation(*ONE))
    pieces = [collator.tokenizer.decode([token]) for token in ids]
    assert "\n\n" in pieces
    assert labels[pieces.index("\n\n")] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\n<image>\nWhich?", "USER: <image><image>\n<image><image>\nWhich?"),
        (
            "One: <image> is a zebra. Two: <image> is what?",
            "USER: One: <image><image> is a zebra. Two: <image><image> is what?",
        ),
        ("<image>\nThis, and <image>?", "USER: <image><image>\nThis, and <image><image>?"),
    ],
)
def test_images_stay_where_the_text_has_them(tmp_path, text, expected):
    """The template would put both in front."""
    example = conversation(text, "two", images=(IMAGE, IMAGE))
    rendered, _ = read(make("llava-1.5", tmp_path), example)
    assert rendered == f"<s> {expected} ASSISTANT: two</s>"


def test_text_alone_and_several_images(tmp_path):
    collator = make("llava-1.5", tmp_path)
    text, labelled = read(collator, conversation("What is in it?", "two", images=()))
    assert (text, labelled) == ("<s> USER: What is in it? ASSISTANT: two</s>", ["two</s>"])
    several = conversation("<image>\n<image>\nWhich?", "two", images=(IMAGE, IMAGE))
    text, labelled = read(collator, several)
    assert text == "<s> USER: <image><image>\n<image><image>\nWhich? ASSISTANT: two</s>"
    assert labelled == ["two</s>"]


def test_the_processors_own_encoding_is_the_same(tmp_path):
    """Ids equal those of the template's rendering, except for the number of image tokens."""
    collator = make("interleave", tmp_path)
    example = conversation(*TWO)
    messages = [
        {
            "role": turn.role,
            "content": [
                *([{"type": "image"}] if "<image>" in turn.text else []),
                {"type": "text", "text": turn.text.removeprefix("<image>\n")},
            ],
        }
        for turn in example.turns
    ]
    text = collator.processor.apply_chat_template(messages)
    expected = collator.tokenizer(text.replace("<image>", "<image>" * 2))["input_ids"]
    assert collator.tokenize(example)[0] == expected
