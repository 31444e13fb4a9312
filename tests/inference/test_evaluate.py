"""`pilot-flwr evaluate`: the run's own scores again, and others."""

import json
import shutil
from pathlib import Path

import pytest
from inprocess import client_by_id

from pilot_flwr.cli import main as cli
from pilot_flwr.data.federation import client_examples
from pilot_flwr.inference import evaluate as evaluate_module
from pilot_flwr.metrics import METRICS


@pytest.fixture
def evaluate(finished, tmp_path):
    """Run the command on the finished run; return what it writes as JSON."""

    def call(*arguments, folder=finished.folder.path, code=0):
        out = tmp_path / f"scores-{len(list(tmp_path.glob('scores-*')))}.json"
        assert cli.main(["evaluate", str(folder), *arguments, "--json", str(out)]) == code
        return json.loads(out.read_text()) if code == 0 else None

    return call


def test_it_reproduces_the_runs_last_scores_exactly(finished, evaluate, capsys):
    result = evaluate()
    expected = {e["client"]: e["score"] for e in finished.events("evaluate", round=2)}
    assert {row["client"]: row["score"] for row in result["clients"]} == expected
    assert all(row["recorded"] == row["score"] for row in result["clients"])
    assert {row["stage"] for row in result["clients"]} == {2}
    (last,) = [
        line
        for line in (finished.folder.path / "summary.md").read_text().splitlines()
        if "mean over tasks" in line
    ]
    assert last.split("**")[-2] == f"{result['mean_over_tasks']:.3f}"
    out = capsys.readouterr().out
    assert "exchange 2" in out and "mean over tasks" in out


def test_the_mean_is_over_examples_and_then_over_tasks(evaluate):
    result = evaluate("--split", "train")
    for task, score in result["tasks"].items():
        rows = [row for row in result["clients"] if row["task"] == task]
        right = sum(round(row["score"] * row["examples"]) for row in rows)
        assert score == pytest.approx(right / sum(row["examples"] for row in rows), rel=1e-12)
    assert len({row["examples"] for row in result["clients"]}) > 1  # else it shows nothing
    assert result["mean_over_tasks"] == sum(result["tasks"].values()) / 2
    assert all(row["recorded"] is None for row in result["clients"])


