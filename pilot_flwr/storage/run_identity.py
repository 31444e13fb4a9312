"""Which run it is, and which settings its results depend on: they stay when it is resumed.

To let another setting change from one part of a run to the next, add it to `FREE`; it must not be
able to change a result.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pilot_flwr.config import PilotConfig, to_dict

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
