"""Sweeps: which jobs there are, that each is done once, whatever happens in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from pilot_flwr.cli import main as cli
from pilot_flwr.config.loading import config_folder
from pilot_flwr.errors import ConfigError
from pilot_flwr.run.atomic import hold
from pilot_flwr.run.events import Evaluated
from pilot_flwr.run.history import task_scores
from pilot_flwr.sweeps.jobs import (
    LONGEST_NAME,
    SweepFolder,
    expand_jobs,
    job_name,
    read_manifest,
    split_overrides,
)
from pilot_flwr.sweeps.results import as_csv, read_rows

TINY = [
    "data.tasks=[vqa]",
    "data.clients_per_task=1",
    "data.train_examples=8",
    "data.test_examples=4",
    "train.epochs=1",
    "strategy.rounds=1",
    "evaluation.max_new_tokens=2",
    "simulation.engine=in-process",
    "run.tensorboard=false",
    "run.report=false",
]


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=pilot,fedit", "seed=0,1,2"],
        ["seed=range(0,6,2)", "data.tasks=[vqa],[vqa,counting]", "strategy.rounds=1"],
        ["name='a b',c", "strategy.rounds=choice(1,2)", "train.lr_scale=0.5,1"],
        ["seed=0,1", "seed=4"],
        ["seed=7"],
    ],
)
def test_jobs_are_those_of_hydras_basic_sweeper(words):
    overrides = OverridesParser.create().parse_overrides(words)
    (expected,) = BasicSweeper.split_arguments(overrides, None)
    assert [list(job.overrides) for job in expand_jobs(words)] == expected


def test_a_job_is_called_by_what_tells_it_from_the_others():
    jobs = expand_jobs(["strategy=glob(pilot_no_*)", "seed=0,1", "strategy.rounds=1"])
    methods = sorted(path.stem for path in (config_folder() / "strategy").glob("pilot_no_*.yaml"))
    assert [job.name for job in jobs] == [f"strategy={m},seed={s}" for m in methods for s in (0, 1)]
    assert jobs[0].swept == {"strategy": methods[0], "seed": "0"}
    assert expand_jobs(["seed=3"])[0].name == "job"


def test_names_of_folders_are_plain_and_apart():
    odd = [job_name({"name": text}) for text in ("a/b", "a b", "'a b'", "x" * 300, "x" * 301)]
    assert len(set(odd)) == len(odd)
    assert all("/" not in name and " " not in name and len(name) <= LONGEST_NAME for name in odd)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["seed=interval(0,1)"], "range without steps"),
        (["seed=0,0"], "Two jobs of the sweep are the same: seed=0"),
        (["seed=0", "name=a,"], "The override 'name=a,' cannot be read: "),
    ],
)
def test_what_is_no_sweep_is_refused(words, error):
    with pytest.raises(ConfigError, match=error):
        expand_jobs(words)


def test_hydras_own_words_are_for_the_launcher_alone():
    words = ["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert split_overrides(words) == (words[:1], words[1:])
    with pytest.raises(ConfigError, match=r"`hydra/launcher` and `hydra\.launcher"):
        split_overrides(["hydra.sweep.dir=x"])
    for word in ("resume=x", "run.folder=x"):
        with pytest.raises(ConfigError, match="is for a single run"):
            split_overrides([word])


def test_every_job_is_checked_before_the_first_begins(tmp_path, capsys):
    words = ["seed=0,1", "strategy.rounds=1,0", "--out", str(tmp_path / "s")]
    assert cli.main(["sweep", "-m", *words]) == 2
    error = capsys.readouterr().err
    assert "Job seed=0,strategy.rounds=0 and 1 more: `strategy.rounds` is 0 but must be" in error
    assert "Nothing was started." in error
    assert not (tmp_path / "s").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert cli.main(["sweep", "seed=0", "--out", str(tmp_path)]) == 2
    assert "which holds 'notes.txt' but no sweep" in capsys.readouterr().err
    assert cli.main(["sweep", "--out", str(tmp_path)]) == 2
    assert "A sweep needs overrides" in capsys.readouterr().err


def command(*words):
    return [sys.executable, "-m", "pilot_flwr.cli.main", "sweep", *map(str, words)]


def sweep(*words, log=os.devnull):
    """Run the command; return its exit code."""
    with open(log, "w") as stream:
        run = subprocess.run(command(*words), stdout=stream, stderr=stream, timeout=250)
    return run.returncode


GOOD, BAD = (f"train.stage1.connector_lr={rate}" for rate in ("0.001", "1e+30"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two jobs, of which one fails in its training."""
    folder = tmp_path_factory.mktemp("swept")
    words = ["-m", "seed=0", "train.stage1.connector_lr=1e-3,1e30", *TINY]
    assert sweep(*words, "--out", folder / "s", log=folder / "shown") == 1
    shutil.copytree(folder / "s", folder / "first")  # to look at, whatever happens to the other
    return folder


