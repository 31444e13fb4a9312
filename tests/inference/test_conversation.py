"""A conversation: what the model is shown at each turn, and what is remembered."""

import pytest
import torch
from PIL import Image

from pilot_flwr.data.examples import Turn
from pilot_flwr.data.images import mean_colour
from pilot_flwr.errors import DataError
from pilot_flwr.inference.generate import Answerer, Conversation
from pilot_flwr.inference.runs import client_model, open_run


@pytest.fixture(scope="module")
def answerer(finished):
    run = open_run(finished.folder.path)
    return Answerer(run.config, client_model(run, "vqa-0", device=torch.device("cpu")), keep=True)


@pytest.fixture
def conversation(answerer):
    return Conversation(answerer, max_new_tokens=6)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    pixels = torch.randint(256, (32, 40), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.byte().numpy()).save(path)
    return path


def transformers_answer(answerer, turns, image=None):
    """The greedy answer by transformers' own generate over the whole conversation."""
    processor, llava = answerer.processor, answerer.model.base
    connector = answerer.model.connector
    text = "".join(
        f"USER: {t.text} ASSISTANT:" if t.role == "user" else f" {t.text}</s>" for t in turns
    )
    images = [Image.open(image).convert("RGB")] if image else None
    inputs = processor.original(text=[text], images=images, return_tensors="pt")

    class Plain(torch.nn.Module):
        def forward(self, features):
            return connector(features).features

    llava.model.multi_modal_projector = Plain()
    try:
        tokens = llava.generate(**inputs, max_new_tokens=6, do_sample=False)
    finally:
        llava.model.multi_modal_projector = answerer.model.slot
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()


def test_every_turn_sees_the_whole_conversation(conversation, answerer, image):
    conversation.show(image)
    first = conversation.ask("What digit is at the top left?")
    turns = [Turn("user", "<image>\nWhat digit is at the top left?")]
    assert first == transformers_answer(answerer, turns, image)
    second = conversation.ask("What digit is at the bottom right?")
    turns += [Turn("assistant", first), Turn("user", "What digit is at the bottom right?")]
    assert second == transformers_answer(answerer, turns, image)
    assert [turn.text for turn in conversation.turns] == [*(t.text for t in turns), second]
    assert len(conversation.images) == 1


def test_an_answer_comes_in_pieces(conversation, answerer, image, monkeypatch):
    """At least word by word; without end tokens, so that the answer has several words."""
    monkeypatch.setattr(type(answerer.model), "end_tokens", lambda model, stop: [])
    conversation.show(image)
    pieces = []
    answer = conversation.ask("What digit is at the top left?", pieces.append)
    assert "".join(pieces).strip() == answer
    assert len(list(filter(None, pieces))) >= len(answer.split()) > 1


def test_text_alone_and_after_a_reset(conversation, answerer, image):
    conversation.show(image)
    conversation.ask("What digit is at the top left?")
    conversation.reset()
    assert conversation.ask("Hello") == transformers_answer(answerer, [Turn("user", "Hello")])
    assert conversation.images == ()


def test_another_image_after_a_reset_is_not_taken_from_memory(conversation, answerer, tmp_path):
    for number in range(2):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (32, 32), (255 * number, 0, 90)).save(path)
        conversation.reset()
        conversation.show(path)
        turns = [Turn("user", "<image>\nWhat digit is at the top left?")]
        answer = conversation.ask("What digit is at the top left?")
        assert answer == transformers_answer(answerer, turns, path)


def test_the_suffix_comes_after_the_question(answerer):
    conversation = Conversation(answerer, max_new_tokens=2, suffix="One word.")
    conversation.ask("What?")
    assert conversation.turns[0].text == "What?\nOne word."


def test_images_are_padded_if_the_runs_were(answerer, image):
    conversation = Conversation(answerer, max_new_tokens=2, pad=True)
    conversation.show(image)
    conversation.ask("What?")
    shown = conversation.images[0].read()
    assert shown.size == (40, 40)
    colour = mean_colour(answerer.processor.image_processor)
    assert shown.getpixel((0, 0)) == colour


def test_what_cannot_be_asked_leaves_the_conversation_as_it_was(conversation, image):
    conversation.show(image)
    for question, words in [
        (" ", "empty"),
        ("An <image> here", "must not contain"),
        ("long " * 3000, "`train.max_length`"),
    ]:
        with pytest.raises(DataError, match=words):
            conversation.ask(question)
    assert conversation.turns == ()
    conversation.ask("What?")
    assert conversation.turns[0].text == "<image>\nWhat?"


def test_an_image_may_be_a_link(conversation, image, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.png"
    link.symlink_to(image)
    conversation.show(link)
    assert conversation.ask("What?") is not None


def test_an_image_that_cannot_be_read_is_refused_at_once(conversation, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "absent.png"):
        with pytest.raises(DataError, match=f"Image .*{name} cannot be"):
            conversation.show(tmp_path / name)
    conversation.ask("What?")
    assert conversation.images == ()
