"""``pilot-flwr run``: run a federation in simulation, or on real sites behind a SuperLink."""

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilot_flwr.cli.common import FAILURE, SUCCESS, Overrides, print_table, say, show

if TYPE_CHECKING:
    from pilot_flwr.run.outcome import Outcome

REPORT_SECONDS = 1800.0
SMALL_BASE_BYTES = 2 * 10**9


def run(
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also show Flower's log.")] = False,
    superlink: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run on real sites through this SuperLink connection in Flower's config.toml.",
        ),
    ] = None,
) -> int:
    """Run a federation to completion.

    Uses Flower's simulation engine, or with simulation.engine=in-process only this process, which
    avoids starting Flower and Ray.

    Exit code: 0 success, 1 the run failed, 2 wrong usage or configuration, 130 or 143 stopped by
    Ctrl-C or SIGTERM. No process is left running.

    Example: `pilot-flwr run experiment=demo strategy.rounds=1 train.epochs=1`
    """
    from pilot_flwr.config.overrides import expand

    expanded = expand(overrides or ())
    if superlink is not None:
        return _run_on_superlink(expanded, superlink, verbose=verbose)
    from pilot_flwr.launch.prepare import prepare
    from pilot_flwr.launch.processes import Interrupted
    from pilot_flwr.launch.simulation import run_prepared
    from pilot_flwr.server.resume import completed

    prepared = prepare(expanded, os.environ, datetime.now())
    folder = prepared.folder
    if prepared.done:
        return _show_completed(folder)
    try:
        outcome = run_prepared(prepared, out=show, verbose=verbose)
    except Interrupted as stop:
        say(f"\npilot-flwr: {stop}; run folder {folder}")
        say(f"To resume: {prepared.resume_command}")
        return 128 + stop.signum
    _show_results(folder)
    if prepared.config.run.report and (folder / "metrics.jsonl").is_file():
        write_report(folder, *([] if _is_small(prepared.config.model.path) else ["--no-router"]))
    code = _exit_code(outcome, "The run failed.")
    if code and (folder / "config.yaml").is_file() and completed(folder, prepared.config) is None:
        say(f"To resume: {prepared.resume_command}")
    return code


def _run_on_superlink(requested: list[str], superlink: str, *, verbose: bool) -> int:
    """Submit the run to the SuperLink `superlink` and follow it to completion."""
    from pilot_flwr.launch.prepare import prepare_submission
    from pilot_flwr.launch.superlink import Detached, find_connection, run_remotely

    address = find_connection(superlink, os.environ)
    config, overrides = prepare_submission(requested)
    show(f"{config.name}: {config.num_clients} clients, SuperLink {superlink} at {address}")
    try:
        outcome, result = run_remotely(overrides, superlink, out=show, verbose=verbose)
    except Detached as left:
        say(f"\npilot-flwr: {left}. {left.run.resume_hint}")
        return 128 + left.signum
    if result is not None:
        folder = Path(result.folder)
        if _is_here(folder, result.seconds):
            _show_results(folder)
        else:
            show(f"\nRun folder, on the SuperLink's machine: {folder}")
    return _exit_code(outcome, "The run failed.")


def _is_here(folder: Path, seconds: float) -> bool:
    """Return whether `folder` on this machine has the result of a run that took `seconds`."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return bool(result["seconds"] == seconds)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _show_completed(folder: Path) -> int:
    """Show the results of a completed run, and return its exit code."""
    from pilot_flwr.run.outcome import COMPLETED, RunStatus, evaluate_outcome

    show(f"The run in {folder} is already complete.")
    show("To continue training, resume it with a larger `strategy.rounds`.")
    _show_results(folder)
    return _exit_code(evaluate_outcome(RunStatus(COMPLETED), folder), "The run had failures.")


def _exit_code(outcome: "Outcome", headline: str) -> int:
    """Print the explanation of a failure, and return the exit code."""
    if outcome.succeeded:
        return SUCCESS
    say("\n".join([f"\n{headline}", *outcome.explanation]))
    return FAILURE


def _show_results(folder: Path) -> None:
    """Print the timeline, the scores and the path of the adapters."""
    from pilot_flwr.run.checkpoint import checkpoint_folders

    summary = folder / "summary.md"
    if (folder / "timeline.md").is_file():
        show("\nWhat happened")
        _show_timeline(folder)
    if summary.is_file():
        show("\n" + summary.read_text(encoding="utf-8").strip())
    if checkpoints := checkpoint_folders(folder / "checkpoint"):
        show(f"\nAdapters: {checkpoints[-1]}")
    show(f"\nRun folder: {folder}")


def _show_timeline(folder: Path) -> None:
    """Print the timeline of a run folder."""
    from rich.table import Table
    from rich.text import Text

    from pilot_flwr.errors import PilotError
    from pilot_flwr.run.events import AggregationMethod
    from pilot_flwr.run.history import read_run
    from pilot_flwr.run.tables import timeline_rows

    try:
        run = read_run(folder)
    except PilotError as error:
        show(f"It cannot be shown: {error}")
        return
    header, *rows = timeline_rows(run.events, AggregationMethod.of(run.config.strategy))
    table = Table(*header, show_lines=True)
    for row in rows:
        table.add_row(*map(Text, row))
    print_table(table)


def write_report(folder: Path, *options: str) -> None:
    """Write the report of a run or sweep in a subprocess; a failure is printed, not raised.

    `options` are those of ``pilot-flwr report``.
    """
    command = [sys.executable, "-P", "-m", "pilot_flwr.cli.main", "report", str(folder), *options]
    try:
        done = subprocess.run(  # nosec B603  # no shell; this package in this Python
            command, capture_output=True, text=True, timeout=REPORT_SECONDS, errors="replace"
        )
        problem = "" if done.returncode == 0 else done.stderr or f"exit code {done.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem:
        say(f"The report could not be written: {problem.strip()}")
        say(f"To retry: pilot-flwr report {shlex.quote(str(folder))}")
    else:
        show(done.stdout.strip())


def _is_small(base: str) -> bool:
    """Return whether a base model loads in seconds."""
    from pilot_flwr.model.checkpoints import checkpoint_path

    files = list(Path(checkpoint_path(base)).expanduser().glob("*.safetensors"))
    return bool(files) and sum(file.stat().st_size for file in files) <= SMALL_BASE_BYTES
