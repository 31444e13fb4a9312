"""Entry point of the command line tool ``pilot-flwr``.

A command is a function that returns the exit code; its docstring is its help text. Register new
commands below. Heavy imports stay inside commands, so that ``pilot-flwr --help`` is fast.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

import click
import typer
from typer.models import ArgumentInfo

from pilot_flwr import __version__
from pilot_flwr.cli import data, models, plan, run, site, sweep
from pilot_flwr.cli.common import FAILURE, SUCCESS, USAGE
from pilot_flwr.errors import ConfigError, PilotError

_OPTIONS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

app = typer.Typer(**_OPTIONS)
_COMMANDS: tuple[Callable[..., int], ...] = (
    run.run,
    sweep.sweep,
    sweep.table,
    plan.plan,
    sweep.report,
    models.evaluate,
    models.predict,
    models.chat,
    models.export,
)
for command in _COMMANDS:  # in the order of --help
    app.command()(command)
data_app = typer.Typer(name="data", help="Convert and check data.", **_OPTIONS)
data_app.command(cls=data.SeveralValues)(data.convert)
data_app.command()(data.check)
app.add_typer(data_app)
site_app = typer.Typer(name="site", help="Run and inspect a real site.", **_OPTIONS)
site_app.command()(site.serve)
site_app.command()(site.check)
site_app.command()(site.status)
app.add_typer(site_app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pilot-flwr {__version__}")
        raise typer.Exit


@app.callback()
def pilot_flwr(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Pilot: federated multimodal instruction tuning on Flower."""


def click_command() -> click.Command:
    """Return the command line as a click command, for instance to generate its reference."""
    return _with_argument_help(typer.main.get_command(app))


def _with_argument_help(command: click.Command) -> click.Command:
    """Restore the help of arguments, which typer 0.20 loses with click 8.4 and later."""
    for inner in getattr(command, "commands", {}).values():
        _with_argument_help(inner)
    function = getattr(command.callback, "__wrapped__", command.callback)
    hints = get_type_hints(function, include_extras=True) if function else {}
    for parameter in command.params:
        for info in getattr(hints.get(parameter.name or ""), "__metadata__", ()):
            if isinstance(info, ArgumentInfo):
                parameter.help = info.help
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pilot-flwr`` with `arguments`, by default the command line's; return its exit code.

    0: success. 1: the run failed. 2: wrong usage or configuration. 128 + n: stopped by signal n
    (Ctrl-C: 130).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # missing on a stream that a caller has replaced
            stream.reconfigure(errors="replace")
    try:
        code = click_command().main(arguments, prog_name="pilot-flwr", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # the input ended at a prompt
        return FAILURE
    except (PilotError, OSError) as error:  # OSError: full disk, missing permission
        print(f"pilot-flwr: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILURE
    return int(code or SUCCESS)


if __name__ == "__main__":
    sys.exit(main())
