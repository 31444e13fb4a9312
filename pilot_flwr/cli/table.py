"""``pilot-flwr table``: results of sweeps as a table with intervals and tests."""

import argparse
from pathlib import Path

from pilot_flwr.cli.common import new_file

SUCCESS = 0


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    table = commands.add_parser(
        "table",
        help="means, intervals and tests of a sweep's results, as Markdown or LaTeX",
        description="Print a row per method: the mean of its scores over seeds with a 95 % "
        "interval, and with --baseline the paired difference to a method and its test.",
        epilog="example: pilot-flwr table outputs/sweep-20260101-120000 --baseline local",
    )
    table.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="results.csv, or a sweep's folder"
    )
    table.add_argument(
        "--baseline", metavar="METHOD", help="compare every method with this one, seed by seed"
    )
    table.add_argument(
        "--format", choices=("markdown", "latex"), default="markdown", help="default: markdown"
    )
    table.add_argument(
        "--costs", action="store_true", help="add bytes sent and time of a run, means over seeds"
    )
    table.add_argument("--out", type=Path, metavar="FILE", help="write it to a new file instead")
    table.set_defaults(handler=_table)


def _table(options: argparse.Namespace) -> int:
    from pilot_flwr.sweeps.compare import as_latex, as_markdown, compare
    from pilot_flwr.sweeps.results import read_rows

    rows = [row for path in options.results for row in read_rows(path)]
    write = as_latex if options.format == "latex" else as_markdown
    comparisons = compare(rows, options.baseline)
    text = "\n".join(write(comparison, costs=options.costs) for comparison in comparisons)
    if options.out is None:
        print(text, end="")
    else:
        with new_file("--out", options.out) as file:
            file.write(text)
    return SUCCESS
