"""Record the code and the settings that a run's results depend on, and compare them on resume.

``code.json`` of a run folder::

    {"commit": "…", "changed": false, "versions": {"python": "3.11.7", "torch": "…", …}}

A run that is resumed under other code has that of each resumption in ``resumed_with``. Flower runs
the app from a copy without history, so the launcher writes the file where it can see the checkout;
a ServerApp that finds none writes what it knows itself.

To let another setting change on resume, add it to `FREE`; it must not be able to change a result.
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
    """Return commit and versions of the running code, by default of this package's checkout.

    ``commit`` is None outside a git checkout, ``changed`` (whether the package, ``conf`` or
    ``pyproject.toml`` differ from it) if unknown, a version if its distribution is not installed.
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
    """Write `CODE` into a run folder; append to one that is there if the code has changed."""
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
    """Cache `provenance`: a commit made later is not what runs."""
    return provenance()


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the content of `CODE` in a run folder, empty if there is none that can be read."""
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
    """Return git's answer, None without git or where `root` itself is not a checkout."""
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
"""Settings, and groups of settings, that cannot change a result."""

ROUNDS = "strategy.rounds"
"""May grow: then the run is trained further."""

_ABSENT = object()


@dataclass(frozen=True)
class RunIdentity:
    """A run's name, by which clients find their private states, and its `settings_hash`."""

    name: str = ""
    settings: str = ""


def settings_hash(config: PilotConfig) -> str:
    """Return a hash of the settings that a run's results depend on, `strategy.rounds` aside."""
    fixed = {key: value for key, value in _fixed(config).items() if key != ROUNDS}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(recorded: PilotConfig, config: PilotConfig) -> list[str]:
    """Return which settings keep a recorded run from being resumed with `config`, a line each."""
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
