"""``pilot-flwr site serve``: commands for a real site's machine."""

from typing import Annotated

import typer

from pilot_flwr.cli.common import SUCCESS

NodeConfigOption = Annotated[
    str,
    typer.Option(
        "--node-config",
        metavar="FILE",
        help="The site's TOML file, or KEY=VALUE pairs, as flower-supernode takes them.",
    ),
]


def serve(
    node_config: NodeConfigOption,
    idle_release: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Release the base model, and a GPU's memory, after this time without a message; "
            "0 for never.",
        ),
    ] = 3600.0,
) -> int:
    """Keep this site warm: hold the base model ready between the messages of a SuperNode.

    Run it as the SuperNode's user, with the same node config. It ends with SIGTERM or Ctrl-C.
    """
    from pilot_flwr.cli.data import parse_node_config
    from pilot_flwr.launch.processes import Interrupted, StopSignals
    from pilot_flwr.site import service

    try:
        with StopSignals(at_once=True):
            service.serve(parse_node_config(node_config), idle_release=idle_release)
    except Interrupted:
        pass
    return SUCCESS
