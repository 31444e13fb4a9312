"""`pilot-flwr predict`: LLaVA rows in, JSONL out."""

import json

import pytest

from pilot_flwr import cli
from pilot_flwr.data.federation import client_by_id, client_examples
from pilot_flwr.metrics.text import exact_match


@pytest.fixture
def rows(finished, tmp_path):
    """The test split of one client as LLaVA rows; every other one lacks its answer."""
    data = finished.config.data
    examples = client_examples(data, client_by_id(data, "vqa-0"), "test", seed=0)
    found = []
    for number, example in enumerate(examples):
        example.images[0].read().save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": example.turns[0].text}]
        if number % 2:
            turns.append({"from": "gpt", "value": example.turns[1].text})
        found.append({"id": number, "image": f"{number}.png", "conversations": turns})
    found.append({"id": "text", "conversations": [{"from": "human", "value": "Hello"}]})
    found[0]["references"] = [examples[0].turns[1].text, "another"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return found, [example.turns[1].text for example in examples]


@pytest.fixture
def predict(finished, tmp_path, rows):
    def call(*arguments, code=0):
        files = ["--data", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path)]
        words = ["predict", str(finished.folder.path), "--client", "vqa-0", *files, *arguments]
        assert cli.main(words) == code

    return call


def test_a_line_for_every_row(finished, predict, rows, tmp_path, capsys):
    predict("--out", str(tmp_path / "out.jsonl"), "evaluation.batch_size=4")
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    asked, answers = rows
    assert [line["id"] for line in out] == [row["id"] for row in asked]
    assert [line["row"] for line in out] == list(range(1, len(asked) + 1))
    assert out[0]["question"] == asked[0]["conversations"][0]["value"]
    assert out[0]["references"] == [answers[0], "another"]
    assert out[1]["references"] == [answers[1]]
    assert "references" not in out[2]  # it has no answer
    scores = [exact_match(o["prediction"], [a]) for o, a in zip(out, answers, strict=False)]
    (event,) = finished.events("evaluate", round=2, client="vqa-0")
    assert sum(scores) / len(scores) == event["score"]
    assert f"{len(asked)} predictions" in capsys.readouterr().err


def test_standard_output(predict, rows, capsys):
    predict("--max-new-tokens", "1")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows[0])
    assert all(len(json.loads(line)["prediction"].split()) <= 1 for line in lines)


def test_a_broken_row_is_named(predict, tmp_path, capsys):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"id": "x", "conversations": [{"from": "gpt", "value": "a"}]}) + "\n")
    predict(code=1)
    assert "rows.jsonl, row 8" in capsys.readouterr().err
    predict("--images", str(tmp_path / "absent"), code=1)
    assert "`--images`" in capsys.readouterr().err
