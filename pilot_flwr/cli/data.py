"""``pilot-flwr data``: commands about data, before there is a run.

To add one, write a module of this package whose function `add` adds its parser, and name it in
`COMMANDS`.
"""

import argparse

from pilot_flwr.cli import check, convert

COMMANDS = (convert.add, check.add)
"""In the order in which ``--help`` lists them."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of ``data``, and those of its commands."""
    parser = commands.add_parser(
        "data", help="convert and check data", description="Convert and check data."
    )
    inner = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command(inner)
