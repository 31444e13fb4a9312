"""The app as users start it, under Flower's simulation engine with Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from flowerlab import nothing_left
from llava_files import write_federation

from pilot_flwr.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMALL = (
    "data.train_examples=8",
    "data.test_examples=4",
    "data.clients_per_task=1",
    "train.epochs=1",
    "strategy.rounds=1",
)


def pilot_flwr(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "pilot-flwr", "run", *overrides],
        cwd=cwd, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pilot_flwr_run_goes_through_both_stages(tmp_path, monkeypatch):
    quick = ("evaluation.max_new_tokens=2", "simulation.cpus=1", "run.report=false", "--verbose")
    with nothing_left(monkeypatch):
        done = pilot_flwr("experiment=demo", *SMALL, *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Starting Flower Simulation" in done.stdout
    (run,) = (tmp_path / "outputs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["failures"]) == ("completed", [])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stages = [(e["round"], e["stage"]) for e in events if e["event"] == "train"]
    assert sorted(stages) == [(1, 1)] * 3 + [(2, 2)] * 3
    timeline = (run / "timeline.md").read_text()
    assert "stage 1: 3 clients" in timeline
    assert "stage 2: 3 clients" in timeline
    assert "mean over tasks" in done.stdout
    assert {p.name for p in (run / "clients").iterdir()} == {"vqa-0", "counting-0", "captioning-0"}
    assert len(list((run / "checkpoint/round-0002/lora").iterdir())) == 3
    assert "strategy:" in (run / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_clients_of_two_processes_leave_nothing(tmp_path, monkeypatch):
    quick = ("data.tasks=[vqa]", "evaluation.max_new_tokens=2", "run.report=false")
    with nothing_left(monkeypatch):
        done = pilot_flwr(*SMALL, *quick, "simulation.client_processes=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["failures"]) == ("completed", [])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_own_data_from_files_to_a_model_that_answers(tmp_path):
    """Check, run, evaluate, chat, predict and export, as the pages on own data have it."""
    write_federation(tmp_path, train=24, clients=1)

    def command(*words: str) -> str:
        done = subprocess.run(
            [BIN / "pilot-flwr", *words],
            cwd=tmp_path, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    data = "data=federation.yaml"
    assert "own task adapter" in command("plan", data)
    assert "A run can start." in command("data", "check", data)
    options = ("strategy.rounds=1", "train.epochs=1", "data.workers=2", "seed=3")
    command("run", data, *options, "model.feature_cache.where=disk", "run.folder=run")
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    command("evaluate", "run", "--json", "scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())["clients"]
    assert {row["client"]: row["score"] for row in found} == scores
    image = str(next((tmp_path / "vqa/images").iterdir()))
    question = ["--image", image, "--question", "What digit is at the top left?"]
    assert command("chat", "run", "--client", "vqa-0", *question).strip()
    rows = ["--data", "vqa/test.json", "--images", "vqa/images", "--out", "answers.jsonl"]
    command("predict", "run", "--client", "vqa-0", *rows)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4
    command("export", "run", "--client", "vqa-0", "model")
    command("export", "run", "--task", "vqa", "merged", "--merge")
    assert (tmp_path / "model/modeling_pilot.py").is_file()
    assert (tmp_path / "merged/config.json").is_file()


def test_a_wrong_override_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "strategy.num_neighbors=0"]) == 2
    assert "`strategy.num_neighbors` is 0 but must be at least 1." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], "finished:failed", "2 SuperNodes but the configuration has 9 clients"),
        (["--run-config", f'overrides="{" ".join(SMALL)} run.folder=RUN"',
          "--federation-config", "num-supernodes=3 client-resources-num-cpus=1"],
         "finished:completed", "mean over tasks"),
    ],
)  # fmt: skip
def test_plain_flwr_run(tmp_path, options, status, words):
    """With Flower's default of two nodes it fails with the command to use; with that it works."""
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39217",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }

    def flwr(*arguments: str) -> str:
        done = subprocess.run(
            [BIN / "flwr", *arguments], cwd=ROOT, env=environment, capture_output=True,
            text=True, timeout=280, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    options = [option.replace("RUN", str(tmp_path / "run")) for option in options]
    try:
        log = flwr("run", ".", *options, "--stream")
        runs = json.loads(flwr("list", "--format", "json"))["runs"]
        (run,) = runs
        assert run["status"] == status, log
        summary = tmp_path / "run" / "summary.md"
        assert words in log + json.dumps(run) + (summary.read_text() if options else "")
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == environment["FLWR_HOME"]:
                    process.kill()
            except psutil.Error:
                continue
