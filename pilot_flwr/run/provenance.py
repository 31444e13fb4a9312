"""Which code a run was made by: commit and versions, written into its folder at the start.

``code.json`` of a run folder::

    {"commit": "…", "changed": false, "versions": {"python": "3.11.7", "torch": "…", …}}

A run that goes on under other code than it began with has that of each time in ``resumed_with``.

Flower runs the app from a copy that has no history, so the launcher writes the file where it can
see the checkout; a ServerApp that finds none writes what it knows itself.

Which run it is, and which settings its results depend on: they stay when it is resumed.

To let another setting change from one part of a run to the next, add it to `FREE`; it must not be
able to change a result.
"""

import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pilot_flwr.config.loading import to_dict
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.run.atomic import write_text

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


FREE = (
    "simulation",
    "run",
    "resume",
    "strategy.min_replies",
    "strategy.below_minimum",
    "strategy.wait_seconds",
    "strategy.round_timeout_seconds",
    "train.log_every_seconds",
    "data.workers",
)
"""Settings, and groups of them, that cannot change a result."""

ROUNDS = "strategy.rounds"
"""May grow: then the run trains on."""

_ABSENT = object()


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to.

    Attributes
    ----------
    name : str
        The run's name, by which clients find their private states.
    settings : str
        Hash of the settings on which its results depend.
    """

    name: str = ""
    settings: str = ""


def settings_hash(config: PilotConfig) -> str:
    """Return a hash of the settings that a run's results depend on, `strategy.rounds` aside."""
    fixed = {key: value for key, value in _fixed(config).items() if key != ROUNDS}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(recorded: PilotConfig, config: PilotConfig) -> list[str]:
    """Say which settings keep a run from being resumed with `config`.

    Parameters
    ----------
    recorded : PilotConfig
        The run's.
    config : PilotConfig
        Those given now.

    Returns
    -------
    list of str
        Field and both values of each; empty if the run can be resumed.
    """
    before, now = _fixed(recorded), _fixed(config)
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if key == ROUNDS and new >= old:
            continue
        if old != new or type(old) is not type(new):
            shown = ["not set" if value is _ABSENT else repr(value) for value in (new, old)]
            must = "must not be below" if key == ROUNDS else "was"
            found.append(f"`{key}` is {shown[0]} but {must} {shown[1]} in the run.")
    return found


def _fixed(config: PilotConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in _flat(to_dict(config))
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
