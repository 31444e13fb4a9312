"""Whole runs under Flower and Ray that are killed and resumed, and a worker that is killed.

``python tests/robustness/faults/run.py`` and ``.../sites.py`` kill more of them.
"""

import json
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest
from faults import kill, run, sites
from faults.sameness import differences


def slow(test):
    return pytest.mark.slow(pytest.mark.timeout(1800)(test))


@slow
def test_a_run_that_is_killed_and_resumed_is_bit_identical(tmp_path):
    found = run.measure(tmp_path, kills=3, kills_a_run=3, seed=7)
    assert (found["kills"], found["identical"], found["runs"]) == (3, 1, 1)
    assert found["resumes"] >= 2  # one that is killed before it has a folder is started again


@slow
def test_a_run_resumes_automatically_when_a_worker_of_ray_dies(monkeypatch, tmp_path):
    mark, folder = uuid.uuid4().hex, tmp_path / "run"
    scratch = Path(tempfile.mkdtemp(prefix="kw", dir="/tmp"))
    monkeypatch.setenv(kill.MARK, mark)
    monkeypatch.setenv("RAY_TMPDIR", str(scratch))
    program = Path(sys.executable).parent / "pilot-flwr"
    words = [str(program), "run", *run.SETTINGS, f"run.folder={folder}"]
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        training, news = kill.Plan("training", 3, 0), kill.News(folder, False)
        while launcher.poll() is None and not training.reached(folder, news.events()):
            time.sleep(0.01)
        workers = [
            process
            for process in psutil.process_iter(["cmdline"])
            if " ".join(process.info["cmdline"] or []).startswith("ray::ClientAppActor")
            and kill._belongs(process, mark, scratch)
        ]
        workers[0].kill()
        said, _ = launcher.communicate(timeout=900)
    finally:
        kill.kill_all(mark, scratch, launcher)
    assert launcher.returncode == 0, said
    assert "A process of the simulation died:\n  " in said
    assert "Restart 1 of at most 3 (`run.restarts`), from the last checkpoint." in said
    assert "Resumed after exchange 2" in said or "Resumed after exchange 3" in said
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"], result["resumed"]) == ("completed", [], 1)
    kept = json.loads((folder / "logs" / "attempt-1" / "result.json").read_text())
    assert kept["status"] == "failed" and "A Ray worker process died" in kept["error"]


@slow
def test_a_federation_whose_sites_are_killed_equals_an_undisturbed_one(tmp_path):
    found = sites.measure(tmp_path / "lab", kills=4, exchanges=3, seed=5)
    assert found["kills"] == 4 and set(found["kills_by_kind"]) == set(sites.KINDS)
    assert found["kills_in_a_session"] and found["repetitions"]
    assert found["differences"] == []


def test_runs_that_differ_are_told_apart(tmp_path):
    """One bit of a tensor, one score or one event more is a difference; times are none."""
    assert run.main(["--quick"])["differences"] == []
    run.make_example(tmp_path)
    one, two = tmp_path / "reference", tmp_path / "run-1"
    for path, old, new in [
        ("metrics.jsonl", b'"loss": 2.0', b'"loss": 2.1'),
        ("summary.md", b"task", b"tusk"),
        ("result.json", b"0.5", b"0.6"),
        ("checkpoint/round-0001/state.json", b'"settings": "s', b'"settings": "S'),
    ]:
        content = (two / path).read_bytes()
        assert content.count(old) == 1
        (two / path).write_bytes(content.replace(old, new))
        assert [found.split(":")[0] for found in differences(one, two)] == [
            path.removeprefix("checkpoint/")
        ]
        (two / path).write_bytes(content)
    for path in two.rglob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert differences(one, two) == [path.relative_to(two).as_posix()]
        path.write_bytes(content)
