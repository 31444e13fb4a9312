"""Labels under the chat templates of the hub's checkpoints, against vectors made by hand.

A vector is written down as the text of each token; labelled tokens are in the second list.
"""

import pytest
from checkpoints import WRITERS
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


@pytest.mark.parametrize(
    ("name", "turns", "text", "labelled"),
    [
        (
            "llava-1.5",  # Vicuna-v1: the template has no end token, the tokenizer's is put there
            ONE,
            "<s> USER: <image><image>\nWhat is in the image? ASSISTANT: two zebras</s>",
            ["two zebras</s>"],
        ),
        (
            "llava-1.5",
            TWO,
            "<s> USER: <image><image>\nWhat is in the image? ASSISTANT: two zebras</s>"
            "USER: And else? ASSISTANT: one giraffe</s>",
            ["two zebras</s>", "one giraffe</s>"],
        ),
        (
            "interleave",  # ChatML: the template's own end token, and nothing after it
            ONE,
            "<|im_start|>user\n<image><image>\nWhat is in the image?<|im_end|>\n"
            "<|im_start|>assistant\n\ntwo zebras<|im_end|>\n",
            ["two zebras<|im_end|>"],
        ),
        (
            "onevision",
            TWO,
            "<|im_start|>user <image><image>\nWhat is in the image?<|im_end|>"
            "<|im_start|>assistant \ntwo zebras<|im_end|>"
            "<|im_start|>user \nAnd else?<|im_end|>"
            "<|im_start|>assistant \none giraffe<|im_end|>",
            ["two zebras<|im_end|>", "one giraffe<|im_end|>"],
        ),
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
    ],
)
def test_only_answers_and_their_end_tokens_carry_labels(tmp_path, name, turns, text, labelled):
    assert read(make(name, tmp_path), conversation(*turns)) == (text, labelled)


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("turns", [ONE, TWO])
def test_a_prompt_is_exactly_what_stands_before_the_last_answers_labels(tmp_path, name, turns):
    collator = make(name, tmp_path)
    example = conversation(*turns)
    ids, labels = collator.tokenize(example)
    end = max(n for n, label in enumerate(labels) if label != IGNORE_INDEX)
    start = max(n for n in range(end) if labels[n] == IGNORE_INDEX) + 1
    assert collator.prompt_batch([example]).input_ids[0].tolist() == ids[:start]


@pytest.mark.parametrize(("name", "token"), [("llava-1.5", "</s>"), ("interleave", "<|im_end|>")])
def test_generation_stops_where_labels_end(tmp_path, name, token):
    collator = make(name, tmp_path)
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


def test_the_system_prompt_begins_the_conversation_and_is_not_learnt(tmp_path):
    collator = make("llava-1.5", tmp_path, system_prompt="A chat.")
    text, labelled = read(collator, conversation(*ONE))
    assert text.startswith("<s> A chat. USER: <image><image>\nWhat")
    assert labelled == ["two zebras</s>"]


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
