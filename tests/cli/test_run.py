"""``pilot-flwr run``: exit codes, messages, restarts, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flowerlab import nothing_left, write_app
from sample_events import AGGREGATED, CLOSED, sent, trained

from pilot_flwr.cli import main as cli
from pilot_flwr.config.loading import load_config, to_yaml
from pilot_flwr.errors import RunError
from pilot_flwr.launch import simulation as launch_module
from pilot_flwr.launch.processes import Interrupted
from pilot_flwr.launch.simulation import LAUNCH_LOCK
from pilot_flwr.run.atomic import hold
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.outcome import Outcome
from pilot_flwr.run.tables import timeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tmp_path(base):
    """One folder for all tests, emptied: equal overrides are composed once."""
    for entry in base.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return base


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Replace the launcher: record the call, write a summary, return `outcome`."""

    class Stub:
        outcome: Outcome | Exception = Outcome(succeeded=True)
        calls: list = []

        def __call__(self, overrides, folder, *, federation, out, verbose, **more):
            self.calls.append((overrides, federation, folder, verbose))
            self.more.append(more)
            (folder / "config.yaml").write_text(to_yaml(load_config(overrides)))
            (folder / "summary.md").write_text("| vqa | 0.5 |\n")
            outcome = self.outcomes.pop(0) if self.outcomes else self.outcome
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    stub = Stub()
    stub.calls, stub.more, stub.outcomes = [], [], []
    monkeypatch.setattr(launch_module, "launch", stub)
    monkeypatch.chdir(tmp_path)
    return stub


