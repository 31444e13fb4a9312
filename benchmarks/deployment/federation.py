"""Run a federation on loopback with the commands of the deployment guide, and watch it.

``tests/deployment`` executes the guide's blocks: a server with TLS, node keys and, where nginx is
installed, the gateway; and sites with their own data, with their warm services or without.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _record import ROOT

from deployment.exchanges import MARKS
from deployment.watch import LogTimes, Watch

for _folder in (ROOT / "tests" / "deployment", ROOT / "tests"):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

from lab import Lab  # noqa: E402

LIMIT_SECONDS = 3600.0
SERVER = "server"


@dataclass(frozen=True)
class Measured:
    """A finished run: events, start (seconds since 1970), processes, what happened at the sites."""

    events: list[dict[str, Any]]
    began: float
    watch: Watch
    gateway: bool
    moments: dict[str, list[tuple[float, str]]]


def run_federation(
    folder: Path,
    sites: Mapping[str, str],
    words: str,
    *,
    train: int = 12,
    test: int = 4,
    site_config: str = "",
    warm: bool = False,
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
    warm : bool
        Whether the sites run their services.

    Raises
    ------
    SystemExit
        The run failed; its output is the message.
    """
    with Lab(folder, sites=sites, train=train, test=test, warm=warm) as lab:
        machines = {SERVER: lab.server.roots}
        machines |= {client: lambda client=client: _roots(lab, client) for client in sites}
        with ExitStack() as stack:
            watch = stack.enter_context(Watch(machines))
            logs = {c: stack.enter_context(LogTimes(supernode_log(folder, c))) for c in sites}
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
        moments = {c: site_moments(log.lines, lives(watch, c)) for c, log in logs.items()}
        return Measured(events, began, watch, lab.gateway, moments)


def supernode_log(folder: Path, client: str) -> Path:
    """Return the log of a site's SuperNode in a federation's folder."""
    return folder / client / "supernode.log"


def lives(watch: Watch, client: str) -> list[float]:
    """Return when each of a client's ClientApp processes was started."""
    return [seen.began for seen in watch.lives(client, "flwr-clientapp")]


def site_moments(
    lines: Iterable[tuple[float, str]], processes: Sequence[float]
) -> list[tuple[float, str]]:
    """Return what happened at a site, from its SuperNode's log and its ClientApps' starts."""
    found = [(when, kind) for when, text in lines for kind, m in MARKS.items() if m in text]
    return sorted([*found, *((when, "process") for when in processes)])


def _roots(lab: Lab, client: str) -> list[int]:
    service = lab.services.get(client)
    return lab.sites[client].roots() + (service.roots() if service else [])
