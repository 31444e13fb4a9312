"""Flower's engine: each way a run can end is recognised, and no process is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from flowerlab import leftovers, nothing_left, pretend_flower, write_app

from pilot_flwr.errors import RunError
from pilot_flwr.launch import simulation
from pilot_flwr.launch.processes import Interrupted, ProcessSandbox, StopSignals, marked_processes
from pilot_flwr.launch.simulation import launch, simulation_environment

FEDERATION = (
    "num-supernodes=2 client-resources-num-cpus=1 client-resources-num-gpus=0.0 "
    "init-args-num-cpus=2 init-args-num-gpus=0"
)
GOOD = {"status": "completed", "error": None, "failures": [], "scores": {}}
FINISHED = '{"success": true, "runs": [{"status": "finished:completed"}]}'


@pytest.fixture
def start(monkeypatch):
    """Launch an app instead of this package's."""

    def start(app: Path, folder: Path, out, **options):
        monkeypatch.setattr(simulation, "app_folder", lambda scratch: app)
        overrides = f"run.folder={folder}"
        return launch(overrides, folder, federation=FEDERATION, out=out, **options)

    return start


@pytest.fixture
def run(start):
    def run(app: Path, folder: Path, **options):
        out: list[str] = []
        return start(app, folder, out.append, **options), out

    return run


@pytest.mark.slow  # its faster sibling is test_end_to_end.py's first test
def test_a_run_with_ray_succeeds_and_leaves_nothing(run, tmp_path: Path, monkeypatch):
    folder = tmp_path / "run"
    with nothing_left(monkeypatch):
        outcome, out = run(write_app(tmp_path / "app", "works"), folder, verbose=True)
    assert outcome.succeeded, outcome.explanation
    assert "Exchange 1: 2 clients, stage 1" in out
    assert sum("loss 1.000" in line for line in out) == 2
    assert any("Starting Flower Simulation" in line for line in out)
    assert "Starting Flower Simulation" in (folder / "logs" / "flower.log").read_text()
    assert "Starting Flower SuperLink" in (folder / "logs" / "superlink.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("client raises", "Client c1 failed in exchange 1 (train): ValueError: the client is not"),
        ("client exits", "Client c1 failed in exchange 1 (train): The actor died unexpectedly"),
        ("server raises", "the server gave up"),
        ("server exits", "The simulation's process ended without reporting"),
    ],
)
def test_a_run_with_ray_that_fails_says_why(run, tmp_path: Path, monkeypatch, mode, words):
    with nothing_left(monkeypatch):
        outcome, _ = run(write_app(tmp_path / "app", mode), tmp_path / "run")
    assert not outcome.succeeded
    assert words in "\n".join(outcome.explanation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("flower-superlink", "SuperLink ended with code -9"),
        ("flwr-simulation", "The simulation's process ended without reporting"),
        ("raylet", "Client c1 failed in exchange 1 (train): The actor died unexpectedly"),
    ],
)
def test_a_part_of_flower_that_is_killed_ends_the_run(start, tmp_path, monkeypatch, program, words):
    def kill(line: str) -> None:
        if line.startswith("Exchange 1"):
            deadline = time.monotonic() + 60
            while not _find("ray::ClientAppActor.run", base) and time.monotonic() < deadline:
                time.sleep(0.2)
            _find(program, base)[0].kill()

    app, folder = write_app(tmp_path / "app", "slow"), tmp_path / "run"
    with nothing_left(monkeypatch) as base:
        outcome = start(app, folder, kill)
    assert not outcome.succeeded
    assert words in "\n".join(outcome.explanation)


def _find(program: str, base: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            names = [Path(part.strip()).name for part in process.cmdline()[:2]]
            if program in names and process.cwd().startswith(f"{base}/"):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"lifetime": 3}, "SuperLink ended with code 7"),
        ({"simulation_seconds": 1}, "The simulation's process ended without reporting"),
        ({"log_seconds": 0, "list": FINISHED}, "The ServerApp wrote no result.json"),
    ],
)
def test_a_run_that_cannot_finish_is_noticed(run, tmp_path: Path, monkeypatch, kinds, words):
    """It may restart automatically only if a process has died."""
    pretend_flower(tmp_path, monkeypatch, **kinds)
    with nothing_left(monkeypatch):
        outcome, _ = run(tmp_path, tmp_path / "run")
    assert not outcome.succeeded
    assert words in "\n".join(outcome.explanation)
    assert "  | flower says hello" in outcome.explanation
    assert outcome.restartable == ("ended" in words)


def test_a_simulation_that_never_starts_is_noticed(run, tmp_path: Path, monkeypatch):
    pretend_flower(tmp_path, monkeypatch, simulation_seconds=None)
    monkeypatch.setattr(simulation, "START_SECONDS", 3.0)
    with nothing_left(monkeypatch):
        outcome, _ = run(tmp_path, tmp_path / "run")
    assert "did not start the simulation within 3 s" in outcome.explanation[0]


