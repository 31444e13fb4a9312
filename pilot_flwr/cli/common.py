"""What the commands that use a run have in common: arguments, opening, choosing, writing."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:  # heavy imports stay inside handlers
    from pilot_flwr.inference.runs import Run, Selected


OVERRIDES = (
    "Settings that are different now follow as KEY=VALUE, for instance "
    "model.path=/models/llava or evaluation.batch_size=8."
)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the run folder, and how it is opened."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder of `pilot-flwr run`")
    parser.add_argument(
        "--round",
        type=int,
        metavar="N",
        help="use the checkpoint of exchange N (default: the last whole one)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if any)"
    )
    parser.set_defaults(overrides=[], hydra=False)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add which model of the run is meant."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--client", metavar="C", help="the personalised model of client C")
    which.add_argument(
        "--task", metavar="T", help="the consensus model of task T, for a site that was not there"
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="folder of the client's private state (default: clients/C in the run folder)",
    )


def open_chosen(options: argparse.Namespace) -> "Run":
    """Open the run folder, and tell the user what is to be told about it."""
    from transformers.utils import logging

    from pilot_flwr.inference.runs import open_run

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    run = open_run(options.run, server_round=options.round, overrides=options.overrides)
    for note in run.notes:
        say(note)
    return run


def chosen(run: "Run", options: argparse.Namespace) -> "Selected":
    """Return whose model is meant by ``--client``, ``--task`` and ``--state``."""
    from pilot_flwr.inference.runs import select_client, select_consensus

    if options.task is not None:
        if options.state is not None:
            raise ConfigError("`--state` belongs to `--client`: a consensus model has none.")
        return select_consensus(run, options.task)
    who = select_client(run, options.client, state=options.state)
    if who.private is None:
        say(f"{who.name} has not trained: this is the consensus model of its task, {who.task}.")
    return who


@contextlib.contextmanager
def new_file(option: str, path: Path) -> Iterator[TextIO]:
    """Open a file for a command's output; a file that is there already is left alone.

    It is written as ``PATH.part``, which gets its name when all of it is there. If the command
    stops before that, what has been written stays under the first name.

    Parameters
    ----------
    option : str
        As the user typed it, for errors.
    path : Path
        The file.

    Raises
    ------
    ConfigError
        The file is there already, or cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    for taken in (path, part):
        if os.path.lexists(taken):
            raise ConfigError(
                f"`{option}` is {str(path)!r}, but {taken} is there already and is not written "
                "over; choose another name or move it away."
            )
    try:
        file = part.open("x", encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"`{option}` is {str(path)!r}, which cannot be written: {reason}."
        ) from None
    try:
        with file:
            yield file
        part.rename(path)
    finally:
        if part.exists():
            if part.stat().st_size:
                say(f"What was written before the command stopped is in {part}.")
            else:
                part.unlink()


def say(line: str) -> None:
    """Tell the user something, apart from the command's output."""
    print(line, file=sys.stderr, flush=True)