def test_success(launched, capsys, tmp_path):
    assert cli.main(["run", "name=trial", "--verbose", "strategy.rounds=1"]) == 0
    ((overrides, federation, folder, verbose),) = launched.calls
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
    def leave(overrides, folder, **_):
        (folder / "checkpoint" / "round-0002").mkdir(parents=True)
        run = RunFolder(folder)
        run.record(sent(down={"lora": 2_000_000, "task_adapters": 1000}))
        run.record(trained())
        run.record(replace(AGGREGATED, tasks={"[b]": ("vqa-1",), "c": ("c-0",)}))
        run.record(replace(CLOSED, exchanges=2))
        run.write("config.yaml", to_yaml(load_config(overrides)))
        run.write("timeline.md", timeline(run.events))
        return Outcome(succeeded=True)

    launch_module.launch = leave  # put back by the fixture
    assert cli.main(["run", "run.folder=run", "run.report=false"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2" in out
    (first,) = [line for line in out.splitlines() if "Θ_l 2.0 MB" in line]
    assert "ψ_t 1.0 kB" not in first and "ψ_t 1.0 kB" in out  # a separate line
    assert "[b] of 1" in out  # no markup is read into it
    assert "<br>" not in out
    assert f"checkpoint{os.sep}round-0002" in out


def test_a_damaged_event_log_does_not_hide_the_rest(launched, capsys):
    def leave(overrides, folder, **_):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "timeline.md").write_text("| exchange |")
        (folder / "metrics.jsonl").write_text("{not an event\n")
        RunFolder(folder).write("config.yaml", to_yaml(load_config(overrides)))
        return Outcome(succeeded=True)

    launch_module.launch = leave  # put back by the fixture
    assert cli.main(["run", "run.folder=run", "run.report=false"]) == 0
    out = capsys.readouterr().out
    assert "line 1, is not an event of a run" in out
    assert "Run folder: " in out


def test_a_run_folder_with_blanks_and_quotes_is_carried(launched, tmp_path):
    assert cli.main(["run", "run.folder='it\\'s, mine=1'"]) == 0
    assert launched.calls[0][2] == tmp_path / "it's, mine=1"


def test_a_relative_base_model_is_made_absolute(launched, tmp_path):
    (tmp_path / "my base").mkdir()
    assert cli.main(["run", "model.path='my base'"]) == 0
    config = load_config(launched.calls[0][0])
    assert config.model.path == str(tmp_path / "my base")


def test_a_failed_run_is_exit_code_1(launched, capsys):
    launched.outcome = Outcome(False, ("Client c1 failed.", "Full log: x"))
    assert cli.main(["run", "run.folder=run"]) == 1
    folder = launched.calls[0][2]
    assert capsys.readouterr().err == (
        "\nThe run failed.\nClient c1 failed.\nFull log: x\n"
        f"To resume: pilot-flwr run resume={folder}\n"
    )


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
    assert cli.main(["run", "run.folder=run"]) == code
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


REAL = """
import sys
from pathlib import Path
from pilot_flwr.cli import main as cli
from pilot_flwr.launch import simulation
simulation.app_folder = lambda scratch: Path({app!r})
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
    assert cli.main(["run", "run.folder=run"]) == 1
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


DIED = Outcome(False, ("Ray says: it died.", "Full log: x"), restartable=True)


def test_a_run_whose_worker_died_goes_on_by_itself(launched, capsys, tmp_path):
    launched.outcomes = [DIED, DIED, Outcome(succeeded=True)]
    assert cli.main(["run", "run.folder=run", "seed=4"]) == 0
    overrides = [call[0] for call in launched.calls]
    assert [load_config(words).resume for words in overrides] == [
        "", str(tmp_path / "run"), str(tmp_path / "run")
    ]  # fmt: skip
    assert {load_config(words).seed for words in overrides} == {4}
    assert [more["resumed"] for more in launched.more] == [False, True, True]
    out = capsys.readouterr().out
    assert "Restart 1 of at most 3" in out and "Restart 2 of at most 3" in out
    assert "Ray says: it died." in out


@pytest.mark.parametrize(
    ("options", "outcome", "calls"),
    [
        (["run.restarts=1"], DIED, 2),
        (["run.restarts=0"], DIED, 1),
        ([], Outcome(False, ("too few replies",)), 1),
    ],
)
def test_restarts_are_bounded_and_only_for_processes(launched, tmp_path, options, outcome, calls):
    launched.outcome = outcome
    assert cli.main(["run", "run.folder=run", *options]) == 1
    assert len(launched.calls) == calls


def test_every_attempt_keeps_its_logs_and_its_result(launched, tmp_path):
    def attempt(overrides, folder, **_):
        (folder / "logs").mkdir(exist_ok=True)
        name = f"{len(launched.calls)}"
        launched.calls.append(name)
        (folder / "logs" / "flower.log").write_text(name)
        assert not (folder / "result.json").exists()
        (folder / "result.json").write_text(f'"{name}"')
        return DIED

    launch_module.launch = attempt  # put back by the fixture
    assert cli.main(["run", "run.folder=run", "run.restarts=2"]) == 1
    logs = tmp_path / "run" / "logs"
    assert [(logs / f"attempt-{n}" / "flower.log").read_text() for n in (1, 2)] == ["0", "1"]
    assert [(logs / f"attempt-{n}" / "result.json").read_text() for n in (1, 2)] == ['"0"', '"1"']
    assert (logs / "flower.log").read_text() == "2"


@pytest.fixture
def stopped(launched, tmp_path):
    """A run folder of a run that was stopped, and how it was started."""
    launched.outcome = Outcome(False, ("stopped",))
    assert cli.main(["run", "run.folder=old", "seed=5", "data.tasks=[vqa]"]) == 1
    launched.outcome = Outcome(succeeded=True)
    launched.calls.clear()
    return tmp_path / "old"


def test_resume_alone_fills_in_the_runs_own_words(launched, stopped, capsys):
    assert cli.main(["run", "resume=old"]) == 0
    ((overrides, _, folder, _),) = launched.calls
    config = load_config(overrides)
    assert (config.seed, config.data.tasks, config.resume) == (5, ["vqa"], str(stopped))
    assert folder == stopped and config.run.folder == str(stopped)
    assert launched.more[-1]["resumed"]
    assert "3 clients, resuming in run folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["run.folder=old", "seed=5", "data.tasks=[vqa]"], {}),
        (["seed=5"], {}),
        (["strategy.rounds=9", "strategy.min_replies=2"], {"rounds": 9, "min_replies": 2}),
    ],
)
def test_resume_with_words_that_fit(launched, stopped, words, more):
    assert cli.main(["run", *words, "resume=old"]) == 0
    config = load_config(launched.calls[0][0])
    assert (config.seed, config.data.tasks) == (5, ["vqa"])
    assert {key: getattr(config.strategy, key) for key in more} == more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=6", "resume=old"], "`seed` is 6 but was 5 in the run"),
        (["strategy.rounds=2", "resume=old"], "`strategy.rounds` is 2 but must not be below 3"),
        (["run.folder=new", "resume=old"], "`run.folder` is 'new' but the resumed run is in"),
        (["resume=nowhere"], "which is not the folder of a run to"),
        (["resume='~nobody-at-all/run'"], "`resume` begins with '~'"),
    ],
)
def test_resume_with_words_that_do_not_fit_is_exit_code_2(
    launched, stopped, capsys, words, message
):
    assert cli.main(["run", *words]) == 2
    assert message in capsys.readouterr().err
    assert launched.calls == []


@pytest.mark.parametrize(("failures", "code"), [([], 0), ([{"client": "c", "reason": "no"}], 1)])
def test_a_completed_run_shows_its_results_and_keeps_its_exit_code(
    launched, stopped, capsys, failures, code
):
    result = {"status": "completed", "error": None, "failures": failures}
    (stopped / "result.json").write_text(json.dumps(result))
    assert cli.main(["run", "resume=old"]) == code
    out = capsys.readouterr().out
    assert "is already complete" in out and "| vqa | 0.5 |" in out
    assert launched.calls == []
    assert cli.main(["run", "resume=old", "strategy.rounds=4"]) == 0  # this is something to do
    assert len(launched.calls) == 1


def test_a_run_at_its_end_has_nothing_to_go_on_with(launched, capsys):
    def end(overrides, folder, **_):
        result = {"status": "completed", "error": None, "failures": [{"client": "c"}]}
        (folder / "config.yaml").write_text(to_yaml(load_config(overrides)))
        (folder / "result.json").write_text(json.dumps(result))
        return Outcome(False, ("Client c failed.",))

    launch_module.launch = end  # put back by the fixture
    assert cli.main(["run", "run.folder=run"]) == 1
    error = capsys.readouterr().err
    assert "Client c failed." in error and "To resume" not in error


def test_two_commands_in_one_run_folder_are_refused(launched, stopped, capsys):
    with hold(stopped / LAUNCH_LOCK, "it"):
        assert cli.main(["run", "resume=old"]) == 1
    assert "is in use by another process" in capsys.readouterr().err
    assert launched.calls == []
