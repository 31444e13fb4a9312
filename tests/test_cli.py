"""The command line: exit codes, messages, and what stands where."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flowerlab import nothing_left, write_app

from pilot_flwr import cli, submission
from pilot_flwr import launch as launch_module
from pilot_flwr.config import load_config
from pilot_flwr.errors import RunError
from pilot_flwr.outcome import Outcome
from pilot_flwr.processes import Interrupted


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Take the launcher's place: note the call, write a summary, give back `outcome`."""

    class Stub:
        outcome: Outcome | Exception = Outcome(succeeded=True)
        calls: list = []

        def __call__(self, app, overrides, federation, folder, *, out, verbose):
            self.calls.append((app, overrides, federation, folder, verbose))
            folder.mkdir(parents=True)
            (folder / "summary.md").write_text("| vqa | 0.5 |\n")
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

    stub = Stub()
    stub.calls = []
    monkeypatch.setattr(launch_module, "launch", stub)
    monkeypatch.chdir(tmp_path)
    return stub


def test_success(launched, capsys, tmp_path):
    assert cli.main(["run", "name=trial", "--verbose", "strategy.rounds=1"]) == 0
    ((app, overrides, federation, folder, verbose),) = launched.calls
    assert app == submission.app_folder()
    assert folder.parent == tmp_path / "outputs"
    assert folder.name.startswith("trial-")
    assert overrides == f"name=trial strategy.rounds=1 run.folder={folder}"
    assert federation.startswith("num-supernodes=9 ")
    assert verbose
    out = capsys.readouterr().out
    assert "trial: 9 clients" in out
    assert "| vqa | 0.5 |" in out
    assert out.rstrip().endswith(f"Run folder: {folder}")


def test_the_end_shows_time_line_and_where_the_adapters_are(launched, capsys, tmp_path):
    def leave(app, overrides, federation, folder, *, out, verbose):
        (folder / "checkpoint" / "round-0002").mkdir(parents=True)
        rows = "| exchange | up |\n|---|---|\n| 1 of 2 | Θ_l 2 MB<br>ψ_t [1 kB] |\n"
        (folder / "timeline.md").write_text(f"# What happened\n\nText.\n\n{rows}")
        return Outcome(succeeded=True)

    launch_module.launch = leave  # put back by the fixture
    assert cli.main(["run"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2" in out
    (first,) = [line for line in out.splitlines() if "Θ_l 2 MB" in line]
    assert "ψ_t" not in first  # a line of its own
    assert "ψ_t [1 kB]" in out  # no markup is read into it
    assert "<br>" not in out
    assert f"checkpoint{os.sep}round-0002" in out


def test_a_run_folder_with_blanks_and_quotes_is_carried(launched, tmp_path):
    assert cli.main(["run", "run.folder='it\\'s, mine=1'"]) == 0
    assert launched.calls[0][3] == tmp_path / "it's, mine=1"


def test_a_relative_base_model_is_made_absolute(launched, tmp_path):
    (tmp_path / "my base").mkdir()
    assert cli.main(["run", "model.path='my base'"]) == 0
    config = load_config(launched.calls[0][1])
    assert config.model.path == str(tmp_path / "my base")


def test_a_failed_run_is_exit_code_1(launched, capsys):
    launched.outcome = Outcome(False, ("Client c1 failed.", "Full log: x"))
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err == "\nThe run failed.\nClient c1 failed.\nFull log: x\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RunError("no SuperLink"), 1, "pilot-flwr: no SuperLink"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_other_ends(launched, capsys, monkeypatch, error, code, words):
    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(launch_module, "launch", stop)
    assert cli.main(["run"]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.such.key=1"], "no"),
        (["strategy.rounds=many"], "strategy.rounds"),
        (["strategy.rounds=0"], "strategy.rounds"),
        (["simulation.cpus=1", "simulation.client_cpus=2"], "simulation.client_cpus"),
        (["simulation.gpus=99"], "simulation.gpus"),
        (["data.tasks=[foo]"], "`data.tasks` names 'foo' but source 'digits' has vqa"),
        (["data.tasks=[keys]"], "`data.tasks` names 'keys' but must not"),
        (["just words"], "just words"),
    ],
)
def test_a_bad_configuration_is_exit_code_2(launched, capsys, arguments, words):
    assert cli.main(["run", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert launched.calls == []


def test_a_run_folder_in_use_is_exit_code_2(launched, capsys, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").touch()
    assert cli.main(["run", "run.folder=old"]) == 2
    assert "`run.folder`" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "--no-such-option"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom pilot_flwr.cli import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'hydra', 'torch', 'flwr', 'psutil', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "experiment=demo" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


REAL = """
import sys
from pathlib import Path
from pilot_flwr import cli, submission
submission.app_folder = lambda: Path({app!r})
sys.exit(cli.main(["run", "run.folder=run", "simulation.cpus=2", "data.clients_per_task=1"]))
"""


def start(app: Path, where: Path) -> subprocess.Popen:
    code = REAL.format(app=str(app))
    return subprocess.Popen([sys.executable, "-c", code], cwd=where)


def wait_for_exchange(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_stopped_command_leaves_nothing(tmp_path: Path, monkeypatch, number, code):
    app = write_app(tmp_path / "app", "slow")
    with nothing_left(monkeypatch, patience=20):
        command = start(app, tmp_path)
        wait_for_exchange(tmp_path / "run")
        os.kill(command.pid, number)
        assert command.wait(timeout=30) == code


@pytest.mark.slow
def test_two_commands_at_a_time_do_not_meet(tmp_path: Path, monkeypatch):
    with nothing_left(monkeypatch):
        commands = []
        for name in ("one", "two"):
            app = write_app(tmp_path / name / "app", "works")
            commands.append(start(app, tmp_path / name))
        assert [command.wait(timeout=200) for command in commands] == [0, 0]
    for name in ("one", "two"):
        result = json.loads((tmp_path / name / "run" / "result.json").read_text())
        assert result["status"] == "completed"


def test_an_error_of_the_system_is_one_line(launched, capsys):
    launched.outcome = OSError(28, "No space left on device", "/data/runs")
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err == (
        "pilot-flwr: [Errno 28] No space left on device: '/data/runs'\n"
    )


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["run.folder='~nobody-of-this-name/x'"], "run.folder"),
        (
            [
                "data.source=llava",
                "data.tasks=[a]",
                "data.folder=/tmp",
                "+data.files={a:{train:['~nobody-of-this-name/x'],test:[b]}}",
            ],
            "data.files.a.train",
        ),
    ],
)
def test_the_home_of_nobody_is_named(capsys, words, key):
    assert cli.main(["run", *words]) == 2
    assert f"`{key}` begins with '~' and the name of no user" in capsys.readouterr().err
