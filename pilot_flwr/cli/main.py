"""The command line tool ``pilot-flwr``.

Each command is a module of `pilot_flwr.commands` whose function `add` adds its parser and sets
`handler`. To add a command, write such a module and name it in `COMMANDS`. A handler takes the
parsed arguments and returns the exit code. Heavy imports stay inside handlers, so that
``pilot-flwr --help`` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from pilot_flwr import __version__
from pilot_flwr.cli import chat, data, evaluate, export, plan, predict, report, run, sweep, table
from pilot_flwr.errors import ConfigError, PilotError

FAILURE, USAGE = 1, 2

COMMANDS = (
    run.add,
    sweep.add,
    table.add,
    plan.add,
    report.add,
    evaluate.add,
    predict.add,
    chat.add,
    export.add,
    data.add,
)
"""In the order in which ``--help`` lists them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pilot-flwr`` and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        In place of the command line's.

    Returns
    -------
    int
        0: success. 1: the run failed. 2: wrong usage or configuration. 128 + n: stopped by
        signal n (Ctrl-C: 130).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not for a stream that a caller has put in place
            stream.reconfigure(errors="replace")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    options.__dict__.setdefault("overrides", []).extend(
        rest
    )  # words behind an option, which argparse does not collect
    try:
        if getattr(options, "hydra", True):
            options.overrides = _expand(options.overrides)
        return int(options.handler(options))
    except ConfigError as error:
        print(f"pilot-flwr: {error}", file=sys.stderr)
        return USAGE
    except PilotError as error:
        print(f"pilot-flwr: {error}", file=sys.stderr)
        return FAILURE
    except BrokenPipeError:  # the reader of the output has gone, as in `pilot-flwr run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:  # a full disk, an output that cannot be written
        print(f"pilot-flwr: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        return 130


def _expand(words: list[str]) -> list[str]:
    if not any(word.startswith("data=") for word in words):
        return words
    from pilot_flwr.config.federation_file import expand

    return expand(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilot-flwr", description="Pilot: federated multimodal instruction tuning on Flower."
    )
    parser.add_argument("--version", action="version", version=f"pilot-flwr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
