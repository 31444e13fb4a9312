"""Which code a run was made by: commit and versions, written into its folder at the start.

``code.json`` of a run folder::

    {"commit": "…", "changed": false, "versions": {"python": "3.11.7", "torch": "…", …}}

A run that goes on under other code than it began with has that of each time in ``resumed_with``.

Flower runs the app from a copy that has no history, so the launcher writes the file where it can
see the checkout; a ServerApp that finds none writes what it knows itself.
"""

import functools
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pilot_flwr.storage.tensors import write_text

CODE = "code.json"
"""File of a run folder."""

PACKAGES = ("pilot-flwr", "flwr", "ray", "torch", "transformers", "peft", "numpy", "scikit-learn")
"""Distributions that a result may depend on."""

_PATHS = ("pilot_flwr", "conf", "pyproject.toml")


def provenance(checkout: Path | None = None) -> dict[str, Any]:
    """Return commit and versions of the running code.

    Parameters
    ----------
    checkout : Path, optional
        The repository; by default that which this package is in.

    Returns
    -------
    dict
        ``commit``: 40 hex digits, None outside a git checkout. ``changed``: whether the package,
        ``conf`` or ``pyproject.toml`` differ from it, None if unknown. ``versions``: by
        distribution, None if it is not installed.
    """
    root = checkout or Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", *_PATHS)
    return {
        "commit": commit,
        "changed": None if commit is None or changed is None else bool(changed),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
    }


def keep_provenance(folder: Path) -> None:
    """Write `CODE` into a run folder; into one that is there, what differs from its last entry."""
    now = _of_this_process()
    if not (folder / CODE).exists():
        content = now
    else:
        content = read_provenance(folder)
        later = content.setdefault("resumed_with", []) if content else []
        last = later[-1] if later else content
        if not content or now["commit"] is None or all(last.get(k) == now[k] for k in now):
            return
        later.append(now)
    write_text(folder / CODE, json.dumps(content, indent=2) + "\n")


@functools.cache
def _of_this_process() -> dict[str, Any]:
    """Return what `provenance` says when first asked: a commit made later is not what runs."""
    return provenance()


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what `CODE` of a run folder says; empty if there is none that can be read."""
    try:
        content = json.loads((folder / CODE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git says, None without git or where `root` itself is no checkout."""
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(  # nosec B603 B607  # no shell; the user's own git
            ["git", "-C", str(root), *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
