"""What the run did with its data, every command does: padding, draw, rows left out, suffix."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from inprocess import client_by_id
from llava_files import BROKEN, SUFFIX
from PIL import Image

from pilot_flwr.cli import main as cli
from pilot_flwr.data.federation import client_examples
from pilot_flwr.data.images import expand_to_square, mean_colour
from pilot_flwr.inference import modeling_pilot
from pilot_flwr.inference.generate import Answerer
from pilot_flwr.model.loading import load_processor


@pytest.fixture
def asked(monkeypatch):
    """All examples that a model was given to answer."""
    examples = []
    call = Answerer.__call__

    def noted(answerer, given, **options):
        examples.extend(given)
        return call(answerer, given, **options)

    monkeypatch.setattr(Answerer, "__call__", noted)
    return examples


@pytest.fixture
def evaluate(padded, tmp_path):
    calls = []

    def call(*arguments, run=padded.folder.path, code=0):
        out = tmp_path / f"scores-{len(calls)}.json"
        calls.append(out)
        assert cli.main(["evaluate", str(run), *arguments, "--json", str(out)]) == code
        return json.loads(out.read_text())["clients"] if code == 0 else out

    return call


def colour(padded):
    return mean_colour(load_processor(padded.config.model.path).image_processor)


def used(padded, client, split, *, seed=5):
    """Ids of the rows that the run drew for a split, less those whose image is broken."""
    data = padded.config.data
    drawn = client_examples(
        data, client_by_id(data, client), split, seed=seed, background=colour(padded)
    )
    return [drawn[n].id for n in range(len(drawn)) if drawn.row(n).get("image") not in BROKEN], len(
        drawn
    )


def assert_padded(examples, padded):
    images = [image.read() for example in examples for image in example.images]
    assert images
    for image in images:
        assert image.size == (32, 32)
        assert image.getpixel((0, 0)) == colour(padded)


@pytest.mark.parametrize("split", ["test", "train"])
def test_evaluate_scores_the_rows_that_the_run_used(padded, evaluate, asked, split, capsys):
    rows = evaluate("--split", split)
    kept = {row["client"]: used(padded, row["client"], split) for row in rows}
    assert [e.id for e in asked] == [name for ids, _ in kept.values() for name in ids]
    assert_padded(asked, padded)
    said = capsys.readouterr().err
    for row in rows:
        ids, drawn = kept[row["client"]]
        assert row["examples"] == len(ids) < drawn
        assert f"{drawn} rows checked, {drawn - len(ids)} left out" in said
        assert ids != used(padded, row["client"], split, seed=0)[0]
        (event,) = padded.events(
            "train" if split == "train" else "evaluate", round=2, client=row["client"]
        )
        assert event["examples"] == row["examples"]
        assert row["recorded"] == (row["score"] if split == "test" else None)


def test_only_scores_of_the_same_examples_stand_side_by_side(evaluate, capsys):
    note = "are not shown beside"
    (row,) = evaluate("--client", "vqa-0", "evaluation.batch_size=3", "data.workers=1")
    assert row["recorded"] is not None and note not in capsys.readouterr().err
    for word in ("data.test_examples=4", "data.allowed_broken=0.9", "evaluation.max_new_tokens=1"):
        (row,) = evaluate("--client", "vqa-0", word)
        assert row["recorded"] is None, word
        assert note in capsys.readouterr().err


def test_data_that_has_moved(padded, evaluate, asked, tmp_path, monkeypatch):
    """`data.folder` counts from where the user is, as it does for a run."""
    shutil.copytree(padded.config.data.folder, tmp_path / "own" / "data")
    monkeypatch.chdir(tmp_path)
    (row,) = evaluate("--client", "vqa-0", "data.folder=own/data")
    assert row["recorded"] == row["score"]
    folders = {image.folder for example in asked for image in example.images}
    assert folders == {tmp_path / "own" / "data" / "vqa" / "images"}


def test_scores_of_data_that_was_mended_since_stand_alone(padded, evaluate, tmp_path, capsys):
    shutil.copytree(padded.config.data.folder, tmp_path / "data")
    for name in BROKEN:
        whole = tmp_path / "data" / "vqa" / "images" / "test-1.png"
        shutil.copyfile(whole, whole.with_name(name))
    (row,) = evaluate("--client", "vqa-0", f"data.folder={tmp_path}/data")
    (event,) = padded.events("evaluate", round=2, client="vqa-0")
    assert (row["examples"], row["recorded"]) == (8, None)
    assert f"the run scored {event['examples']} examples, not 8" in capsys.readouterr().err


def test_a_home_folder_that_nobody_has(padded, evaluate, capsys):
    evaluate("data.folder=~no-such-user-at-all/x", code=2)
    assert "`data.folder` begins with '~'" in capsys.readouterr().err


def test_rows_of_a_file_are_looked_at_before_any_is_scored(padded, evaluate, asked, capsys):
    folder = Path(padded.config.data.folder) / "vqa"
    files = ["--data", str(folder / "test.json"), "--images", str(folder / "images")]
    out = evaluate("--client", "vqa-0", *files, code=1)
    assert "test.json, row 3, image 1 cannot be opened" in capsys.readouterr().err
    assert asked == [] and not out.exists()


def test_references_are_looked_at_before_any_is_answered(evaluate, asked, capsys):
    evaluate("--client", "vqa-0", "--metric", "grounding", code=1)
    assert "test.json, row" in capsys.readouterr().err
    assert asked == []


@pytest.fixture
def oblong(tmp_path):
    path = tmp_path / "oblong.png"
    Image.effect_noise((32, 20), 90).convert("RGB").save(path)
    return path


def test_chat(padded, asked, oblong, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    words = ["--client", "vqa-0", "--image", str(oblong), "--question", "What?"]
    assert cli.main(["chat", str(padded.folder.path), *words]) == 0
    assert_padded(asked, padded)
    assert asked[0].turns[0].text == f"<image>\nWhat?\n{SUFFIX}"


def test_predict(padded, asked, oblong, tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>\nWhat?"}]
    row = {"id": 1, "image": oblong.name, "conversations": turns}
    (tmp_path / "q.json").write_text(json.dumps([row]))
    words = ["--client", "vqa-0", "--data", str(tmp_path / "q.json"), "--images", str(tmp_path)]
    assert cli.main(["predict", str(padded.folder.path), *words]) == 0
    assert_padded(asked, padded)
    assert json.loads(capsys.readouterr().out)["question"] == f"<image>\nWhat?\n{SUFFIX}"


def test_export(padded, oblong, tmp_path):
    words = ["--client", "vqa-0", str(tmp_path / "model")]
    assert cli.main(["export", str(padded.folder.path), *words]) == 0
    processor = modeling_pilot.load_processor(tmp_path / "model")
    own = load_processor(padded.config.model.path).image_processor
    with Image.open(oblong) as image:
        square = expand_to_square(image.convert("RGB"), colour(padded))
        expected = own(images=[square], return_tensors="pt")["pixel_values"]
        got = processor(text=["<image>"], images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(got, expected)
