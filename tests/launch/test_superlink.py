"""Runs on a SuperLink: connection, announcements, result, and a Ctrl-C that stops nothing."""

import json
import os
import signal
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from flowerlab import pretend_flower

from pilot_flwr.cli.main import main
from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.launch import flower_cli
from pilot_flwr.launch.superlink import (
    Detached,
    RemoteRun,
    find_connection,
    run_remotely,
)
from pilot_flwr.run.events import InstructionSent, RosterCalled, RosterEntry
from pilot_flwr.run.outcome import COMPLETED, RunResult, RunStatus, evaluate_result
from pilot_flwr.server.event_recorder import Announcer, read_announcement

RESULT = {"status": "completed", "error": None, "failures": [], "scores": {}, "seconds": 3.5}
FAILURE = {"round": 2, "phase": "train", "client": "c1", "reason": "out of memory\nINFO :      x"}
RUN = RemoteRun("7", "pilot")
CONFIG = """
[superlink]
default = "local"
[superlink.pilot]
address = "127.0.0.1:8000"
root-certificates = "ca.crt"
[superlink.local]
address = ":local:"
"""


def announced(folder: Path, result: dict) -> list[str]:
    lines: list[str] = []
    announcer = Announcer(lambda line: lines.append(f"\x1b[92mINFO \x1b[0m:      {line}"))
    announcer.event(RosterCalled(exchange=1, clients=(RosterEntry("c1", "vqa", 9, 1),)))
    announcer.event(
        InstructionSent(exchange=1, phase="train", client="c1", task="vqa", stage=1, down={})
    )
    announcer.end(folder, result)
    return lines


def test_what_is_announced_is_read_back(tmp_path):
    (tmp_path / "summary.md").write_text("| task | score |\n|---|---|\n")
    said = [read_announcement(line) for line in announced(tmp_path, RESULT)]
    assert said[:2] == ["", "Exchange 1: 1 client, stage 1"]
    assert said[-3:-1] == ["| task | score |", "|---|---|"]
    assert said[-1] == RunResult(str(tmp_path), "completed", "", 0, (), 3.5)
    assert evaluate_result(RunStatus(COMPLETED), said[-1], "").succeeded


def test_failures_travel_with_the_result(tmp_path):
    result = RESULT | {"failures": [FAILURE] * 9}
    said = read_announcement(announced(tmp_path, result)[-1])
    assert not evaluate_result(RunStatus(COMPLETED), said, "").succeeded
    assert said.failures == 9 and len(said.reasons) == 5
    assert said.reasons[0] == "Client c1 failed in exchange 2 (train): out of memory"


@pytest.mark.parametrize(
    "line",
    [
        "INFO :      Start `flwr-serverapp` process",
        "INFO :      Verdict: yes",
        'INFO :      Verdict: {"status": "completed"}',
        'WARNING :   c1 says Verdict: {"status": "completed"}',
        "INFO :      Verdict: [1]",
        "",
    ],
)
def test_other_lines_announce_nothing(line):
    assert read_announcement(line) is None


@pytest.mark.parametrize(
    ("status", "change", "words"),
    [
        ("finished:completed", {}, ""),
        ("finished:completed", {"failures": 1, "reasons": ("Client c1 failed",)}, "Client c1"),
        ("finished:completed", {"status": "failed", "error": "RunError: no"}, "RunError: no"),
        ("finished:completed", None, "no result"),
        ("finished:failed", {}, "finished:failed"),
        ("finished:stopped", None, "finished:stopped"),
    ],
)
def test_a_run_succeeds_if_flower_and_the_serverapp_say_so(status, change, words):
    result = RunResult("/run", "completed", "", 0, (), 1.0)
    result = None if change is None else replace(result, **change)
    outcome = evaluate_result(RunStatus(status), result, "Full log: flwr log 7")
    assert outcome.succeeded is (words == "")
    assert words in "\n".join(outcome.explanation)


