"""``pilot-flwr sweep``: many runs from one command, a Hydra multirun."""

import argparse
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:  # heavy imports stay inside handlers
    from pilot_flwr.sweeps.jobs import Job, SweepFolder


SUCCESS, FAILURE = 0, 1


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    sweep = commands.add_parser(
        "sweep",
        help="run every combination of the overrides' values, and compare the results",
        description="Run every combination of the overrides' values as `pilot-flwr run` would, one "
        "after the other, and put the results into one file and one table. A sweep that was "
        "stopped goes on where it was when its folder is given again. Exit code: 0 all jobs "
        "succeeded, 1 some failed, 2 wrong usage or configuration (nothing was started), 130 or "
        "143 stopped by Ctrl-C or SIGTERM.",
        epilog="example: pilot-flwr sweep -m strategy=pilot,fedit,local seed=0,1,2 "
        "simulation.engine=in-process",
    )
    sweep.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="Hydra override, with several values (seed=0,1,2) to run each; "
        "hydra/launcher=joblib runs jobs side by side",
    )
    sweep.add_argument("-m", "--multirun", action="store_true", help="as in Hydra; always on")
    sweep.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="the sweep's folder (default: outputs/sweep-TIME); one that is there goes on, by "
        "itself or with more jobs",
    )
    sweep.add_argument(
        "--baseline",
        metavar="METHOD",
        help="in the table, compare every method with this one",
    )
    sweep.add_argument("--verbose", action="store_true", help="show what each job shows")
    sweep.set_defaults(handler=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    from pilot_flwr.launch.processes import Interrupted
    from pilot_flwr.sweeps.jobs import SweepFolder, read_plan
    from pilot_flwr.sweeps.runner import sweep

    name = options.out or Path("outputs") / f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    folder = SweepFolder(Path(os.path.abspath(name)))
    commands = [tuple(options.overrides)]
    if not options.overrides:
        plan = read_plan(folder) if options.out else None
        if plan is None:
            raise ConfigError(
                "A sweep needs overrides, for instance `strategy=pilot,fedit seed=0,1,2`; or "
                "`--out FOLDER` of a sweep that is to go on."
            )
        commands = list(plan.commands)
    asked: set[str] = set()
    try:
        for words in commands:
            rows = sweep(
                words,
                folder.path,
                out=_say,
                verbose=options.verbose,
                baseline=options.baseline,
            )
            plan = read_plan(folder)
            assert plan is not None
            asked |= {job.name for job in plan.current}
    except Interrupted as stop:
        print(f"\npilot-flwr: {stop}", file=sys.stderr)
        print(f"To go on: pilot-flwr sweep --out {shlex.quote(str(folder.path))}", file=sys.stderr)
        return 128 + stop.signum
    return _finish(folder, rows, asked)


def _finish(folder: "SweepFolder", rows: list[dict[str, Any]], asked: set[str]) -> int:
    """Write and show the table, then say what failed of the jobs `asked` for; return the code."""
    from pilot_flwr.cli.run import write_report
    from pilot_flwr.run.atomic import write_text
    from pilot_flwr.sweeps.compare import as_markdown, compare
    from pilot_flwr.sweeps.jobs import read_plan
    from pilot_flwr.sweeps.results import DONE, read_rows

    plan = read_plan(folder)
    assert plan is not None
    baseline = plan.baseline
    _say(f"\nResults: {folder.results}")
    try:
        comparisons = compare(read_rows(folder.results), baseline)
    except ConfigError as error:  # nothing has succeeded, or not the baseline
        print(f"No table: {error}", file=sys.stderr)
    else:
        table = "\n".join(as_markdown(comparison) for comparison in comparisons)
        write_text(folder.table, table)
        _say(f"Table: {folder.table}\n\n{table}")
        if not all(map(_unreported, plan.current)):
            write_report(folder.path, *(["--baseline", baseline] if baseline else []))
    failed = [row for row in rows if row["job"] in asked and row["status"] != DONE]
    if failed:
        print(f"\n{len(failed)} of {len(asked)} jobs failed:", file=sys.stderr)
    for row in failed:
        log = folder.path / "logs" / f"{row['job']}.log"
        print(f"  {row['job']}: {row['error'] or row['status']}\n    log: {log}", file=sys.stderr)
    if failed:
        again = f"pilot-flwr sweep --out {shlex.quote(str(folder.path))}"
        print(f"To try them again: {again}", file=sys.stderr)
    return FAILURE if failed else SUCCESS


def _unreported(job: "Job") -> bool:
    return any(word.lower() == "run.report=false" for word in job.words)


def _say(line: str) -> None:
    print(line, flush=True)
