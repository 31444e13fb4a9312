"""`pilot-flwr predict`: LLaVA rows in, JSONL out."""

import json

import pyarrow as pa
import pytest
from inprocess import client_by_id
from pyarrow import parquet

from pilot_flwr.cli import main as cli
from pilot_flwr.data.federation import client_examples
from pilot_flwr.inference.generate import Answerer
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


def test_a_data_set_with_images_gets_the_answers_of_the_same_rows(predict, rows, tmp_path, capsys):
    predict()
    expected = capsys.readouterr().out
    table = [
        row | {"id": str(row["id"]), "image": image and {"bytes": image.read_bytes(), "path": None}}
        for row in rows[0]
        for image in [tmp_path / row["image"] if "image" in row else None]
    ]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    predict("--data", str(tmp_path / "rows.parquet"))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lines = [json.loads(line) for line in expected.splitlines()]
    assert found == [line | {"id": str(line["id"])} for line in lines]


def test_questions_of_every_form_are_answered_alike(finished, predict, tmp_path, capsys):
    """LLaVA's evaluation rows, chat messages, `images`, no id; empty and null answers are none."""
    question = "What digit is at the top left?"
    turn = {"from": "human", "value": question}
    found = [
        {"id": "a", "image": "0.png", "conversations": [turn]},
        {"id": "b", "image": "0.png", "conversations": [turn, {"from": "gpt", "value": ""}]},
        {"id": "c", "image": "0.png", "conversations": [turn, {"from": "gpt", "value": None}]},
        {"images": ["0.png"], "messages": [{"role": "user", "content": question}]},
        {"question_id": 7, "image": "0.png", "text": question, "category": "default"},
        {"id": "d", "images": ["0.png"], "prompt": question},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in found))
    predict()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c", None, 7, "d"]
    assert [line["row"] for line in lines] == [1, 3, 5, 7, 9, 11], "blank lines count"
    assert {line["question"] for line in lines} == {f"<image>\n{question}"}
    assert len({line["prediction"] for line in lines}) == 1
    assert not any("references" in line for line in lines)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("lost", [{"img": "0.png"}, {"images": ["0.png"] * 2}, {"video": "a.mp4"}])
def test_no_picture_is_lost_silently(finished, rows, tmp_path, capsys, command, lost):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "conversations": turns} | lost))
    files = ["--data", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path)]
    assert cli.main([command, str(finished.folder.path), "--client", "vqa-0", *files]) == 1
    assert "rows.jsonl, row 1" in capsys.readouterr().err


def test_standard_output(predict, rows, capsys):
    predict("--max-new-tokens", "1")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows[0])
    assert all(len(json.loads(line)["prediction"].split()) <= 1 for line in lines)


def test_a_broken_row_is_named_before_any_is_answered(predict, tmp_path, capsys):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"id": "x", "conversations": [{"from": "gpt", "value": "a"}]}) + "\n")
        turns = [{"from": "human", "value": "What?"}]
        file.write(json.dumps({"id": "y", "image": "absent.png", "conversations": turns}) + "\n")
    out = tmp_path / "out.jsonl"
    predict("--out", str(out), code=1)
    captured = capsys.readouterr()
    assert "rows.jsonl, row 8" in captured.err and "1 more of 9 rows" in captured.err
    assert not list(tmp_path.glob("out*"))
    predict(code=1)
    assert capsys.readouterr().out == ""
    predict("--images", str(tmp_path / "absent"), code=1)
    assert "`--images`" in capsys.readouterr().err


def test_a_file_that_is_there_is_never_written_over(predict, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    before = rows.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(rows)
    (tmp_path / "mine.jsonl").write_text("mine")
    (tmp_path / "next.jsonl.part").write_text("mine")
    for name in ("rows.jsonl", "link.jsonl", "mine.jsonl", "next.jsonl"):
        predict("--out", str(tmp_path / name), code=2)
        assert "`--out` is" in (said := capsys.readouterr().err) and "already" in said
    assert rows.read_bytes() == before
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    assert (tmp_path / "next.jsonl.part").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_said_before_anything(predict, tmp_path, capsys):
    predict("--out", str(tmp_path / "nowhere" / "out.jsonl"), "--round", "99", code=2)
    assert "No such file or directory" in capsys.readouterr().err
    predict("--out", "/proc/out.jsonl", "--round", "99", code=2)
    assert "cannot be written" in capsys.readouterr().err


def test_what_was_answered_before_a_stop_is_kept(predict, tmp_path, capsys, monkeypatch):
    call, calls = Answerer.__call__, []

    def stopped(answerer, examples, **options):
        calls.append(len(examples))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(answerer, examples, **options)

    monkeypatch.setattr(Answerer, "__call__", stopped)
    out = tmp_path / "out.jsonl"
    predict("--out", str(out), "evaluation.batch_size=2", code=130)
    assert not out.exists()
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 2
    assert "out.jsonl.part" in capsys.readouterr().err
