"""A user's own federation, ``data=my-federation.yaml``, as overrides of the configuration.

Flower carries the configuration as one string of overrides, and a client must not read the
server's files; so the command line converts a YAML file into overrides. To add a setting, add it
to `pilot_flwr.config.data`.
"""

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from pilot_flwr.config.data import ALL, DataConfig
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import hydra_text, path_override
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError

_OPTION = "data="
_MISSING = "???"  # OmegaConf would leave the setting at its default

MOST_VALUES = 100_000
"""Values of a file, aliases expanded: a few lines of nested aliases would take hours."""

_KEYS = tuple(field.name for field in fields(DataConfig))
_DEFAULTS = {"source": "llava", "train_examples": ALL, "test_examples": ALL}


def expand(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which every ``data=FILE.yaml`` is replaced by the file's settings.

    Other overrides keep their place, so that a later one still changes a setting of the file. By
    default the source is ``llava`` and clients use all of their examples. The file's `folder` is
    relative to the file.

    Parameters
    ----------
    overrides : sequence of str
        Hydra overrides.

    Raises
    ------
    ConfigError
        A file cannot be read or does not describe a federation; names the file and the key.
    """
    expanded: list[str] = []
    for override in overrides:
        value = override.removeprefix(_OPTION)
        if override.startswith(_OPTION) and names_a_file(value):
            expanded += _file_overrides(value.strip("'\""))
        else:
            expanded.append(override)
    return expanded


def names_a_file(value: str) -> bool:
    """Return whether the value of ``data=`` is a file and not a choice of ``conf/data``."""
    return "/" in value or value.strip("'\"").endswith((".yaml", ".yml"))


def _file_overrides(name: str) -> list[str]:
    path = Path(os.path.abspath(_at_home(name, "`data`")))
    content = _DEFAULTS | _read(path, name)
    given = content.pop("folder", ".")
    if not isinstance(given, str) or not given.strip():
        what = "empty" if given in (None, "") else repr(given)
        raise ConfigError(
            f"{name}: `folder` is {what} but must be a folder; `.` is the file's own."
        )
    folder = _at_home(given, f"{name}: `folder`")
    overrides = [f"{_OPTION}digits"]  # Hydra needs a choice; the file's settings replace it
    for key, value in content.items():
        # A dictionary is added to: Hydra refuses a task's name as an unknown key otherwise.
        add = "+" if key == "files" else ""
        overrides.append(f"{add}data.{key}={_hydra(value, name, key)}")
    overrides.append(path_override("data.folder", Path(os.path.abspath(path.parent / folder))))
    try:
        load_config(shlex.join(overrides))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return overrides


def _at_home(text: str, key: str) -> Path:
    """Return a path with ``~`` or ``~user`` expanded."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key} is {text!r}, but that user has no home folder.") from None


def _check_values(root: Any) -> None:
    """Raise for a duplicate key, of which YAML takes the last, and for aliases that expand wide."""
    waiting, count = [root], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values, aliases expanded")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} comes twice", problem_mark=key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
                waiting.append(value)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        _check_values(yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"`data` is {name!r}, which cannot be read: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: the 31st of June
        raise ConfigError(f"`data` is {name!r}, which is not YAML: {error}") from None
    if not isinstance(content, dict) or "tasks" not in content:
        raise ConfigError(
            f"{name} must be settings with `tasks` at least; see docs/reference/data.md."
        )
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{name}: `{key}` must be one of {', '.join(_KEYS)}.")
    return content


def _hydra(value: Any, name: str, key: str) -> str:
    """Return a YAML value in Hydra's override grammar."""
    if isinstance(value, dict):
        for inner in value:
            if not isinstance(inner, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", inner):
                raise ConfigError(
                    f"{name}: {inner!r} in `{key}` must be letters, digits, '_' and '-' only."
                )
        pairs = [f"{k}:{_hydra(v, name, f'{key}.{k}')}" for k, v in value.items()]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_hydra(item, name, key) for item in value) + "]"
    if value is None:
        raise ConfigError(f"{name}: `{key}` is empty; give it a value, or leave it out.")
    if value == _MISSING:
        raise ConfigError(f"{name}: `{key}` is {value!r}, which stands for a missing value here.")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    return hydra_text(str(value))


def with_folder(config: PilotConfig, overrides: Sequence[str]) -> tuple[PilotConfig, list[str]]:
    """Return configuration and overrides with `data.folder` made absolute.

    Clients run in other working directories, where a relative folder would be another one.
    """
    data = config.data
    if data.source != "llava":
        return config, list(overrides)
    folder = os.path.abspath(_at_home(data.folder, "`data.folder`"))
    changed = [*overrides, path_override("data.folder", Path(folder))]
    return replace(config, data=replace(data, folder=folder)), changed
