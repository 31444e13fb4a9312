"""Which rows a client's session uses: what is checked, and when it is checked again."""

import json
from dataclasses import replace

import pytest
import torch
from llava_files import write_federation

from pilot_flwr.client.client_data import ClientData
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import DataError
from pilot_flwr.model.loading import loaded_model


@pytest.fixture
def config(tmp_path):
    path = write_federation(tmp_path, tasks=("counting",), clients=1, allowed_broken=0.5)
    return load_config(" ".join(f'"{word}"' for word in expand([f"data={path}"])))


@pytest.fixture
def use(tmp_path):
    """Return the ids that a session uses, and the lines that it prints."""

    def use(config, split="train"):
        client = federation_clients(config.data)[0]
        model = loaded_model(
            config.model,
            reduction=config.train.difference_loss.reduction,
            device=torch.device("cpu"),
        )
        lines = []
        data = ClientData(client, config, model, folder=tmp_path / "state", progress=lines.append)
        found = data.examples(split)
        return [int(example.id.split(":")[0]) for example in found], lines

    return use


def changed(config, **sections):
    return replace(
        config, **{key: replace(getattr(config, key), **more) for key, more in sections.items()}
    )


def change_row(tmp_path, split, number, change):
    path = tmp_path / f"counting/{split}.json"
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else list(map(json.loads, text.split("\n")))
    change(rows[number - 1])
    path.write_text(json.dumps(rows))


ALL = list(range(1, 13))


def test_half_an_image_is_left_out_unless_only_headers_are_read(config, use, tmp_path):
    """The verdict of headers is not taken for one of whole images, nor the other way round."""
    image = tmp_path / "counting/images/train-3.png"
    image.write_bytes(image.read_bytes()[:100])
    headers = changed(config, data={"check_images": "header"})
    without = [number for number in ALL if number != 4]
    assert config.data.check_images == "decode"  # it is the default
    assert use(headers)[0] == ALL
    assert use(config) == (
        without,
        ["train split of client 'counting-0': 12 rows checked, 1 left out as broken"],
    )
    assert use(headers) == (ALL, []) and use(config) == (without, [])
    with pytest.raises(DataError, match=r"^train.json, row 4, image 1 cannot be decoded"):
        use(changed(config, data={"allowed_broken": 0.0}, train={"max_length": 1000}))


def test_a_shorter_limit_looks_again(config, use, tmp_path):
    def lengthen(row):
        row["conversations"][0]["value"] += " why" * 50

    change_row(tmp_path, "train", 4, lengthen)
    assert use(config)[0] == ALL
    ids, lines = use(changed(config, train={"max_length": 100}))
    assert ids == [number for number in ALL if number != 4] and len(lines) == 1


def test_another_template_looks_again(config, use):
    """The model's settings decide how long a row is: here by what stands before it."""
    assert use(config)[0] == ALL
    limit = changed(config, train={"max_length": 200})
    assert use(limit)[0] == ALL
    with pytest.raises(DataError, match="12 of 12 rows .* tokens but `train.max_length` is 200"):
        use(changed(limit, model={"system_prompt": "why " * 200}))


def test_a_test_rows_answer_needs_no_room(config, use, tmp_path):
    """Its prompt is what the model reads; only a training row is read with its answer."""

    def answer_at_length(row):
        row["conversations"][1]["value"] = "why " * 300

    change_row(tmp_path, "train", 4, answer_at_length)
    change_row(tmp_path, "test", 4, answer_at_length)
    short = changed(config, train={"max_length": 200})
    assert use(short)[0] == [number for number in ALL if number != 4]
    assert use(short, "test")[0] == [1, 2, 3, 4]


def test_references_must_suit_the_metric_of_a_test_row_alone(config, use, tmp_path):
    change_row(tmp_path, "test", 2, lambda row: row.update(references=["red"] * 10))
    assert use(config, "test")[0] == [1, 2, 3, 4]
    config.data.files["counting"].metric = "vqav2"
    assert use(config)[0] == ALL
    message = (
        r"3 of 4 rows of the test .* The first: test.json, row 1: A question has "
        "1 reference answers but must have 10"
    )
    with pytest.raises(DataError, match=message):
        use(config, "test")
    lenient = changed(config, data={"allowed_broken": 0.8})
    assert use(lenient, "test")[0] == [2]
