"""``pilot-flwr site``: serve and inspect a real site, on its machine."""

import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from pilot_flwr.cli.common import FAILURE, SUCCESS, Overrides, hide_progress_bars, print_table
from pilot_flwr.formatting import count, human_bytes

if TYPE_CHECKING:
    from pilot_flwr.site.service import Status

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
            help="Release the base model and its GPU memory after this time without a message; "
            "0: never.",
        ),
    ] = 3600.0,
) -> int:
    """Keep this site warm: keep the base model loaded between the SuperNode's messages.

    Run it as the SuperNode's user, with the same node config. Stop it with SIGTERM or Ctrl-C.
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


def check(
    node_config: NodeConfigOption,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> int:
    """Check everything for which a run's server would refuse this site; print remedies.

    Run it as the SuperNode's user. Add the overrides of a run, such as `data=federation.yaml
    strategy.clients=3`, to check what depends on the run. The base model's hashes are printed, not
    compared with the server's. To validate every row and image, use `data check`.

    Exit code: 0 if all checks pass, 1 if one fails, 2 for wrong usage or overrides.
    """
    from dataclasses import asdict

    from pilot_flwr.cli.data import parse_node_config
    from pilot_flwr.config.loading import load_config
    from pilot_flwr.config.overrides import expand
    from pilot_flwr.site.check import check_site

    hide_progress_bars()
    values = parse_node_config(node_config)
    config = load_config(shlex.join(expand(overrides))) if overrides else None
    rows = check_site(values, config)
    if as_json:
        print(json.dumps([asdict(row) | {"remedy": row.remedy} for row in rows], indent=2))
    else:
        _print_rows(
            ("check", "result", "details"),
            [
                (row.check, row.result, "\n→ ".join(filter(None, (row.text, row.remedy))))
                for row in rows
            ],
        )
    return FAILURE if any(row.result == "refused" for row in rows) else SUCCESS


def status(
    node_config: NodeConfigOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Show this site's service, the last exchange of each run, the privacy budget and disk usage.

    Exit code: 0 if a service answers, 1 if none does, 2 if the node config is wrong.
    """
    from dataclasses import asdict

    from pilot_flwr.cli.data import parse_node_config
    from pilot_flwr.client.node_config import read_node_config
    from pilot_flwr.site.status import site_status

    found = site_status(read_node_config(parse_node_config(node_config)))
    code = FAILURE if found.service is None else SUCCESS
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return code
    privacy, sizes = found.privacy, {run.run: run.bytes for run in found.runs} | found.shared
    lines = [("service", found.service_problem or _service(found.service))]
    lines += [
        (f"run {run.run}", f"exchange {run.exchange}, stage {run.stage}, {_time(run.written)}")
        for run in found.runs
    ]
    budget = "no limit" if privacy.max_epsilon is None else f"of {privacy.max_epsilon:g}"
    spent = "" if privacy.epsilon is None else f"ε = {privacy.epsilon:.4g} ({budget}), "
    uploads = f"{spent}δ = {privacy.delta:g}, {count(privacy.releases, 'private upload')}"
    lines.append(("privacy", privacy.problem or uploads))
    disk = [f"{human_bytes(size)} {name}" for name, size in sizes.items()]
    lines.append(("disk", ", ".join([*disk, f"{human_bytes(found.free)} free"])))
    _print_rows((f"site {found.client}", found.state_folder), lines)
    return code


def _service(found: "Status | None") -> str:
    if found is None:
        return "cold: no service is running; each message loads the base model"
    model = "the base model is loaded" if found.warm else "no base model is loaded yet"
    busy = f"; busy: {found.busy}" if found.busy else "; idle"
    answered = count(found.messages, "message")
    return f"process {found.pid} since {_time(found.started)}, {answered}; {model}{busy}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _print_rows(titles: Sequence[str], rows: "Sequence[tuple[str, ...]]") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*titles)
    for row in rows:
        table.add_row(*map(Text, row))
    print_table(table)
