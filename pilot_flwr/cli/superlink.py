"""``pilot-flwr run --superlink NAME``: a federation of real sites."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from pilot_flwr.errors import ConfigError

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
    from pilot_flwr.config import overrides as submission
    from pilot_flwr.launch.superlink import Detached, find_connection, run_remotely

    address = find_connection(options.superlink, os.environ)
    overrides, name, clients = _overrides(options.overrides)
    say(f"{name}: {clients} clients, SuperLink {options.superlink} at {address}")
    try:
        outcome, verdict = run_remotely(
            submission.app_folder(),
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


def _overrides(words: list[str]) -> tuple[str, str, int]:
    """Return the overrides to submit, the run's name, and its number of clients."""
    from pilot_flwr.config import overrides as submission
    from pilot_flwr.config.federation_file import with_folder
    from pilot_flwr.config.loading import load_config
    from pilot_flwr.data.federation import federation_clients
    from pilot_flwr.launch.prepare import words_of_run
    from pilot_flwr.model.checkpoints import checkpoint_path
    from pilot_flwr.server.resume import OVERRIDES

    config = load_config(shlex.join(words))
    for key, value in (("run.folder", config.run.folder), ("resume", config.resume)):
        if value and not Path(value).expanduser().is_absolute():
            raise ConfigError(
                f"`{key}` is {value!r} but must be an absolute path, as it is on the SuperLink's "
                "machine."
            )
    if config.resume and (Path(config.resume).expanduser() / OVERRIDES).is_file():  # it is here
        words = words_of_run(words)[1]
        config = load_config(shlex.join(words))
    federation_clients(config.data)  # refuses an unknown task now, not a minute into the run
    config, words = with_folder(config, words)
    base = config.model.path
    if checkpoint_path(base) == base and os.path.isdir(base):  # the app runs in another folder
        words.append(submission.path_override("model.path", Path(os.path.abspath(base))))
    return shlex.join(words), config.name, config.num_clients


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
