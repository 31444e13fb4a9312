"""The shipped base model: loadable by transformers as it is, small, and able to read digits."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pilot_flwr
from pilot_flwr.data.demo import client_examples

FOLDER = Path(pilot_flwr.__file__).parent / "assets" / "tiny-llava"
DIALOGUE = [
    ("user", "<image>\nWhat digit is at the top left?", "seven"),
    ("user", "And below it? Größe: 3 × 4 €", " -5\n"),
    ("user", "Repeat.", "USER: ASSISTANT: </s> 数"),
]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


def messages(dialogue):
    turns = []
    for role, question, answer in dialogue:
        parts = [{"type": "text", "text": question.removeprefix("<image>\n")}]
        if question.startswith("<image>"):
            parts.insert(0, {"type": "image"})
        turns.append({"role": role, "content": parts})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def test_the_folder_is_small_and_holds_plain_file_types():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".jinja"}
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20


def test_every_weight_is_claimed_and_finite():
    model, info = LlavaForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.isfinite(p).all() for p in model.parameters())
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["parameters"] == model.num_parameters()


def test_one_image_takes_sixteen_tokens(processor, model):
    (example,) = client_examples(
        "vqa", client_index=0, num_clients=9, split="test", num_examples=1, seed=0
    )
    inputs = processor(text="<image>", images=example.images[0].read(), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    # CLIP's own normalisation, computed here from the pixels: no resampling has taken place.
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = (np.asarray(example.images[0].read()) / 255 - mean) / std
    np.testing.assert_allclose(inputs["pixel_values"][0].permute(1, 2, 0), expected, atol=1e-5)


def test_the_template_renders_vicuna_style(processor):
    turns = messages(DIALOGUE[:2])
    assert processor.apply_chat_template(turns[:1], add_generation_prompt=True) == (
        "USER: <image>\nWhat digit is at the top left? ASSISTANT:"
    )
    assert processor.apply_chat_template(turns[:2]) == (
        "USER: <image>\nWhat digit is at the top left? ASSISTANT: seven</s>"
    )
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}, turns[1]]) == (
        "USER: Hi ASSISTANT: seven</s>"
    )
    with pytest.raises(Exception, match="message role 'tool' is not system, user or assistant"):
        processor.apply_chat_template([{"role": "tool", "content": "Hi"}])


def test_every_beginning_of_a_dialogue_is_a_prefix_and_no_token_straddles_an_answer(processor):
    turns = messages(DIALOGUE)
    full = processor.apply_chat_template(turns)
    edges = [0]
    for count in range(1, len(turns) + 1):
        asked = count % 2 == 1
        text = processor.apply_chat_template(turns[:count], add_generation_prompt=asked)
        assert full.startswith(text)
        assert text.endswith("ASSISTANT:" if asked else "</s>")
        edges.append(len(text))
    assert edges[-1] == len(full)
    encoded = processor.tokenizer(full, return_offsets_mapping=True)
    spans = [(a, b) for a, b in encoded["offset_mapping"] if b > a]
    starts = {a for a, _ in spans}
    assert set(edges[:-1]) <= starts
    assert all(not (a < edge < b) for edge in edges for a, b in spans)
    for one, two in pairwise(edges):
        ids = processor.tokenizer(full[one:two], add_special_tokens=False)["input_ids"]
        places = [
            n for n, (a, b) in enumerate(encoded["offset_mapping"]) if one <= a < two and b > a
        ]
        assert ids == [encoded["input_ids"][n] for n in places]


def test_any_text_survives_the_tokenizer(processor):
    text = "Größe: 3 × 4 €, 数字, \t tabs,  two spaces 🙂"
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


@torch.no_grad()
def test_zero_shot_reading_is_far_above_chance(processor, model):
    hits = 0
    for client_index in (0, 1, 2):
        examples = client_examples(
            "vqa",
            client_index=client_index,
            num_clients=9,
            split="test",
            num_examples=16,
            seed=0,
        )
        texts = [
            processor.apply_chat_template(
                messages([("user", example.turns[0].text, "")])[:1], add_generation_prompt=True
            )
            for example in examples
        ]
        images = [example.images[0].read() for example in examples]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8)
        replies = processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        pairs = zip(replies, examples, strict=True)
        hits += sum(reply.strip() == example.answers[0] for reply, example in pairs)
    assert hits >= 24  # of 48; chance is about 5
