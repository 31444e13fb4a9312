"""A site's status: its service, runs, privacy account and disk usage.

The status is read from the state folder and the service; it needs no run. ``pilot-flwr site
status`` prints it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pilot_flwr.client.node import SHARED_FOLDERS
from pilot_flwr.client.node_config import NodeSettings
from pilot_flwr.client.privacy_accountant import PrivacyAccount
from pilot_flwr.client.private_state import PrivateStore
from pilot_flwr.errors import ConfigError, PilotError
from pilot_flwr.run.atomic import read_metadata
from pilot_flwr.site import service


@dataclass(frozen=True)
class RunState:
    """A run's newest private state: exchange, stage, time of writing; and the folder's size."""

    run: str
    exchange: int
    stage: str
    written: float
    bytes: int


@dataclass(frozen=True)
class Privacy:
    """Uploads counted so far; if ε cannot be computed it is None, and `problem` says why."""

    releases: int
    epsilon: float | None
    delta: float
    max_epsilon: float | None
    problem: str = ""


@dataclass(frozen=True)
class SiteStatus:
    """A site's status; sizes are in bytes, `shared` has the folders that all runs share."""

    client: str
    state_folder: str
    service: service.Status | None
    service_problem: str
    runs: tuple[RunState, ...]
    privacy: Privacy
    shared: dict[str, int]
    free: int


def site_status(node: NodeSettings) -> SiteStatus:
    """Read the status of a site; raise `ConfigError` if it has no state folder."""
    folder = node.state_folder
    if folder is None or not folder.is_dir():
        named = "is missing in the node config" if folder is None else f"names {str(folder)!r}"
        raise ConfigError(f"`state-folder` {named}, but must be an existing folder.")
    found, problem = None, ""
    try:
        found = service.status(folder)
    except PilotError as error:
        problem = str(error)
    return SiteStatus(
        node.client_id,
        str(folder),
        found,
        problem,
        tuple(_runs(folder, node)),
        _privacy(folder, node),
        {name: _size(folder / name) for name in SHARED_FOLDERS},
        shutil.disk_usage(folder).free,
    )


def _runs(folder: Path, node: NodeSettings) -> list[RunState]:
    runs = []
    for path in sorted(folder.iterdir()):
        newest = PrivateStore(path, node.client_id, node.task).newest() if path.is_dir() else None
        if newest is None:
            continue
        try:
            stage = read_metadata(newest).get("stage", "unknown")
        except PilotError:
            stage = "unreadable"
        exchange = int(newest.stem.removeprefix("private-"))
        runs.append(RunState(path.name, exchange, stage, newest.stat().st_mtime, _size(path)))
    return sorted(runs, key=lambda run: run.written)


def _privacy(folder: Path, node: NodeSettings) -> Privacy:
    demands = node.demands
    budget = demands.max_epsilon if demands.max_epsilon < float("inf") else None
    account = PrivacyAccount.of(folder, node.client_id)
    releases, epsilon, problem = 0, None, ""
    try:
        releases = len(account.releases())
        epsilon = account.spent(demands.delta).epsilon if releases else 0.0
    except PilotError as error:
        problem = str(error)
    return Privacy(releases, epsilon, demands.delta, budget, problem)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
