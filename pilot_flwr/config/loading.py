"""The one source of configuration (design section 7): ``conf/`` and a string of overrides.

ServerApp, ClientApp, command line and tests all call `load_config` with the same string.
Types, defaults and ranges are in `pilot_flwr.config.schema`; to add a choice, add a YAML file
under ``conf/<group>/``.

A client gets that string from the server, so it is checked before Hydra composes anything: an
override sets settings to plain values or chooses a file of ``conf/``. What of Hydra reads
environment variables or other files is refused, on the command line as well, so that a string
which the user's machine takes is one that every client takes.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, YAMLError
from yaml import parse as yaml_events

from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError

__all__ = ["PilotConfig", "config_folder", "from_yaml", "load_config", "to_dict", "to_yaml"]
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
        An unknown key, a wrong type, a value out of range, text that is no override, or one
        that could read something else than ``conf/``.

    Notes
    -----
    Safe for a string from outside: nothing but the files of ``conf/`` is opened, no environment
    variable is read, and an error has nothing in it that is neither in the string nor in the
    package. Refused are interpolations (``${...}``), packages (``group@package``), keys of Hydra
    itself, deletions (``~key``), sweeps, and a group's choice that is none of its files.
    """
    try:
        arguments = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(
            f"The overrides {overrides!r} cannot be split into words: {error}."
        ) from None
    try:
        for override in OverridesParser.create().parse_overrides(arguments):
            _check_override(override)
        _store_schema()
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            composed = compose("config", overrides=arguments)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_readable(error)) from None
    except FrozenInstanceError as error:  # a key added with `+` that no dataclass has
        raise ConfigError(f"Unknown key in {overrides!r}: {error}.") from None
    assert isinstance(config, PilotConfig)
    return config


def _check_override(override: Override) -> None:
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
        if text == _MISSING:  # OmegaConf would take it as no value at all
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
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str, overrides: Sequence[str] = ()) -> PilotConfig:
    """Read back what `to_yaml` wrote; a setting that it does not have gets its default.

    Parameters
    ----------
    text : str
        YAML.
    overrides : sequence of str
        Each ``key=value``, applied on top.

    Raises
    ------
    ConfigError
        An unknown key, a wrong type, a value out of range, or text that is no such YAML.
    """
    try:
        changes = OmegaConf.from_dotlist([_pair(override) for override in overrides])
        schema = OmegaConf.structured(PilotConfig)
        _unlock(schema)
        _check_plain(text)
        config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(text), changes))
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise ConfigError(_readable(error)) from None
    if not isinstance(config, PilotConfig):
        raise ConfigError("It is YAML but not a configuration.")
    return config


def _check_plain(text: str) -> None:
    """Refuse YAML of which a few lines could fill the memory: no configuration needs it."""
    if len(text) > _LONGEST_YAML:
        raise ConfigError(f"It has more than {_LONGEST_YAML:,} characters.")
    depth = 0
    for event in yaml_events(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            raise ConfigError("It is YAML too deeply nested for a configuration.")
        if isinstance(event, AliasEvent):
            raise ConfigError("It has aliases (`*name`), which a configuration must not have.")


def to_dict(config: PilotConfig) -> dict[str, Any]:
    """Return `config` as nested plain dicts and lists."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _pair(override: str) -> str:
    if "=" not in override:
        raise ConfigError(f"The override {override!r} must be `key=value`.")
    return override


def _store_schema() -> None:
    schema = OmegaConf.structured(PilotConfig)
    _unlock(schema)
    ConfigStore.instance().store(name="schema", node=schema)


def _unlock(node: DictConfig) -> None:
    """Let Hydra merge into the nodes of frozen dataclasses, which OmegaConf makes read-only."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unlock(child)


def _readable(error: Exception) -> str:
    """Reduce Hydra's message to what the user can act on: the key, what came, what is allowed."""
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    lines: list[str] = []
    for cause in causes:
        for line in str(cause).splitlines():
            text = line.strip()
            if text and not text.startswith(("object_type", "reference_type", "To append")):
                lines.append(text.replace("full_key: ", "Key: "))
    return "\n".join(dict.fromkeys(lines))
