"""Record the code and the settings that a run's results depend on, and compare them on resume.

``code.json`` of a run folder::

    {"commit": "…", "changed": false, "versions": {"python": "3.11.7", "torch": "…", …}}

Resuming a run under other code appends that code to ``resumed_with``. Flower runs the app from a
copy without git history, so the launcher writes the file, which sees the checkout; a ServerApp
writes it only if it is missing.

To let another setting change on resume, add it to `FREE`; it must not affect any result.
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

from pilot_flwr.config.loading import config_folder, to_dict
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.run.atomic import read_json, write_text

CODE = "code.json"
"""Name of the file in a run folder."""

PACKAGES = ("pilot-flwr", "flwr", "ray", "torch", "transformers", "peft", "numpy", "scikit-learn")
"""Distributions that results may depend on."""

_PATHS = ("pilot_flwr", "conf", "pyproject.toml")


@functools.lru_cache(maxsize=1)
def code_hash() -> str:
    """Return a hash of this package's code and configuration files."""
    package = Path(__file__).resolve().parent.parent
    files = {path.relative_to(package): path for path in package.rglob("*.py")}
    files |= {
        Path("conf") / path.relative_to(config_folder()): path
        for path in config_folder().rglob("*.yaml")
    }
    lines = (f"{name.as_posix()} {digest(files[name].read_text('utf-8'))}" for name in files)
    return digest(sorted(lines))


def digest(value: Any) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def provenance(checkout: Path | None = None) -> dict[str, Any]:
    """Return commit and versions of the running code, by default of this package's checkout.

    ``changed`` says whether the package, ``conf`` or ``pyproject.toml`` differ from the commit.
    Unknown values are None, such as the commit outside a git checkout.
    """
    root = checkout or Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", *_PATHS)
    return {
        "commit": commit,
        "changed": None if commit is None or changed is None else bool(changed),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of `PACKAGES`, None for one that is not installed."""
    return {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES}


def keep_provenance(folder: Path) -> None:
    """Write `CODE` into a run folder; if it exists and the code differs, append to it."""
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
    """Return `provenance`, cached: a commit made later is not what runs."""
    return provenance()


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the content of `CODE` in a run folder, empty if it cannot be read."""
    return read_json(folder / CODE)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output; None without git, or if `root` itself is not a checkout."""
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
    "strategy.min_available_nodes",
    "strategy.max_examples",
    "strategy.client_keys",
    "strategy.wait_seconds",
    "strategy.round_timeout_seconds",
    "strategy.close_after",
    "train.log_every_seconds",
    "data.workers",
)
"""Settings and groups of settings that do not affect results."""

ROUNDS = "strategy.rounds"
"""May be increased, to train the run further, unless `train.schedule` covers the run."""

_ABSENT = object()


@dataclass(frozen=True)
class RunIdentity:
    """A run's name, by which clients find their private state, and its `settings_hash`."""

    name: str = ""
    settings: str = ""


def settings_hash(config: PilotConfig) -> str:
    """Return a hash of the settings that affect results, except `strategy.rounds`."""
    fixed = {key: value for key, value in _fixed(config).items() if key != ROUNDS}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(recorded: PilotConfig, config: PilotConfig) -> list[str]:
    """Return one line per setting that prevents resuming a recorded run with `config`."""
    before, now = _fixed(recorded), _fixed(config)
    grows = config.train.schedule == "exchange"
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if key == ROUNDS and grows and new >= old:
            continue
        if old != new or type(old) is not type(new):
            shown = ["not set" if value is _ABSENT else repr(value) for value in (new, old)]
            must = "must not be below" if key == ROUNDS and grows else "was"
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
