"""``pilot-flwr run``: a federation under Flower's simulation engine."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

SUCCESS, FAILURE = 0, 1
REPORT_SECONDS = 1800.0
SMALL_BASE_BYTES = 2 * 10**9


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    run = commands.add_parser(
        "run",
        help="run a federation under Flower's simulation engine, to its end",
        description="Run a federation under Flower's simulation engine, to its end; with "
        "simulation.engine=in-process in this process, without Flower's and Ray's start. "
        "Exit code: 0 success, 1 the run failed, 2 wrong usage or configuration, "
        "130 or 143 stopped by Ctrl-C or SIGTERM. No process is left behind.",
        epilog="example: pilot-flwr run experiment=demo strategy.rounds=1 train.epochs=1",
    )
    run.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="Hydra override of the configuration"
    )
    run.add_argument("--verbose", action="store_true", help="show Flower's own log as well")
    run.add_argument(
        "--superlink",
        metavar="NAME",
        help="no simulation: real sites, by the SuperLink of this name in Flower's config.toml",
    )
    run.set_defaults(handler=_run)


def _run(options: argparse.Namespace) -> int:
    if options.superlink is not None:
        from pilot_flwr.cli import superlink

        return superlink.run(options, _show_results)
    from datetime import datetime

    from pilot_flwr.launch.prepare import prepare
    from pilot_flwr.launch.processes import Interrupted
    from pilot_flwr.launch.simulation import run_prepared
    from pilot_flwr.server.resume import completed

    prepared = prepare(options.overrides, os.environ, datetime.now())
    folder = prepared.folder
    if prepared.done:
        return _say_completed(folder)
    try:
        outcome = run_prepared(prepared, out=_say, verbose=options.verbose)
    except Interrupted as stop:
        print(f"\npilot-flwr: {stop}; run folder {folder}", file=sys.stderr)
        print(f"To resume: {prepared.resume_command}", file=sys.stderr)
        return 128 + stop.signum
    _show_results(folder)
    if prepared.config.run.report and (folder / "metrics.jsonl").is_file():
        write_report(folder, *([] if _is_small(prepared.config.model.path) else ["--no-router"]))
    if not outcome.succeeded:
        print("\nThe run failed.", *outcome.explanation, sep="\n", file=sys.stderr)
        if (folder / "config.yaml").is_file() and completed(folder, prepared.config) is None:
            print(f"To resume: {prepared.resume_command}", file=sys.stderr)
    return SUCCESS if outcome.succeeded else FAILURE


def _say_completed(folder: Path) -> int:
    """Show a run that is at its end already, and return what its own result says."""
    from pilot_flwr.run.outcome import COMPLETED, RunStatus, evaluate_outcome

    _say(f"The run in {folder} is complete: there is nothing left to do.")
    _say("To train on, resume it with a larger `strategy.rounds`.")
    _show_results(folder)
    outcome = evaluate_outcome(RunStatus(COMPLETED), folder)
    if not outcome.succeeded:
        print("\nThe run had failures.", *outcome.explanation, sep="\n", file=sys.stderr)
    return SUCCESS if outcome.succeeded else FAILURE


def _show_results(folder: Path) -> None:
    """Print the time line and the scores, and say where the adapters are."""
    timeline, summary = folder / "timeline.md", folder / "summary.md"
    if timeline.is_file():
        _say("\nWhat happened")
        _show_table(timeline.read_text(encoding="utf-8"))
    if summary.is_file():
        _say("\n" + summary.read_text(encoding="utf-8").strip())
    from pilot_flwr.run.checkpoint import checkpoint_folders

    checkpoints = checkpoint_folders(folder / "checkpoint")
    if checkpoints:
        _say(f"\nAdapters: {checkpoints[-1]}")
    _say(f"\nRun folder: {folder}")


def write_report(folder: Path, *options: str) -> None:
    """Write the report in a process of its own: whatever happens there, the run is what it is.

    Parameters
    ----------
    folder : Path
        Of a run or a sweep.
    *options : str
        Of ``pilot-flwr report``.
    """
    command = [sys.executable, "-P", "-m", "pilot_flwr.cli.main", "report", str(folder), *options]
    try:
        done = subprocess.run(  # nosec B603  # no shell; this package in this Python
            command, capture_output=True, text=True, timeout=REPORT_SECONDS, errors="replace"
        )
        complaint = "" if done.returncode == 0 else done.stderr or f"exit code {done.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        complaint = str(error)
    if complaint:
        print(f"The report could not be written: {complaint.strip()}", file=sys.stderr)
        print(f"To try again: pilot-flwr report {shlex.quote(str(folder))}", file=sys.stderr)
    else:
        _say(done.stdout.strip())


def _is_small(base: str) -> bool:
    """Return whether a base model is loaded in seconds, so that nobody has to ask for it."""
    from pilot_flwr.model.checkpoints import checkpoint_path

    files = list(Path(checkpoint_path(base)).expanduser().glob("*.safetensors"))
    return bool(files) and sum(file.stat().st_size for file in files) <= SMALL_BASE_BYTES


def _show_table(markdown: str) -> None:
    """Print a Markdown table whose cells have several lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = Table(*rows[0], show_lines=True) if rows else Table()
    for row in rows[2:]:  # the second line is the rule under the header
        table.add_row(*(Text(cell.replace("<br>", "\n")) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)


def _say(line: str) -> None:
    print(line, flush=True)
