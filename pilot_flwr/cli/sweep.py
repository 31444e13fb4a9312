"""``pilot-flwr sweep``, ``table`` and ``report``: run many jobs, tabulate and report results."""

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pilot_flwr.cli.common import (
    FAILURE,
    SUCCESS,
    Baseline,
    Overrides,
    hide_progress_bars,
    new_file,
    say,
    show,
)
from pilot_flwr.cli.run import write_report
from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:
    from pilot_flwr.sweeps.jobs import Manifest, SweepFolder


def sweep(
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="As in Hydra; always on.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The sweep's folder (default: outputs/sweep-TIME); an existing one is resumed, "
            "with additional jobs if there are overrides.",
        ),
    ] = None,
    baseline: Baseline = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the output of each job.")
    ] = False,
) -> int:
    """Run every combination of override values, and compare the results.

    Each value of an override (seed=0,1,2) is run as by `pilot-flwr run`, sequentially or, with
    hydra/launcher=joblib, in parallel. Results are collected in one file and one table. To resume
    a stopped sweep, pass its folder as --out.

    Exit code: 0 all jobs succeeded, 1 some failed, 2 wrong usage or configuration (nothing was
    started), 130 or 143 stopped by Ctrl-C or SIGTERM.

    Example: `pilot-flwr sweep -m strategy=pilot,fedit,local seed=0,1,2`
    """
    from pilot_flwr.config.overrides import expand
    from pilot_flwr.launch.processes import Interrupted
    from pilot_flwr.sweeps import runner
    from pilot_flwr.sweeps.jobs import SweepFolder, read_manifest

    name = out or Path("outputs") / f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    folder = SweepFolder(Path(os.path.abspath(name)))
    manifest = read_manifest(folder) if out and not overrides else None
    if not overrides and manifest is None:
        raise ConfigError(
            "A sweep needs overrides, for instance `strategy=pilot,fedit seed=0,1,2`; or "
            "`--out FOLDER` of a sweep to resume."
        )
    commands = manifest.commands if manifest else (tuple(expand(overrides or ())),)
    requested: set[str] = set()
    try:
        for command in commands:
            rows = runner.sweep(command, folder.path, out=show, verbose=verbose, baseline=baseline)
            manifest = read_manifest(folder)
            assert manifest is not None
            requested |= {job.name for job in manifest.current}
    except Interrupted as stop:
        say(f"\npilot-flwr: {stop}")
        say(f"To resume: {_resume_command(folder)}")
        return 128 + stop.signum
    assert manifest is not None
    return _finish(folder, manifest, rows, requested)


def _finish(
    folder: "SweepFolder", manifest: "Manifest", rows: list[dict[str, Any]], requested: set[str]
) -> int:
    """Write and print the table, list the `requested` jobs that failed, return the exit code."""
    from pilot_flwr.run.atomic import write_text
    from pilot_flwr.sweeps.compare import as_markdown, compare
    from pilot_flwr.sweeps.results import DONE, read_rows

    baseline = manifest.baseline
    show(f"\nResults: {folder.results}")
    try:
        comparisons = compare(read_rows(folder.results), baseline)
    except ConfigError as error:  # no job has succeeded, or none of the baseline
        say(f"No table: {error}")
    else:
        text = "\n".join(as_markdown(comparison) for comparison in comparisons)
        write_text(folder.table, text)
        show(f"Table: {folder.table}\n\n{text}")
        jobs = manifest.current
        if any("run.report=false" not in map(str.lower, job.overrides) for job in jobs):
            write_report(folder.path, *(["--baseline", baseline] if baseline else []))
    failed = [row for row in rows if row["job"] in requested and row["status"] != DONE]
    if not failed:
        return SUCCESS
    say(f"\n{len(failed)} of {len(requested)} jobs failed:")
    for row in failed:
        log = folder.path / "logs" / f"{row['job']}.log"
        say(f"  {row['job']}: {row['error'] or row['status']}\n    log: {log}")
    say(f"To retry them: {_resume_command(folder)}")
    return FAILURE


def _resume_command(folder: "SweepFolder") -> str:
    return f"pilot-flwr sweep --out {shlex.quote(str(folder.path))}"


def table(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="results.csv, or a sweep's folder."),
    ],
    baseline: Baseline = None,
    format: Annotated[Literal["markdown", "latex"], typer.Option()] = "markdown",
    costs: Annotated[
        bool, typer.Option("--costs", help="Add bytes sent and run time, averaged over seeds.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to a new file instead of stdout.")
    ] = None,
) -> int:
    """Print a sweep's means, intervals and tests, as Markdown or LaTeX.

    Each row is a method: its mean score over seeds with a 95 % interval and, with --baseline, the
    paired difference to that method with its test.

    Example: `pilot-flwr table outputs/sweep-20260101-120000 --baseline local`
    """
    from pilot_flwr.sweeps.compare import as_latex, as_markdown, compare
    from pilot_flwr.sweeps.results import read_rows

    rows = [row for path in results for row in read_rows(path)]
    write = as_latex if format == "latex" else as_markdown
    text = "\n".join(write(comparison, costs=costs) for comparison in compare(rows, baseline))
    if out is None:
        print(text, end="")
    else:
        with new_file("--out", out) as file:
            file.write(text)
    return SUCCESS


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|SWEEP", help="Run folder, folder of `pilot-flwr sweep`, or a results.csv."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A new or empty folder, or one with an earlier report, which is replaced "
            "(default: report in the folder of the run or sweep).",
        ),
    ] = None,
    no_router: Annotated[
        bool,
        typer.Option("--no-router", help="Omit the router's figures, which need the base model."),
    ] = False,
    baseline: Baseline = None,
) -> int:
    """Write the report of a run or a sweep: one HTML page and PNG files.

    index.html is self-contained; its figures are also written as PNG files. An existing report is
    replaced.

    Example: `pilot-flwr report outputs/demo-20270101-120000`
    """
    from pilot_flwr.report.page import earlier_pictures
    from pilot_flwr.report.run import write_run_report
    from pilot_flwr.report.sweep import is_sweep, write_sweep_report

    hide_progress_bars()
    target = out or (folder if folder.is_dir() else folder.parent) / "report"
    earlier_pictures(target)  # raises early if it cannot be replaced
    if is_sweep(folder):
        page = write_sweep_report(folder, target, baseline=baseline, say=_progress)
    elif baseline is not None:
        raise ConfigError("`--baseline` needs a sweep: a run has only one method.")
    else:
        page = write_run_report(folder, target, router=not no_router, say=_progress)
    show(f"Report: {page}")
    return SUCCESS


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        say(f"  {line}")
