"""``pilot-flwr report``: what a run or a sweep left behind, as a page with figures."""

import argparse
import sys
from pathlib import Path

from pilot_flwr.errors import ConfigError

FOLDER = "report"
"""Folder of the report in the run's or the sweep's own."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    report = commands.add_parser(
        "report",
        help="write a run's or a sweep's report: one HTML page and PNG files",
        description="Write the report of a run or of a sweep: index.html, which needs no network "
        "and no other file, and its figures as PNG files. A report that is there already is "
        "written anew.",
        epilog="example: pilot-flwr report outputs/demo-20270101-120000",
    )
    report.add_argument(
        "folder",
        metavar="RUN|SWEEP",
        type=Path,
        help="run folder, folder of `pilot-flwr sweep`, or a results.csv",
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="a new or empty folder, or one with an earlier report, of which only the report's "
        f"own files are replaced (default: {FOLDER} in the run's or sweep's)",
    )
    report.add_argument(
        "--no-router",
        action="store_true",
        help="leave out what the router does, for which the base model is loaded",
    )
    report.add_argument(
        "--baseline", metavar="METHOD", help="compare a sweep's methods with this one in its table"
    )
    report.set_defaults(handler=_report, hydra=False, overrides=[])


def _report(options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from pilot_flwr.report.html import earlier_pictures
    from pilot_flwr.report.run import write_run_report
    from pilot_flwr.report.sweep import is_sweep, write_sweep_report

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    path = options.folder
    out = options.out or (path if path.is_dir() else path.parent) / FOLDER
    earlier_pictures(out)  # whether it may be written to, before the work
    if is_sweep(path):
        page = write_sweep_report(path, out, baseline=options.baseline, say=_say)
    elif options.baseline is not None:
        raise ConfigError("`--baseline` belongs to a sweep: a run has one method.")
    else:
        page = write_run_report(path, out, router=not options.no_router, say=_say)
    print(f"Report: {page}")
    return 0


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(f"  {line}", file=sys.stderr, flush=True)