def test_a_run_that_hangs_after_its_result_is_ended(run, tmp_path: Path, monkeypatch):
    pretend_flower(tmp_path, monkeypatch)
    monkeypatch.setattr(simulation, "FINISH_SECONDS", 1.0)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(GOOD))
    with nothing_left(monkeypatch):
        outcome, _ = run(tmp_path, folder)
    assert "did not end the run within 1 s of its result" in outcome.explanation[0]


def test_the_status_is_polled_while_the_log_is_silent(run, tmp_path: Path, monkeypatch):
    pretend_flower(tmp_path, monkeypatch, list=FINISHED)
    monkeypatch.setattr(simulation, "QUERY_SECONDS", 1.0)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(GOOD))
    with nothing_left(monkeypatch):
        outcome, _ = run(tmp_path, folder)
    assert outcome.succeeded


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ('{"success": false, "error-message": "no such app"}', "no such app"),
        ("Traceback", "`flwr run` returned no JSON"),
        ("[]", "`flwr run` returned no JSON"),
    ],
)
def test_a_refused_app_is_an_error(run, tmp_path: Path, monkeypatch, answer, words):
    pretend_flower(tmp_path, monkeypatch, run=answer)
    with nothing_left(monkeypatch), pytest.raises(RunError, match=words):
        run(tmp_path, tmp_path / "run")


def test_a_superlink_that_does_not_start_is_an_error(run, tmp_path: Path, monkeypatch):
    pretend_flower(tmp_path, monkeypatch, simulation="sys.exit('no disk')")
    with nothing_left(monkeypatch), pytest.raises(RunError, match="SuperLink did not start"):
        run(tmp_path, tmp_path / "run")
    assert "no disk" in (tmp_path / "run" / "logs" / "superlink.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run(run, tmp_path: Path, monkeypatch, number):
    pretend_flower(tmp_path, monkeypatch)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), number))
    timer.start()
    with nothing_left(monkeypatch), pytest.raises(Interrupted) as caught:
        run(tmp_path, tmp_path / "run")
    timer.join()
    assert caught.value.signum == number


def test_ignored_signals_stay_ignored_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted, match="stopped by SIGTERM"):
                signals.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert signal.getsignal(signal.SIGTERM) is before


def test_flowers_environment_keeps_the_users_settings(tmp_path: Path):
    base = {"PATH": "/bin", "no_proxy": "a.b", "HF_HUB_OFFLINE": "1", "FLWR_HOME": "/home/u/.flwr"}
    environment = simulation_environment(tmp_path, base)
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/bin"]
    assert environment["NO_PROXY"] == environment["no_proxy"] == "a.b,127.0.0.1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["FLWR_HOME"] == str(tmp_path / "flwr")
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert "HF_HUB_OFFLINE" not in simulation_environment(tmp_path, {})


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    time.sleep(600)
os.setsid()
os.chdir("/")
time.sleep(600)
"""


def test_a_detached_child_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr("pilot_flwr.launch.processes.GRACE_SECONDS", 0.5)
    with nothing_left(monkeypatch):
        stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        with ProcessSandbox() as sandbox:
            sandbox.spawn(
                [sys.executable, "-c", STUBBORN],
                os.environ,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + 10
            while len(marked_processes(sandbox.mark, sandbox.folder)) < 2:
                assert time.monotonic() < deadline
            time.sleep(0.3)
        assert marked_processes(sandbox.mark, sandbox.folder) == []
        assert stranger.poll() is None
        stranger.communicate(b"\n")


def test_a_process_without_environment_is_known_by_its_folder(monkeypatch):
    with nothing_left(monkeypatch), ProcessSandbox() as sandbox:
        child = subprocess.Popen(["sleep", "600"], env={}, cwd=sandbox.folder)
        try:
            assert [p.pid for p in marked_processes(sandbox.mark, sandbox.folder)] == [child.pid]
            shell = subprocess.Popen(["sleep", "600"], env={"A": "1"}, cwd=sandbox.folder)
            assert shell.pid not in [p.pid for p in marked_processes(sandbox.mark, sandbox.folder)]
            shell.kill()
            shell.wait()
        finally:
            child.kill()
            child.wait()


LAUNCHER = """
import os, subprocess, sys, time
from pilot_flwr.launch.processes import ProcessSandbox
sandbox = ProcessSandbox()
code = "import os, time; os.fork() or os.setsid(); time.sleep(600)"
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
environment = {**os.environ, "FLWR_HOME": str(sandbox.folder) + "/"}
sandbox.spawn([sys.executable, "-c", code], environment, **quiet)
time.sleep(1)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_killed_launcher_leaves_nothing_running(monkeypatch):
    with nothing_left(monkeypatch, patience=20) as base:
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE)
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        assert len(leftovers(base)) == 3  # the folder and two processes
        launcher.kill()
        launcher.communicate()
