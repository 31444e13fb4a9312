"""Whole runs under Flower and Ray: killed and resumed, as the benchmark does; a worker killed."""

import importlib
import json
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("faults.run")


def test_a_run_that_is_killed_and_resumed_is_bit_identical(faults, tmp_path):
    found = faults.measure(tmp_path, kills=3, kills_a_run=3, seed=7)
    assert (found["kills"], found["identical"], found["runs"]) == (3, 1, 1)
    assert found["resumes"] >= 2  # one that is killed before it has a folder is started again


def test_a_run_goes_on_by_itself_when_a_worker_of_ray_dies(faults, monkeypatch, tmp_path):
    kill = importlib.import_module("faults.kill")
    mark, folder = uuid.uuid4().hex, tmp_path / "run"
    scratch = Path(tempfile.mkdtemp(prefix="kw", dir="/tmp"))
    monkeypatch.setenv(kill.MARK, mark)
    monkeypatch.setenv("RAY_TMPDIR", str(scratch))
    program = Path(sys.executable).parent / "pilot-flwr"
    words = [str(program), "run", *faults.SETTINGS, f"run.folder={folder}"]
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
    assert "Restart 1 of at most 3 (`run.restarts`): the last checkpoint." in said
    assert "Resumed after exchange 2" in said or "Resumed after exchange 3" in said
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["failures"], result["resumed"]) == ("completed", [], 1)
    kept = json.loads((folder / "logs" / "attempt-1" / "result.json").read_text())
    assert kept["status"] == "failed" and "A Ray worker process died" in kept["error"]