def test_a_failed_job_does_not_stop_the_others(swept):
    out, shown = swept / "first", (swept / "shown").read_text()
    assert f"[1/2] {GOOD}: done in" in shown and f"[2/2] {BAD}: FAILED after" in shown
    assert "| pilot " + GOOD in shown
    assert f"1 of 2 jobs failed:\n  {BAD}: " in shown
    assert f"log: {swept / 's' / 'logs' / f'{BAD}.log'}" in shown
    assert "The loss is nan" in (out / "logs" / f"{BAD}.log").read_text()
    first, second = read_rows(out)
    assert (first["status"], second["status"]) == ("done", "failed")
    assert (first["method"], first["variant"], first["seed"]) == ("pilot", GOOD, "0")
    run = out / "runs" / GOOD
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (score,) = [e["score"] for e in events if e["event"] == "evaluate" and e["round"] == 2]
    assert float(first["score.vqa"]) == float(first["mean"]) == score
    assert f"{score:.3f}" in (run / "summary.md").read_text()
    sent = [sum(e["up"].values()) for e in events if e["event"] == "train"]
    assert int(first["bytes_up"]) == sum(sent) > 0


@pytest.mark.slow
def test_a_resumed_sweep_repeats_failed_jobs_only(swept):
    out, shown = swept / "s", swept / "again"
    run = out / "runs" / GOOD
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    words = ["seed=0", "train.stage1.connector_lr=choice(1e-3)", *TINY, "--out", out]
    assert sweep(*words, "--baseline", f"pilot {GOOD}", log=shown) == 0
    assert f"[1/1] {GOOD}: already done" in shown.read_text()
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before
    assert [row["status"] for row in read_rows(out)] == ["done", "failed"]
    # A run that ended with a failed client is kept, and its job restarted.
    result = run / "result.json"
    failure = {"client": "vqa-0", "round": 1, "phase": "train", "reason": "out of memory"}
    result.write_text(json.dumps(json.loads(result.read_text()) | {"failures": [failure]}))
    archived = out / "failed" / f"{GOOD}-1"
    assert sweep("--out", out, log=shown) == 1  # the jobs of both commands, one of which fails
    text = shown.read_text()
    assert "FAILED earlier: Client vqa-0 failed in exchange 1 (train): out of memory" in text
    assert f"its run folder is now {archived}" in text and f"{GOOD}: starting" in text
    assert f"1 of 2 jobs failed:\n  {BAD}: " in text
    assert (archived / "summary.md").exists() and json.loads(result.read_text())["failures"] == []
    assert f"| difference to pilot {GOOD} |" in text  # the earlier command's baseline
    # A baseline may be a method that the folder already has, and no other.
    words = ["strategy=choice(local)", "seed=0", *TINY, "--out", out, "--baseline", "x"]
    assert sweep(*words, log=shown) == 2
    assert f"but the sweep has local, pilot {GOOD}" in shown.read_text()


