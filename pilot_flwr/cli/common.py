"""Shared by the commands: argument types, opening a run, selecting a model, writing output."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:  # heavy imports stay inside commands
    from rich.table import Table

    from pilot_flwr.inference.runs import Run, Selected
    from pilot_flwr.model.pilot_model import PilotModel

SUCCESS, FAILURE, USAGE = 0, 1, 2
PIPE_WIDTH = 150
"""Width in characters of a table printed to a pipe."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDE]...",
        help="Hydra overrides of the configuration, KEY=VALUE.",
        show_default=False,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDE]...",
        help="Settings that differ from the run's, KEY=VALUE, for instance "
        "model.path=/models/llava or evaluation.batch_size=8.",
        show_default=False,
    ),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder of `pilot-flwr run`.", show_default=False)
]
Exchange = Annotated[
    int | None,
    typer.Option(
        "--round",
        metavar="N",
        help="Use the checkpoint of exchange N (default: the last complete one).",
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; auto uses a GPU if available.")
]
ClientName = Annotated[
    str | None, typer.Option(metavar="C", help="The personalised model of client C.")
]
TaskName = Annotated[
    str | None,
    typer.Option(
        metavar="T", help="The consensus model of task T, for a site that was not in the run."
    ),
]
StateFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the client's private state (default: clients/C in the run folder).",
    ),
]
Images = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the images that the file names.")
]
Plain = Annotated[
    bool,
    typer.Option("--plain", help="Do not append the prompt suffix of the task's questions."),
]
Baseline = Annotated[
    str | None,
    typer.Option(metavar="METHOD", help="Compare a sweep's methods with this one, paired by seed."),
]


def open_run(folder: Path, server_round: int | None, overrides: Sequence[str] | None) -> "Run":
    """Open a run folder and print its notes."""
    from pilot_flwr.inference import runs

    hide_progress_bars()
    run = runs.open_run(folder, server_round=server_round, overrides=overrides or ())
    for note in run.notes:
        say(note)
    return run


def hide_progress_bars() -> None:
    """Turn off transformers' progress bars unless stderr is a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def open_model(
    folder: Path,
    server_round: int | None,
    overrides: Sequence[str] | None,
    client: str | None,
    task: str | None,
    state: Path | None,
) -> "tuple[Run, Selected]":
    """Open a run and select the model of ``--client`` or ``--task``; exactly one must be given."""
    if (client is None) == (task is None):
        raise ConfigError("Give either `--client` or `--task` to select a model.")
    if task is not None and state is not None:
        raise ConfigError("`--state` needs `--client`: a consensus model has no private state.")
    run = open_run(folder, server_round, overrides)
    if client is not None:
        return run, select_client(run, client, state)
    from pilot_flwr.inference.runs import select_consensus

    assert task is not None
    return run, select_consensus(run, task)


def select_client(run: "Run", client: str, state: Path | None) -> "Selected":
    """Select a client's personalised model; print a note if the client has not trained."""
    from pilot_flwr.inference import runs

    selected = runs.select_client(run, client, state=state)
    if selected.private is None:
        say(
            f"{selected.name} has not trained: using the consensus model of its task, "
            f"{selected.task}."
        )
    return selected


def load_model(run: "Run", selected: "Selected", device: str) -> "PilotModel":
    """Load a selected model on the device of ``--device``."""
    from pilot_flwr.client.node import find_device
    from pilot_flwr.inference import runs

    return runs.load_model(run, selected, device=find_device(device))


@contextlib.contextmanager
def new_file(option: str, path: Path) -> Iterator[TextIO]:
    """Open a new file for a command's output; `option` names it in errors.

    It is written as ``PATH.part`` and renamed when complete. If the command stops early, the
    partial output keeps that name. An existing file raises `ConfigError`.
    """
    part = path.with_name(f"{path.name}.part")
    for existing in (path, part):
        if os.path.lexists(existing):
            raise ConfigError(
                f"`{option}` is {str(path)!r}, but {existing} exists already and is not "
                "overwritten; choose another name or move it away."
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
                say(f"The output so far is in {part}.")
            else:
                part.unlink()


def print_table(table: "Table") -> None:
    """Print a rich table, at a fixed width in a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def show(line: str) -> None:
    """Print a line to stdout, unbuffered."""
    print(line, flush=True)


def say(line: str) -> None:
    """Print a message to stderr, apart from the command's output."""
    print(line, file=sys.stderr, flush=True)
