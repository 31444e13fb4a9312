"""The folders of a run's checkpoints: which there are, which are kept, and what a kill left."""

import contextlib
import os
import re
import shutil
from pathlib import Path

KEPT_ROUNDS = 2
"""Checkpoints kept: the last one and the one before it."""

_NAME = re.compile(r"round-(\d{4,})(\.old)?")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, whole or not, the newest last."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("round-*"))
    found = [(int(name[1]), name[2] is None, path) for name, path in named if name]
    return [path for _, _, path in sorted(found)]


def exchange_of(folder: Path) -> int | None:
    """Return the exchange that a folder's name says, None if it is no checkpoint's name."""
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else None


def prune_checkpoints(folder: Path) -> None:
    """Remove all but the last `KEPT_ROUNDS`."""
    for old in checkpoint_folders(folder)[:-KEPT_ROUNDS]:
        discard(old)


def discard(folder: Path) -> None:
    """Remove a checkpoint; what is half removed has a name that no reader looks at."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a writer that was killed has left."""
    for leftover in folder.glob(".round-*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(leftover)