def test_every_answer_is_written_with_its_score(finished, evaluate, tmp_path):
    path = tmp_path / "answers.jsonl"
    result = evaluate("--answers", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    config = finished.config
    for row in result["clients"]:
        own = [line for line in lines if line["client"] == row["client"]]
        client = client_by_id(config.data, row["client"])
        examples = client_examples(config.data, client, "test", seed=config.seed)
        assert [line["id"] for line in own] == [example.id for example in examples]
        assert [line["references"] for line in own] == [list(e.answers) for e in examples]
        same = [float(line["answer"].strip() == line["references"][0]) for line in own]
        assert [line["score"] for line in own] == same
        assert row["score"] == sum(same) / len(same) and "answers" not in row


def test_chosen_clients_and_the_consensus_model(evaluate):
    assert [r["client"] for r in evaluate("--client", "vqa-1")["clients"]] == ["vqa-1"]
    rows = evaluate("--task", "vqa")["clients"]
    assert [(r["client"], r["model"], r["stage"]) for r in rows] == [
        ("vqa-0", "consensus of vqa", 1),
        ("vqa-1", "consensus of vqa", 1),
    ]


def write_rows(folder, config, client="vqa-0"):
    """The client's test split as LLaVA JSON, with its images."""
    rows = []
    for number, example in enumerate(
        client_examples(config.data, client_by_id(config.data, client), "test", seed=config.seed)
    ):
        example.images[0].read().save(folder / f"{number}.png")
        (question, answer) = example.turns
        turns = [
            {"from": "human", "value": question.text},
            {"from": "gpt", "value": answer.text},
        ]
        rows.append({"id": example.id, "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


def test_a_file_of_rows_scores_as_the_same_split(finished, evaluate, tmp_path):
    write_rows(tmp_path, finished.config)
    files = ["--data", str(tmp_path / "rows.json"), "--images", str(tmp_path)]
    (row,) = evaluate("--client", "vqa-0", *files)["clients"]
    (same,) = evaluate("--client", "vqa-0")["clients"]
    assert (row["score"], row["examples"]) == (same["score"], same["examples"])
    assert row["recorded"] is None
    (other,) = evaluate("--client", "vqa-0", *files, "--metric", "anls")["clients"]
    assert other["metric"] == "anls"


def test_an_approximate_metric_says_so(evaluate, capsys, monkeypatch):
    import dataclasses

    row = dataclasses.replace(METRICS["exact_match"], approximate=lambda: "no Java here")
    monkeypatch.setitem(METRICS, "exact_match", row)
    assert evaluate("--client", "vqa-0")["clients"][0]["approximate"] == "no Java here"
    captured = capsys.readouterr()
    assert "different ranges" not in captured.err
    assert "(approximate)" in captured.out
    assert "Approximate: no Java here" in captured.err


def test_a_mean_of_different_ranges_is_marked(evaluate, capsys, monkeypatch):
    monkeypatch.setattr(
        evaluate_module,
        "task_metric",
        lambda data, task: "cider_d" if task == "vqa" else "exact_match",
    )
    evaluate()
    assert "different ranges" in capsys.readouterr().err


def test_a_torn_checkpoint_is_said_aloud(finished, evaluate, tmp_path, capsys):
    copy = Path(shutil.copytree(finished.folder.path, tmp_path / "run"))
    (copy / "checkpoint" / "round-0002" / "state.json").unlink()
    assert evaluate("--client", "vqa-0", folder=copy)["round"] == 1
    assert "Skipped a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--client", "x"], 2, "`--client` is 'x' but must be one of vqa-0"),
        (["--client", "x", "--task", "vqa"], 2, "`--client` is 'x' but must be one of vqa-0"),
        (["--task", "x"], 2, "`--task` is 'x'"),
        (["--task", "vqa", "--client", "counting-0"], 2, "None of the clients"),
        (["--metric", "x"], 2, "`--metric` is 'x'"),
        (["--state", "x"], 2, "exactly one `--client`"),
        (["--images", "x"], 2, "`--images` needs `--data`"),
        (["--data", "absent.json"], 1, "absent.json cannot be opened"),
        (["--device", "tpu"], 2, "`device` is 'tpu'"),
        (["evaluation.batch_size=0"], 2, "`evaluation.batch_size` is 0"),
        (["--round", "9"], 1, "`--round` is 9"),
        (["train.max_length=99", "evaluation.batch_size=["], 2, "'evaluation.batch_size=[': "),
        (["data=my.yaml"], 2, "'data=my.yaml' must be one setting, such as `data.folder="),
        (["+data.files={}"], 2, "'+data.files={}' must be one setting"),
        (["experiment=demo"], 2, "'experiment=demo' must be one setting"),
    ],
)
def test_wrong_arguments(evaluate, capsys, arguments, code, words):
    evaluate(*arguments, code=code)
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_run(evaluate, tmp_path, capsys):
    evaluate(folder=tmp_path, code=1)
    assert "not a run folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_before_anything(finished, tmp_path, capsys):
    words = ["evaluate", str(finished.folder.path), "--round", "99", "--json"]
    assert cli.main([*words, str(tmp_path / "nowhere" / "x.json")]) == 2
    assert "`--json` is" in (said := capsys.readouterr().err) and "No such file" in said
    (tmp_path / "rows.json").write_text("mine")
    assert cli.main([*words, str(tmp_path / "rows.json")]) == 2
    assert "already" in capsys.readouterr().err
    assert (tmp_path / "rows.json").read_text() == "mine"
