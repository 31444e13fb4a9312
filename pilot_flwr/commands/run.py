"""``pilot-flwr run``: a federation under Flower's simulation engine."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from pilot_flwr.errors import ConfigError

SUCCESS, FAILURE = 0, 1


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    run = commands.add_parser(
        "run",
        help="run a federation under Flower's simulation engine, to its end",
        description="Run a federation under Flower's simulation engine, to its end. "
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
        from pilot_flwr.commands import superlink

        return superlink.run(options, _show_results)
    from datetime import datetime

    from pilot_flwr import submission
    from pilot_flwr.config import load_config
    from pilot_flwr.data.federation import federation_clients
    from pilot_flwr.data.files import check_simulated
    from pilot_flwr.federation_file import with_folder
    from pilot_flwr.launching import cluster, cluster_nodes, restarts
    from pilot_flwr.launching.outcome import Outcome
    from pilot_flwr.launching.processes import Interrupted
    from pilot_flwr.launching.simulation import launch
    from pilot_flwr.model.shipped import checkpoint_path
    from pilot_flwr.storage.locks import hold
    from pilot_flwr.storage.resume import check_resumable, completed

    resumed, given = restarts.words_of_run(options.overrides)
    config = load_config(shlex.join(given))
    if config.strategy.clients:
        raise ConfigError(
            f"`strategy.clients` is {config.strategy.clients}, a number of real sites, but a "
            "simulation has the configured clients: leave it 0, or use `--superlink`."
        )
    federation_clients(config.data)  # refuses an unknown task now, not a minute into the run
    config, words = with_folder(config, given)
    if config.data.source == "llava":
        evaluated = config.evaluation.enabled
        check_simulated(config.data, ["train", "test"] if evaluated else ["train"])
    address = cluster.address_of(config.simulation, os.environ)
    if not address:
        submission.check_gpus(config.simulation)
        federation = submission.federation_config(config.num_clients, config.simulation)
    folder = resumed or submission.run_folder(config.run.folder, config.name, datetime.now())
    words.append(submission.path_override("run.folder", folder))
    base = config.model.path
    if checkpoint_path(base) == base and os.path.isdir(base):  # the app runs in another folder
        words.append(submission.path_override("model.path", Path(os.path.abspath(base))))
    overrides = shlex.join(words)
    if load_config(overrides).run.folder != str(folder):
        raise ConfigError(f"`run.folder` is {str(folder)!r} but Hydra cannot carry such a path.")
    if resumed:
        check_resumable(folder, load_config(overrides))
        if completed(folder, config) is not None:
            return _say_completed(folder)
    app = submission.app_folder()
    doing = "going on in run folder" if resumed else "run folder"
    _say(f"{config.name}: {config.num_clients} clients, {doing} {folder}")
    if address:
        found, federation = cluster_nodes.prepare(load_config(overrides), address, folder)
        address = found.address
        _say(found.describe(config.simulation))
    _say("Starting Flower and Ray; the first news takes half a minute.")

    def start(overrides: str, goes_on: bool) -> Outcome:
        return launch(
            app,
            overrides,
            federation,
            folder,
            out=_say,
            verbose=options.verbose,
            address=address,
            resumed=goes_on,
        )

    try:
        with hold(folder / restarts.LAUNCH_LOCK, f"The run folder {folder}"):
            if not resumed:
                restarts.keep_overrides(folder, overrides)
            outcome = restarts.run_attempts(
                start,
                overrides,
                folder,
                restarts=config.run.restarts,
                resumed=bool(resumed),
                out=_say,
            )
    except Interrupted as stop:
        print(f"\npilot-flwr: {stop}; run folder {folder}", file=sys.stderr)
        print(f"To go on: pilot-flwr run resume={shlex.quote(str(folder))}", file=sys.stderr)
        return 128 + stop.signum
    _show_results(folder)
    if not outcome.succeeded:
        print("\nThe run failed.", *outcome.explanation, sep="\n", file=sys.stderr)
        if (folder / "config.yaml").is_file() and completed(folder, config) is None:
            print(f"To go on: pilot-flwr run resume={shlex.quote(str(folder))}", file=sys.stderr)
    return SUCCESS if outcome.succeeded else FAILURE


def _say_completed(folder: Path) -> int:
    """Show a run that is at its end already, and return what its own result says."""
    from pilot_flwr.launching.outcome import COMPLETED, RunStatus, judge

    _say(f"The run in {folder} is complete: there is nothing left to do.")
    _say("To train on, resume it with a larger `strategy.rounds`.")
    _show_results(folder)
    outcome = judge(RunStatus(COMPLETED), folder)
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
    from pilot_flwr.storage.checkpoint import checkpoint_folders

    checkpoints = checkpoint_folders(folder / "checkpoint")
    if checkpoints:
        _say(f"\nAdapters: {checkpoints[-1]}")
    _say(f"\nRun folder: {folder}")


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
