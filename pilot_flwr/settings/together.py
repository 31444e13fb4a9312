"""Settings that only go together: what one of them needs of the others.

A method is a set of settings (conf/strategy/), and most of them combine freely. To add a pair that
does not, add a row to `RULES`.
"""

import json
from operator import attrgetter
from typing import NamedTuple

from pilot_flwr.errors import ConfigError


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
