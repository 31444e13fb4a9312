"""The command line as a whole: usage, errors, overrides, and what it imports."""

import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pilot_flwr import __version__
from pilot_flwr.cli import common
from pilot_flwr.cli.data import SeveralValues
from pilot_flwr.cli.main import click_command, main
from pilot_flwr.config import loading
from pilot_flwr.errors import ConfigError, DataError, RunError

HEAVY = {"torch", "transformers", "flwr", "hydra", "omegaconf", "numpy", "psutil", "yaml"}


def commands(group=None, path=()):
    """Yield every command with its words."""
    for name, command in (group or click_command()).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def test_the_commands_and_their_order():
    top = ["run", "sweep", "table", "plan", "report", "evaluate", "predict", "chat", "export"]
    inner = ["data convert", "data check", "site serve", "site check", "site status"]
    assert [" ".join(words) for words in COMMANDS] == [*top, *inner]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_parameter_has_help(words, capsys):
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    command = COMMANDS[words]
    assert command.help.split("\n")[0] in " ".join(shown.split())
    for parameter in command.params:
        described = parameter.help or " ".join(getattr(parameter.type, "choices", ()))
        assert described, parameter.name
        assert isinstance(parameter, click.Argument) or parameter.opts[0] in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["data"], "command"),
        (["run", "--no-such-option"], "--no-such-option"),
        (["predict", "run"], "--data"),
        (["chat"], "RUN"),
        (["table", "x", "--format", "html"], "html"),
        (["plan", "--text-tokens", "many"], "many"),
        (["report", "run", "and more"], "and more"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, named, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("Usage: pilot-flwr")
    assert named.lower() in captured.err.splitlines()[-1].lower()


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pilot-flwr {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("`seed` is -1"), 2),
        (DataError("row 3"), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 1),  # the input ended at a prompt
    ],
)
def test_an_error_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code):
    def fail(overrides):
        raise error

    monkeypatch.setattr(loading, "load_config", fail)
    assert main(["plan"]) == code
    said = f"pilot-flwr: {error}\n" if str(error) else ""
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("word", ["+a=b", "~seed", "seed=1", "data.tasks=[a]", "++seed=2"])
def test_overrides_reach_the_configuration_wherever_they_stand(monkeypatch, word):
    seen = []

    def load(overrides):
        seen.append(overrides)
        raise ConfigError("stop")

    monkeypatch.setattr(loading, "load_config", load)
    assert main(["plan", word, "--micro-batch", "3", "name=x", "--json", "x=1"]) == 2
    assert seen == [shlex.join([word, "name=x", "x=1"])]


def test_a_repeatable_option_takes_several_values():
    option = click.Option(["--file", "-f"], multiple=True)
    other = click.Option(["--out"])
    command = SeveralValues("x", params=[option, other, click.Argument(["name"])], callback=print)
    words = ["name", "--file", "a", "b", "--out", "c", "-f", "d"]
    context = command.make_context("x", words)
    assert context.params == {"name": "name", "file": ("a", "b", "d"), "out": "c"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((None, None, None), "`--client` or `--task`"),
        (("a", "b", None), "`--client` or `--task`"),
        ((None, "b", "folder"), "`--state` needs `--client`"),
    ],
)
def test_exactly_one_model_must_be_named(options, named):
    with pytest.raises(ConfigError, match=named):
        common.open_model(Path("run"), None, None, *options)
    for accepted in (("a", None, "folder"), (None, "b", None)):
        with pytest.raises(RunError, match="run is not a run folder"):
            common.open_model(Path("run"), None, None, *accepted)


def run_python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom pilot_flwr.cli.main import main\n"
        "assert main(['--help']) == main(['run', '--help']) == 0\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = run_python(code, check=True)
    assert "experiment=demo" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_gone_is_no_traceback():
    """As in `pilot-flwr data check | head`: exit code 1, and silence."""
    code = (
        "import os, sys\nfrom pilot_flwr.cli import main\n"
        "reader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 1)\n"
        "from pilot_flwr.config import loading\n"
        "sys.modules['pilot_flwr.model.resource_plan'] = type(sys)('plan')\n"
        "sys.modules['pilot_flwr.model.resource_plan'].make_plan = None\n"
        "loading.load_config = lambda words: [print('x' * 9999, flush=True) for _ in range(99)]\n"
        "sys.exit(main.main(['plan']))"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (1, "")
