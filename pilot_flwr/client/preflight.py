"""What a site can know to be wrong before any training: files, folders, room on its disk.

Everything that a node config names is tried when the server asks who the node is, so that a site
that cannot train says so then, and not hours into a round. The errors have paths, which the site's
log shows and `pilot_flwr.flower.messages` takes out of what the server gets. To have more tried,
add a function and call it in `check_readiness`.
"""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.client.node import Site
from pilot_flwr.client.private_state import KEPT_STATES
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import SiteFiles
from pilot_flwr.errors import ConfigError
from pilot_flwr.formatting import human_bytes
from pilot_flwr.model.shapes import layout_of

_PROBE = ".probe"


def check_readiness(site: Site, config: PilotConfig) -> None:
    """Raise `ConfigError` unless a site can read its data and keep its state."""
    if site.files is not None:
        check_files(site.files, evaluated=config.evaluation.enabled)
    check_writable(site.state_folder)
    sharing = Sharing.of(config.strategy.sharing, config.train.lora_matrices)
    tasks, stages = tuple(config.data.tasks), config.strategy.stages
    layout = layout_of(config.model, tasks, sharing, stages=stages)
    personal = layout.personal_bytes if config.train.ditto.enabled else 0
    check_room(site.state_folder, layout.private_bytes + personal)


def check_files(files: SiteFiles, *, evaluated: bool) -> None:
    """Raise `ConfigError` unless all files and the image folder are readable.

    A run that evaluates also needs a test file.
    """
    if evaluated and not files.test:
        raise ConfigError(
            "`test-file` is missing in the node config; the run evaluates. A run with "
            "`evaluation.enabled=false` needs none."
        )
    for key, paths in (("train-file", files.train), ("test-file", files.test)):
        for path in paths:
            _check_file(path, key)
    if files.images is not None:
        _check_folder(files.images, "image-folder")


def check_writable(folder: Path) -> None:
    """Raise `ConfigError` unless a client's folder exists or can be created, and is writable."""
    probe = folder / f"{_PROBE}-{os.getpid()}"
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
            f"{human_bytes(needed)} ({needed} bytes): the private adapters of this client take "
            f"{human_bytes(size)}, {KEPT_STATES} versions are kept and one more is being written."
        )


def _named(folder: Path) -> str:
    return f"The client's own folder {str(folder)!r} (`state-folder`; in a simulation `run.folder`)"


def _check_file(path: Path, key: str) -> None:
    if not _is(path, key, stat.S_ISREG):
        raise ConfigError(f"`{key}` names {str(path)!r}, which is not a file.")
    if reason := _unreadable(path):
        raise ConfigError(f"`{key}` names {str(path)!r}, which cannot be read: {reason}.")


def _check_folder(path: Path, key: str) -> None:
    if not _is(path, key, stat.S_ISDIR):
        raise ConfigError(f"`{key}` names {str(path)!r}, which is not a folder.")
    try:
        with os.scandir(path) as entries:
            first = next((Path(e.path) for e in entries if e.is_file()), None)
    except OSError as error:
        raise ConfigError(
            f"`{key}` names {str(path)!r}, which cannot be listed: {error.strerror}."
        ) from None
    # Neither error quotes the name of an image.
    effective = os.access in os.supports_effective_ids
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=effective):
        raise ConfigError(f"`{key}` names {str(path)!r}, which cannot be entered (r and x).")
    if first is not None and (reason := _unreadable(first)):
        raise ConfigError(f"`{key}` names {str(path)!r}, whose files cannot be read: {reason}.")


def _is(path: Path, key: str, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(
            f"`{key}` names {str(path)!r}, which cannot be reached: {error.strerror}."
        ) from None


def _unreadable(path: Path) -> str | None:
    """Return the system's reason why a file cannot be read."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return error.strerror
    return None
