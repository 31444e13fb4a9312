"""Preflight checks of a client: files, permissions, disk space.

They run when the server queries the node, so that a site that cannot train fails early. Their
errors name paths, which the site's log shows and
`pilot_flwr.flower.messages` withholds from the server. To add a check, add it to
`readiness_checks`; ``pilot-flwr site check`` reports each of them.
"""

import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from pilot_flwr.algorithm.parameter_groups import PERSONAL_GROUPS, Sharing
from pilot_flwr.client.node import Site
from pilot_flwr.client.private_state import KEPT_STATES
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import SiteFiles, Split
from pilot_flwr.data.federation import (
    Client,
    client_examples,
    federation_clients,
    trains_pooled,
)
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.data.overlap import Overlap, cached_overlap, check_overlap, find_overlap
from pilot_flwr.data.row_files import may_have_rows
from pilot_flwr.errors import ConfigError
from pilot_flwr.formatting import human_bytes
from pilot_flwr.model.shapes import layout_of

logger = logging.getLogger("flwr")

ANY_COLOUR = (0, 0, 0)
"""Padding colour of images that are only checked or compared."""


def check_readiness(site: Site, config: PilotConfig) -> None:
    """Raise `ConfigError` unless a site can read its data and keep its state."""
    for check in readiness_checks(site, config).values():
        check()


def readiness_checks(site: Site, config: PilotConfig) -> dict[str, Callable[[], None]]:
    """Return the checks of a site by name, in order; a failed one raises `ConfigError`."""
    checks: dict[str, Callable[[], None]] = {}
    evaluates = config.evaluation.enabled and not config.privacy.withholds_metrics
    if (files := site.files) is not None:
        checks["data files"] = lambda: check_files(files, evaluated=config.evaluation.enabled)
    checks["state folder"] = lambda: check_writable(site.state_folder)
    if config.data.source == "llava" and evaluates:
        checks["overlap"] = lambda: _check_overlap(site, config)
    checks["disk space"] = lambda: _check_state_room(site, config)
    return checks


def _check_state_room(site: Site, config: PilotConfig) -> None:
    sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
    tasks, stages = tuple(config.data.tasks), config.strategy.stages
    layout = layout_of(config.model, tasks, sharing, stages=stages)
    personal = sum(layout.personal_bytes[g] for g in PERSONAL_GROUPS[config.train.personal.model])
    moments = layout.moments_bytes if config.train.schedule == "run" else 0
    check_room(site.state_folder, layout.private_bytes + personal + moments + layout.error_bytes)


def check_files(files: SiteFiles, *, evaluated: bool) -> None:
    """Raise `ConfigError` unless all files that a run needs are readable."""
    if evaluated and not files.test:
        raise ConfigError(
            "`test-file` is missing in the node config but the run evaluates; with "
            "`evaluation.enabled=false` it would need none."
        )
    named = {"train-file": files.train, "test-file": files.test}
    problems = [(key, path, _file_problem(path)) for key in named for path in named[key]]
    if files.images is not None:
        problems.append(("image-folder", files.images, _folder_problem(files.images)))
    for path in files.linked_folders:
        problems.append(("linked-folders", path, _kind_problem(path, "folder", stat.S_ISDIR)))
    found = [
        f"`{key}` names {str(path)!r}, {problem}." for key, path, problem in problems if problem
    ]
    if found:
        raise ConfigError(" ".join(found))


def client_overlap(
    client: Client,
    config: PilotConfig,
    files: SiteFiles | None,
    *,
    workers: int,
    cache: Path | None,
) -> Overlap:
    """Return the overlap of a client's test and training rows, cached in the folder `cache`.

    A site counts all its rows, so that no server setting can reveal which of them overlap.
    """
    if files is not None:
        train, test = [files.rows("train")], files.rows("test")
    else:
        pooled = trains_pooled(config.strategy, client)
        clients = federation_clients(config.data) if pooled else [client]
        train = [_simulated_rows(config, c, "train") for c in clients]
        test = _simulated_rows(config, client, "test")
    if cache is None:
        return find_overlap(train, test, workers=workers)
    return cached_overlap(train, test, cache, workers=workers)


def _simulated_rows(config: PilotConfig, client: Client, split: Split) -> LlavaExamples:
    examples = client_examples(config.data, client, split, seed=config.seed, background=ANY_COLOUR)
    assert isinstance(examples, LlavaExamples)
    return examples


def _check_overlap(site: Site, config: PilotConfig) -> None:
    """Raise `ConfigError` if too many of the client's test rows are training rows."""
    files, folder = site.files, site.state_folder
    key, allowed = "data.allowed_overlap", config.data.allowed_overlap
    if files is not None:  # one cached result for all runs of the site
        key, allowed, folder = "allowed-overlap", files.allowed_overlap, folder.parent
    if allowed < 1:
        workers = os.cpu_count() or 1
        found = client_overlap(
            site.client, config, files, workers=workers, cache=folder / "overlap"
        )
        if files is not None and found.exceeds(allowed):  # the rows' numbers stay in its log
            logger.error("%s.", found)
            found = found._replace(first="")
        check_overlap(found, key, allowed)


def check_writable(folder: Path) -> None:
    """Raise `ConfigError` unless a client's folder exists or can be created, and is writable."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"pilot-flwr")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{_named(folder)} cannot be written: {error.strerror}.") from None


def check_room(folder: Path, size: int) -> None:
    """Raise `ConfigError` unless the disk has room for `KEPT_STATES` states of `size` bytes.

    One more exists while it is written; states already in `folder` need no room.
    """
    present = sum(path.stat().st_size for path in folder.glob("private*.safetensors"))
    needed = max(size, (KEPT_STATES + 1) * size - present)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{_named(folder)} has {human_bytes(free)} ({free} bytes) free but needs "
            f"{human_bytes(needed)} ({needed} bytes), for {KEPT_STATES} versions of the client's "
            f"private adapters ({human_bytes(size)} each) and one that is being written."
        )


def _named(folder: Path) -> str:
    return f"The client's own folder {str(folder)!r} (`state-folder`; in a simulation `run.folder`)"


def _kind_problem(path: Path, kind: str, is_kind: Callable[[int], bool]) -> str:
    try:
        found = is_kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        found = False
    except OSError as error:
        return f"which cannot be reached: {error.strerror}"
    return "" if found else f"which is not a {kind}"


def _file_problem(path: Path) -> str:
    """Return why a file of rows, or a folder that holds a data set, cannot be read."""
    if problem := _kind_problem(path, "file or a data set's folder", stat.S_ISREG):
        return _folder_problem(path) if may_have_rows(path) else problem
    reason = _unreadable(path)
    return f"which cannot be read: {reason}" if reason else ""


def _folder_problem(path: Path) -> str:
    """Return why an image folder or its files cannot be read, without the name of an image."""
    if problem := _kind_problem(path, "folder", stat.S_ISDIR):
        return problem
    try:
        with os.scandir(path) as entries:
            first = next((Path(e.path) for e in entries if e.is_file()), None)
    except OSError as error:
        return f"which cannot be listed: {error.strerror}"
    effective = os.access in os.supports_effective_ids
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=effective):
        return "which cannot be entered (r and x)"
    reason = _unreadable(first) if first else None
    return f"where a file cannot be read: {reason}" if reason else ""


def _unreadable(path: Path) -> str | None:
    """Return the system's reason why a file cannot be read."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return error.strerror
    return None
