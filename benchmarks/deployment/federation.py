"""Run a federation on loopback with the commands of the deployment guide, and watch it.

``tests/deployment`` executes the guide's blocks: a server with TLS, node keys and, where nginx is
installed, the gateway; and sites with their own data.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _record import ROOT

from deployment.watch import Watch

for _folder in (ROOT / "tests" / "deployment", ROOT / "tests"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

from lab import Lab  # noqa: E402

LIMIT_SECONDS = 3600.0
SERVER = "server"


@dataclass(frozen=True)
class Measured:
    """A finished run: its events, start (seconds since 1970) and processes."""

    events: list[dict[str, Any]]
    began: float
    watch: Watch
    gateway: bool


def run_federation(
    folder: Path,
    sites: Mapping[str, str],
    words: str,
    *,
    train: int = 12,
    test: int = 4,
    site_config: str = "",
) -> Measured:
    """Start a server and sites, run a federation on them, stop everything.

    Parameters
    ----------
    folder : Path
        For all files; it must not exist.
    sites : Mapping[str, str]
        Task of each site, by its name.
    words : str
        Overrides of the run, after those of the guide.
    train, test : int
        Examples of each site.
    site_config : str
        More lines for every site's node config.

    Raises
    ------
    SystemExit
        The run failed; its output is the message.
    """
    with Lab(folder, sites=sites, train=train, test=test) as lab:
        machines = {SERVER: lab.server.roots}
        machines |= {client: site.roots for client, site in lab.sites.items()}
        with Watch(machines) as watch:
            lab.start_server()
            for site in lab.sites.values():
                lab.prepare(site, more=site_config)
            lab.start_sites()
            lab.server.run("federation")
            more = f"strategy.clients={len(sites)} {words}"
            said = lab.server.run("run", timeout=LIMIT_SECONDS, check=False, add=more)
        if lab.server.code != 0:
            raise SystemExit(said)
        run = lab.server.folder / "runs" / "first"
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        # The first file of a run folder; `elapsed` of its events counts from then.
        began = (run / ".token").stat().st_mtime
        return Measured(events, began, watch, lab.gateway)