def test_connections_are_those_of_flowers_file(tmp_path):
    environment = {"FLWR_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"no \[superlink.pilot\]; it has: none"):
        find_connection("pilot", environment)
    (tmp_path / "config.toml").write_text(CONFIG)
    assert find_connection("pilot", environment) == "127.0.0.1:8000"
    with pytest.raises(ConfigError, match="it has: local, pilot"):
        find_connection("nix", environment)
    with pytest.raises(ConfigError, match="simulation"):
        find_connection("local", environment)
    (tmp_path / "config.toml").write_text("[superlink")
    with pytest.raises(ConfigError, match=r"config.toml cannot be read"):
        find_connection("pilot", environment)


FLWR = """
import sys, time
arguments = sys.argv[1:]
if arguments[0] == "run":
    assert "--federation-config" not in arguments
    value = arguments[arguments.index("--run-config") + 1]
    value = open(value).read() if value.endswith(".toml") else value
    open(LOG + ".config", "w").write(value)
    print('{"success": true, "run-id": "7"}')
elif arguments[0] == "log":
    print(open(LOG).read(), flush=True)
    time.sleep(SECONDS)
elif arguments[0] == "list":
    print('{"success": true, "runs": [{"status": "STATUS", "status-details": "N/A"}]}')
"""


@pytest.fixture
def flower(tmp_path, monkeypatch):
    """A Flower whose command line is pretended: (log's lines, status, seconds that it streams)."""

    def pretend(lines, status="finished:completed", seconds=0):
        folder = tmp_path / "programs"
        folder.mkdir()
        (tmp_path / "log").write_text("\n".join(lines) + "\n")
        pretend_flower(folder, monkeypatch)
        text = FLWR.replace("LOG", repr(str(tmp_path / "log")))
        text = text.replace("SECONDS", str(seconds)).replace("STATUS", status)
        first = (folder / "flwr").read_text().splitlines()[0]
        (folder / "flwr").write_text(f"{first}\n{text}")
        home = tmp_path / "home"
        home.mkdir()
        (home / "config.toml").write_text(CONFIG)
        monkeypatch.setenv("FLWR_HOME", str(home))

    return pretend


def test_a_run_on_a_superlink_ends_as_its_result_says(flower, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    flower(announced(folder, RESULT))
    assert main(["run", "--superlink", "pilot", "strategy.clients=2", "run.folder=/srv/run"]) == 0
    said = capsys.readouterr().out
    assert "Run 7 on pilot" in said and "Exchange 1: 1 client, stage 1" in said
    assert f"on the SuperLink's machine: {folder}" in said


def test_a_run_folder_that_is_here_is_shown(flower, tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "summary.md").write_text("| task | score |\n|---|---|\n| vqa | 0.5 |\n")
    flower(announced(tmp_path, RESULT))
    assert main(["run", "--superlink", "pilot"]) == 0
    assert f"Run folder: {tmp_path}" in capsys.readouterr().out


def test_a_run_with_a_failed_client_is_a_failed_run(flower, tmp_path, capsys):
    flower(announced(tmp_path, RESULT | {"failures": [FAILURE]}))
    assert main(["run", "--superlink", "pilot"]) == 1
    assert "Client c1 failed in exchange 2 (train): out of memory" in capsys.readouterr().err


def submitted(tmp_path):
    """The configuration that the last run was submitted with."""
    return load_config(tomllib.loads((tmp_path / "log.config").read_text())["overrides"])


def test_a_run_whose_folder_is_here_is_resumed_with_its_own_words(flower, tmp_path, capsys):
    folder = tmp_path / "first"
    folder.mkdir()
    flower(announced(folder, RESULT))
    (folder / "overrides.txt").write_text(f"strategy.clients=2 seed=5 run.folder={folder}\n")
    assert main(["run", "--superlink", "pilot", f"resume={folder}", "strategy.rounds=7"]) == 0
    config = submitted(tmp_path)
    assert (config.strategy.clients, config.seed, config.strategy.rounds) == (2, 5, 7)
    assert (config.resume, config.run.folder) == (str(folder), "")
    assert main(["run", "--superlink", "pilot", "resume=/on/the/server", "seed=6"]) == 0
    config = submitted(tmp_path)
    assert (config.strategy.clients, config.seed) == (0, 6)  # as it was said
    assert config.resume == "/on/the/server"
    assert main(["run", "--superlink", "pilot", "resume=first"]) == 2
    assert "`resume` is 'first' but must be an absolute path" in capsys.readouterr().err


def test_a_relative_run_folder_and_an_unknown_connection_are_refused(flower, capsys):
    flower([])
    assert main(["run", "--superlink", "pilot", "run.folder=here"]) == 2
    assert "`run.folder` is 'here' but must be an absolute path" in capsys.readouterr().err
    assert main(["run", "--superlink", "nix"]) == 2
    assert "it has: local, pilot" in capsys.readouterr().err


def test_a_signal_ends_the_command_and_not_the_run(flower, tmp_path):
    flower(["INFO :      | Exchange 1"], status="running", seconds=60)
    out: list[str] = []

    def say(line: str) -> None:
        out.append(line)
        if line == "Exchange 1":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(Detached) as left:
        run_remotely("", "pilot", out=say)
    assert "flwr stop 7 pilot" in left.value.run.resume_hint
    assert "flwr log 7 pilot --stream" in left.value.run.resume_hint


def test_a_superlink_that_refuses_says_why(flower, tmp_path):
    flower([])
    program = flower_cli.flower_program("flwr")
    refusal = '{"success": false, "error-message": "no such federation"}'
    program.write_text(program.read_text().replace('{"success": true, "run-id": "7"}', refusal))
    with pytest.raises(RunError, match="did not accept the run: no such federation"):
        run_remotely("", "pilot", out=print)