def test_a_manifest_of_an_earlier_version_is_read(swept):
    folder = SweepFolder(swept / "first")
    written = read_manifest(folder)
    text = folder.manifest.read_text()
    folder.manifest.write_text(text.replace('"overrides"', '"words"'))
    assert '"words"' in folder.manifest.read_text() and read_manifest(folder) == written
    folder.manifest.write_text(text)


def test_one_sweep_at_a_time_in_a_folder(tmp_path):
    out = tmp_path / "s"
    with hold(SweepFolder(out).lock, "test"):
        assert sweep("seed=0", *TINY, "--out", out, log=tmp_path / "shown") == 1
    assert f"The sweep in {out} is in use by another process." in (tmp_path / "shown").read_text()


def test_a_tasks_score_counts_its_examples():
    common = {"client": "a-0", "task": "a", "metric": "exact_match", "seconds": 1.0}
    events = [
        Evaluated(exchange=1, score=0.5, examples=2, **common),
        Evaluated(exchange=1, score=1.0, examples=6, **common),
        Evaluated(exchange=0, score=0.0, examples=6, **common),
    ]
    assert task_scores(events, 1) == {"a": 7 / 8}


def test_results_are_read_as_they_were_written(tmp_path):
    rows = [
        {"name": "a,b", "method": 'c"d', "seed": 1, "mean": 1 / 3, "score.x": 0.1 + 0.2},
        {"name": "é\n", "method": "m", "seed": 2, "zero_shot.y": 0.5, "error": "no, not"},
    ]
    path = tmp_path / "results.csv"
    path.write_text(as_csv(rows), encoding="utf-8")
    read = read_rows(path)
    assert float(read[0]["mean"]) == 1 / 3
    assert float(read[0]["score.x"]) == 0.1 + 0.2
    assert [row["name"] for row in read] == ["a,b", "é\n"]
    assert read[1]["score.x"] == ""
    path.write_text(path.read_text(encoding="utf-8") + "cut,short\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="one cell per column"):
        read_rows(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="lacks the column `name`"):
        read_rows(path)


def begin(out: Path, *words: str) -> subprocess.Popen[str]:
    """Start a sweep, or without words go on with the one that is there."""
    given = [*words, *TINY, "strategy.rounds=3"] if words else []
    return subprocess.Popen(
        command(*given, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_goes_on_where_it_was(tmp_path, number):
    out = tmp_path / "s"
    process = begin(out, "-m", "seed=0,1,2")
    wait_for(out / "runs/seed=1/checkpoint/round-0001", process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or f"To resume: pilot-flwr sweep --out {out}" in said
    first = (out / "runs/seed=0/metrics.jsonl").read_bytes()
    again = begin(out)
    shown = again.communicate(timeout=200)[0]
    assert again.returncode == 0, shown
    assert "seed=0: already done" in shown
    assert "seed=1: resuming" in shown
    assert "seed=2: starting" in shown
    assert (out / "runs/seed=0/metrics.jsonl").read_bytes() == first

    whole = begin(tmp_path / "whole", "-m", "seed=0,1,2")
    whole.communicate(timeout=200)
    assert whole.returncode == 0
    rows = [read_rows(path) for path in (out, tmp_path / "whole")]
    same = [[{k: v for k, v in row.items() if k != "seconds"} for row in found] for found in rows]
    assert same[0] == same[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_joblib_runs_jobs_side_by_side(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    rates = "train.stage1.connector_lr=1e-3,2e-3,1e30"
    process = begin(tmp_path / "s", "-m", rates, *launcher)
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 1, shown
    alone = begin(tmp_path / "alone", "-m", rates)
    alone.communicate(timeout=300)
    side_by_side, one_by_one = read_rows(tmp_path / "s"), read_rows(tmp_path / "alone")
    assert [row["status"] for row in side_by_side] == ["done", "done", "failed"]
    for row in (*side_by_side, *one_by_one):
        del row["seconds"]
    assert side_by_side == one_by_one
