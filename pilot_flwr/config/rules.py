"""Checks of values that come from outside: each raises an error in the user's own words.

`key` is the field as the user typed it. To add a check, write one function that raises
`ConfigError` with the key, the value received and what is allowed.

Settings that only go together: what one of them needs of the others.

A method is a set of settings (conf/strategy/), and most of them combine freely. To add a pair that
does not, add a row to `RULES`.
"""

import json
import re
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from pilot_flwr.errors import ConfigError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Names that become file names, record keys and module names: run, task and client names."""

LONGEST_NAME = 64
"""Characters of such a name: with what is added to it, it is still a file name everywhere."""

_INFINITY = float("inf")


def at_least(key: str, value: float, minimum: float) -> None:
    """Raise unless `value` is finite and not below `minimum`."""
    if not minimum <= value < _INFINITY:
        finite = "" if value < minimum else " and finite"
        raise ConfigError(f"`{key}` is {value} but must be at least {minimum}{finite}.")


def at_most(key: str, value: float, maximum: float) -> None:
    """Raise unless `value` is finite and not above `maximum`."""
    if not -_INFINITY < value <= maximum:
        raise ConfigError(f"`{key}` is {value} but must be at most {maximum}.")


def positive(key: str, value: float) -> None:
    """Raise unless `value` is finite and above zero."""
    if not 0 < value < _INFINITY:
        raise ConfigError(f"`{key}` is {value} but must be above 0 and finite.")


def share(key: str, value: float) -> None:
    """Raise unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"`{key}` is {value} but must be at least 0 and below 1.")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise unless `value` is among `allowed`."""
    if value not in allowed:
        raise ConfigError(f"`{key}` is {value!r} but must be one of {', '.join(allowed)}.")


def check_name(key: str, value: str, *, longest: int = LONGEST_NAME) -> None:
    """Raise unless `value` can be a file name, a record key and a module name at once."""
    if len(value) > longest:
        raise ConfigError(
            f"`{key}` is {value[:20]!r}…, {len(value)} characters, but must have at most {longest}."
        )
    if not NAME_PATTERN.fullmatch(value):
        raise ConfigError(
            f"`{key}` is {value!r} but must be letters, digits, '_' and '-' only, "
            "beginning with a letter or digit."
        )


def expanded(key: str, path: str) -> Path:
    """Return `path` with ``~`` or ``~user`` written out; raise if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"`{key}` begins with '~' and the name of no user.") from None


class Rule(NamedTuple):
    """Settings, and what others must be if these are so."""

    given: dict[str, object]
    needed: dict[str, object]


_WHOLE = {"strategy.sharing.adapter": True, "strategy.sharing.lora": "AB"}
_ONE_CONNECTOR = {"strategy.stages": 1, "model.client_adapter": False}

RULES = (
    # One model for all clients, and nothing of it is any client's own.
    Rule(
        {"strategy.trained_by": "pooled"},
        {
            **_ONE_CONNECTOR,
            **_WHOLE,
            "strategy.adapters": "global",
            "strategy.lora": "global",
            "strategy.clients": 0,
            "train.ditto.enabled": False,
            "privacy.enabled": False,
        },
    ),
    # The personal model is a second one of what is sent, so all that is trained must be sent.
    Rule(
        {"train.ditto.enabled": True},
        {**_ONE_CONNECTOR, **_WHOLE, "strategy.trained_by": "clients"},
    ),
    # The products B A are needed, and their mean rather than a step towards it.
    Rule(
        {"strategy.lora": "exact"},
        {
            "strategy.sharing.lora": "AB",
            "strategy.server_optimizer.name": "none",
            "train.ditto.enabled": False,
        },
    ),
    # There is nothing to be drawn to, and nothing that leaves.
    Rule(
        {"strategy.sharing.adapter": False, "strategy.sharing.lora": "none"},
        {"train.proximal_weight": 0, "privacy.enabled": False},
    ),
)


def check_together(config: object) -> None:
    """Raise unless a configuration keeps to `RULES`.

    Raises
    ------
    ConfigError
        Names the setting, its value, what it must be, and because of what.
    """
    for given, needed in RULES:
        if any(attrgetter(name)(config) != value for name, value in given.items()):
            continue
        reason = " ".join(f"{name}={_text(value)}" for name, value in given.items())
        for name, value in needed.items():
            if (found := attrgetter(name)(config)) != value:
                raise ConfigError(
                    f"`{name}` is {_text(found)} but must be {_text(value)} with `{reason}`."
                )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
