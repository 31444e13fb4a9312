"""Compose the configuration from ``conf/`` and a string of overrides; write and read it as YAML.

ServerApp, ClientApp, command line and tests all call `load_config` with the same string.
Types, defaults and ranges are in `pilot_flwr.config.schema`; to add a choice, add a YAML file
under ``conf/<group>/``.

A client gets that string from the server, so it is checked before Hydra composes anything: an
override sets settings to plain values or chooses a file of ``conf/``. Hydra's means of reading
environment variables or other files are refused, on the command line as well, so that every
client accepts whatever the user's machine accepts.
"""

import copy
import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:  # importing Hydra and OmegaConf takes half a second
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")

_INTERPOLATION = re.compile(r"(?<!\\)(\\\\)*\$\{")
r"""What OmegaConf evaluates; after an odd number of backslashes ``${`` is plain text to it."""

_MISSING = "???"
_LONGEST_YAML, _DEEPEST_YAML = 2**18, 20


def config_folder() -> Path:
    """Folder of the Hydra groups: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def load_config(overrides: str = "") -> PilotConfig:
    """Compose the configuration from ``conf/`` and Hydra overrides.

    Parameters
    ----------
    overrides : str
        Hydra overrides separated by blanks, quoted as in a shell, for instance
        ``"experiment=demo strategy.rounds=1"``.

    Returns
    -------
    PilotConfig
        Typed and validated.

    Raises
    ------
    ConfigError
        An unknown key, a wrong type, a value out of range, text that is not an override, or an
        override that could read anything but ``conf/``.

    Notes
    -----
    Safe for a string from outside: only the files of ``conf/`` are opened, no environment
    variable is read, and an error quotes only the string and the package. Refused are
    interpolations (``${...}``), packages (``group@package``), keys of Hydra itself, deletions
    (``~key``), sweeps, and a choice that its group does not have.
    """
    _store_schema()  # a sweep's worker starts every job without it
    return copy.deepcopy(_compose(overrides))


@functools.lru_cache(maxsize=32)  # Hydra takes 0.2 seconds, and a launch needs one string often
def _compose(overrides: str) -> PilotConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        arguments = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(
            f"The overrides {overrides!r} cannot be split into words: {error}."
        ) from None
    try:
        for override in OverridesParser.create().parse_overrides(arguments):
            _check_override(override)
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            composed = compose("config", overrides=arguments)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_readable(error)) from None
    except FrozenInstanceError as error:  # a key added with `+` that no dataclass has
        raise ConfigError(f"Unknown key in {overrides!r}: {error}.") from None
    assert isinstance(config, PilotConfig)
    return config


def _check_override(override: "Override") -> None:
    """Refuse what could read anything but ``conf/``, before it is composed."""
    word, key, value = override.input_line, override.key_or_group, override.value()
    if override.is_delete() or override.package is not None or not _KEY.fullmatch(key):
        raise ConfigError(f"The override {word!r} must be `key=value` or `+key=value`.")
    if override.is_sweep_override():
        raise ConfigError(f"The override {word!r} must give one value.")
    groups = {folder.name for folder in config_folder().iterdir() if folder.is_dir()}
    if key in groups and not isinstance(value, dict):
        choices = sorted(file.stem for file in (config_folder() / key).glob("*.yaml"))
        if value not in choices:
            raise ConfigError(f"`{key}` is {value!r} but must be one of {', '.join(choices)}.")
    elif key.split(".")[0] not in {field.name for field in fields(PilotConfig)}:
        raise ConfigError(f"Unknown key in {word!r}: there is no setting `{key}`.")
    for text in _texts(value):
        if _INTERPOLATION.search(text):
            raise ConfigError(
                f"`{key}` has {text!r} but must be a plain value: `${{...}}` is not evaluated."
            )
        if text == _MISSING:  # OmegaConf would treat it as a missing value
            raise ConfigError(f"`{key}` has {text!r} but must be another text.")


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in an override's value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif not isinstance(value, bool | int | float | None):
        raise ConfigError(f"A value is {value!r} but must be text, a number, a list or a mapping.")


def to_yaml(config: PilotConfig) -> str:
    """Return `config` as YAML, every value resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: PilotConfig) -> dict[str, Any]:
    """Return `config` as nested plain dicts and lists."""
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def from_yaml(text: str, overrides: Sequence[str] = ()) -> PilotConfig:
    """Read the YAML that `to_yaml` wrote; a setting that it lacks gets its default.

    Parameters
    ----------
    text : str
        YAML.
    overrides : sequence of str
        Each ``key=value``, applied on top.

    Raises
    ------
    ConfigError
        An unknown key, a wrong type, a value out of range, or text that is not a configuration.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"The override {override!r} must be `key=value`.")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
        _check_plain(text)
        config = OmegaConf.to_object(OmegaConf.merge(_schema(), OmegaConf.create(text), changes))
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise ConfigError(_readable(error)) from None
    if not isinstance(config, PilotConfig):
        raise ConfigError("It is YAML but not a configuration.")
    return config


def _check_plain(text: str) -> None:
    """Refuse YAML of which a few lines could fill the memory: no configuration needs it."""
    import yaml

    if len(text) > _LONGEST_YAML:
        raise ConfigError(f"It has more than {_LONGEST_YAML:,} characters.")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            raise ConfigError("It is YAML too deeply nested for a configuration.")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError("It has aliases (`*name`), which a configuration must not have.")


def _store_schema() -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:
        store.store(name="schema", node=_schema())


@functools.cache
def _schema() -> "DictConfig":
    """Return the defaults as OmegaConf nodes that can be merged with, not into.

    OmegaConf makes the nodes of frozen dataclasses read-only, which Hydra cannot merge.
    """
    from omegaconf import DictConfig, OmegaConf

    def unlock(node: DictConfig) -> None:
        OmegaConf.set_readonly(node, None)
        for key in node:
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                unlock(child)

    schema: DictConfig = OmegaConf.structured(PilotConfig)
    unlock(schema)
    return schema


def _readable(error: Exception) -> str:
    """Reduce Hydra's message to what the user can act on: the key, the value, what is allowed."""
    causes = [error]
    while isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    lines: list[str] = []
    for cause in causes:
        for line in str(cause).splitlines():
            text = line.strip()
            if text and not text.startswith(("object_type", "reference_type", "To append")):
                lines.append(text.replace("full_key: ", "Key: "))
    return "\n".join(dict.fromkeys(lines))
