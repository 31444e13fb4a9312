"""``pilot-flwr run --superlink NAME``: a federation of real sites."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

SUCCESS, FAILURE = 0, 1


def run(options: argparse.Namespace, show_results: Callable[[Path], None]) -> int:
    """Submit the run to the SuperLink that the user named, and follow it to its end.

    Parameters
    ----------
    options : argparse.Namespace
        Of ``pilot-flwr run``.
    show_results : callable
        Prints what is in a run folder that this machine can see.

    Raises
    ------
    ConfigError
        The configuration or the name of the connection is wrong; nothing was submitted.
    """
    from pilot_flwr.launch.prepare import prepare_submission
    from pilot_flwr.launch.superlink import Detached, find_connection, run_remotely

    address = find_connection(options.superlink, os.environ)
    config, overrides = prepare_submission(options.overrides)
    say(f"{config.name}: {config.num_clients} clients, SuperLink {options.superlink} at {address}")
    try:
        outcome, verdict = run_remotely(
            overrides,
            options.superlink,
            out=say,
            verbose=options.verbose,
        )
    except Detached as left:
        print(f"\npilot-flwr: {left}. {left.run.resume_hint}", file=sys.stderr)
        return 128 + left.signum
    if verdict is not None:
        folder = Path(verdict.folder)
        if _is_here(folder, verdict.seconds):
            show_results(folder)
        else:
            say(f"\nRun folder, on the SuperLink's machine: {folder}")
    if not outcome.succeeded:
        print("\nThe run failed.", *outcome.explanation, sep="\n", file=sys.stderr)
    return SUCCESS if outcome.succeeded else FAILURE


def _is_here(folder: Path, seconds: float) -> bool:
    """Return whether this machine sees the run folder: that run's, not one of the same name."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return bool(result["seconds"] == seconds)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
