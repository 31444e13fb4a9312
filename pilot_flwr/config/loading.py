"""Compose the configuration from ``conf/`` and a string of overrides; write and read it as YAML.

ServerApp, ClientApp and command line all call `load_config` with the same string. Types, defaults
and ranges are in `pilot_flwr.config.schema`; to add a choice, add a file ``conf/<group>/*.yaml``.

A client gets that string from the server, so it is checked before Hydra composes anything: an
override sets a setting to a plain value or chooses a file of ``conf/``. Hydra's ways to read
environment variables or other files are refused. The command line refuses them too, so that
clients accept every configuration that it accepts. A recorded configuration (`from_yaml`) is input
as well: ``${...}`` in it is text, never evaluated.

A text setting takes its value as typed, ``model.path=/a/epoch=9(1)``, also where Hydra's grammar
would need quotes (`quoted`).
"""

import copy
import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from pilot_flwr.config.rules import idle, one_of
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:  # importing Hydra and OmegaConf takes half a second
    from hydra.core.override_parser.types import Override
    from omegaconf import Container, DictConfig

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")

_INTERPOLATION = re.compile(r"(?<!\\)(\\\\)*\$\{")
r"""OmegaConf evaluates ``${``, except after an odd number of backslashes."""

MISSING = "???"
"""OmegaConf's mark of a missing value: it would leave the setting at its default."""

_LONGEST_YAML, _DEEPEST_YAML = 2**18, 20

_REMOVED: dict[tuple[str, str], Any] = {
    ("data", "shift"): {"rotation": 0.0, "mirrored": False},
    ("train", "ditto"): {"enabled": False, "weight": 0.1},
}
"""Settings that only earlier versions have, with the value that has no effect."""

MOST_VALUES = 100_000
"""Values of a file, aliases expanded: a few lines of nested aliases would take hours."""


def config_folder() -> Path:
    """Return ``conf/``: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def load_config(overrides: str = "") -> PilotConfig:
    """Compose the configuration from ``conf/`` and Hydra overrides.

    Overrides are separated by blanks and quoted as in a shell: ``experiment=demo seed=1``.

    Raises
    ------
    ConfigError
        An unknown key, a wrong type, a value out of range, text that is not an override, or an
        override that could read anything but ``conf/``.

    Notes
    -----
    Safe for an untrusted string: only files of ``conf/`` are opened, no environment variable is
    read, and an error quotes only the string and the package. It refuses interpolations
    (``${...}``), packages (``group@package``), keys of Hydra itself, deletions (``~key``), sweeps,
    and choices that do not exist.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if "schema.yaml" not in store.repo:  # as at the start of every job of a sweep
        store.store(name="schema", node=_schema())
    return copy.deepcopy(_compose(overrides))


@functools.lru_cache(maxsize=32)  # a launch needs one string often
def _compose(overrides: str) -> PilotConfig:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        arguments = [quoted(argument) for argument in shlex.split(overrides)]
    except ValueError as error:
        raise ConfigError(f"The overrides {overrides!r} cannot be split: {error}.") from None
    try:
        parsed = OverridesParser.create().parse_overrides(arguments)
        for override in parsed:
            _check_override(override)
        choices = tuple(override.input_line for override in parsed if _is_choice(override))
        composed = copy.deepcopy(_compose_choices(choices))
        for override in parsed:
            if not _is_choice(override):
                _set(composed, override)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_readable(error)) from None
    except FrozenInstanceError as error:  # a key added with `+` that no dataclass has
        raise ConfigError(f"Unknown key in {overrides!r}: {error}.") from None
    assert isinstance(config, PilotConfig)
    return config


@functools.lru_cache(maxsize=32)  # 0.1 seconds; a sweep's jobs mostly choose the same files
def _compose_choices(choices: tuple[str, ...]) -> "DictConfig":
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        return compose("config", overrides=list(choices))


@functools.cache
def _groups() -> frozenset[str]:
    return frozenset(folder.name for folder in config_folder().iterdir() if folder.is_dir())


def _is_choice(override: "Override") -> bool:
    """Return whether an override chooses a file of ``conf/``, rather than setting a value."""
    return override.key_or_group in _groups() and not isinstance(override.value(), dict)


def _set(config: "Container", override: "Override") -> None:
    """Set the value of an override as Hydra does: ``+`` and ``++`` may add a key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    word, key, value = override.input_line, override.key_or_group, override.value()
    add = override.is_add() or override.is_force_add()
    try:
        if override.is_add() and not isinstance(value, dict | list):
            if OmegaConf.select(config, key) is not None:
                raise ConfigError(f"`{key}` has a value already: remove the `+` of {word!r}.")
        OmegaConf.update(config, key, value, force_add=add)
    except OmegaConfBaseException as error:
        raise ConfigError(f"The override {word!r} is wrong. {_readable(error)}") from None


def _check_override(override: "Override") -> None:
    """Raise unless an override sets a plain value or chooses a file of ``conf/``."""
    word, key, value = override.input_line, override.key_or_group, override.value()
    if override.is_delete() or override.package is not None or not _KEY.fullmatch(key):
        raise ConfigError(f"The override {word!r} must be `key=value` or `+key=value`.")
    if override.is_sweep_override():
        raise ConfigError(f"The override {word!r} must give one value.")
    if _is_choice(override):
        one_of(key, value, sorted(file.stem for file in (config_folder() / key).glob("*.yaml")))
    elif key.split(".")[0] not in {field.name for field in fields(PilotConfig)}:
        raise ConfigError(f"Unknown key in {word!r}: there is no setting `{key}`.")
    for text in _texts(value):
        if _INTERPOLATION.search(text):
            raise ConfigError(f"`{key}` has {text!r} but must be a plain value, not `${{...}}`.")
        if text == MISSING:
            raise ConfigError(f"`{key}` has {text!r} but must be another text.")


def idle_overrides(overrides: Sequence[str], config: PilotConfig) -> dict[str, str]:
    """Return the overrides that have no effect in `config`, each with the reason.

    Settings in the files of ``conf/`` are not checked: they may serve several methods.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = {}
    for text in overrides:
        override = OverridesParser.create().parse_override(quoted(text))
        for setting in _settings(override.key_or_group, override.value()):
            if reason := idle(setting, config):
                found[text] = reason
                break
    return found


def check_effect(overrides: Sequence[str], config: PilotConfig) -> None:
    """Raise `ConfigError` for an override that has no effect in `config`."""
    for reason in idle_overrides(overrides, config).values():
        raise ConfigError(reason)


def _settings(key: str, value: Any) -> Iterator[str]:
    """Yield the names of the settings that an override sets; none if it chooses a config file."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _settings(f"{key}.{name}", inner)
    elif "." in key:
        yield key


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in an override's value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif not isinstance(value, bool | int | float | None):
        raise ConfigError(f"A value is {value!r} but must be text, a number, a list or a mapping.")


def quoted(override: str, *, sweep: bool = False) -> str:
    """Return an override in Hydra's grammar: with quotes where a text setting needs them.

    In a sweep, commas and functions of a text setting separate its values; elsewhere they are text.

    Raises
    ------
    ConfigError
        Hydra cannot parse the override, and its value is not one text.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    is_text = bool(equals) and _is_text(key.lstrip("+")) and "${" not in value
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError):
        if is_text and not (sweep and "," in value):
            return f"{key}={hydra_text(value)}"
        if not equals:
            raise ConfigError(f"The override {override!r} must be `key=value`.") from None
        raise ConfigError(
            f"The override {override!r} cannot be parsed. Put each text in it that has any of "
            f"()[]{{}},:=\\'\" in single quotes, and the override in the shell's double quotes: "
            f"\"{key}='a (1)'\"."
        ) from None
    found: Any = parsed.value()
    if parsed.is_sweep_override():
        as_typed = not sweep and getattr(found, "simple_form", False)
    else:
        as_typed = isinstance(found, bool | int | float | list | dict)
    return f"{key}={hydra_text(value)}" if is_text and as_typed else override


def _is_text(key: str) -> bool:
    """Return whether a setting takes one text."""
    kind: Any = PilotConfig
    for part in key.split("."):
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return kind is str


def hydra_text(text: str) -> str:
    r"""Return `text` in Hydra's quotes.

    There a quote is written ``\'`` and a backslash escapes only a quote or backslashes before one;
    OmegaConf reads ``\${`` as a plain ``${``.
    """
    text = re.sub(r"(\\+)('|$)", r"\1\1\2", _escaped(text)).replace("'", r"\'")
    return f"'{text}'"


def _escaped(value: Any) -> Any:
    r"""Write ``${`` in a value's texts as ``\${``, which OmegaConf reads as plain text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


def to_yaml(config: PilotConfig) -> str:
    """Return `config` as YAML."""
    import yaml

    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def to_dict(config: PilotConfig) -> dict[str, Any]:
    """Return `config` as nested plain dicts and lists."""
    return asdict(config)


def from_yaml(text: str, overrides: Sequence[str] = ()) -> PilotConfig:
    """Read the YAML that `to_yaml` wrote, then apply overrides ``key=value``.

    A setting that the YAML lacks gets its default; one that an earlier version wrote and that had
    no effect is ignored. ``${...}`` is text: a received run folder must
    not read this machine's environment.

    Raises
    ------
    ConfigError
        An unknown key, a wrong type, a value out of range, text that is not a configuration, or an
        override that `load_config` would refuse.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = _without_removed(_read_plain(text) or {})
        merged = OmegaConf.merge(_schema(), _escaped(values))
        for override in overrides:
            _set(merged, _parsed(override))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise ConfigError(_readable(error)) from None
    except FrozenInstanceError as error:
        raise ConfigError(f"Unknown key in {list(overrides)!r}: {error}.") from None
    if not isinstance(config, PilotConfig):
        raise ConfigError("It is YAML but not a configuration.")
    return config


def _parsed(override: str) -> "Override":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(quoted(override))
    _check_override(parsed)
    return parsed


def _read_plain(text: str) -> Any:
    """Read YAML; refuse what could fill the memory: long, deeply nested, or with aliases."""
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
    check_yaml(yaml.compose(text, Loader=yaml.SafeLoader))
    values = yaml.safe_load(text)
    for found in _texts_of(values):
        if found == MISSING:
            raise ConfigError(f"It has {MISSING!r}, which stands for a missing value.")
    return values


def _without_removed(values: Any) -> Any:
    for (section, name), unused in _REMOVED.items():
        settings = values.get(section) if isinstance(values, dict) else None
        if isinstance(settings, dict) and settings.get(name) == unused:
            del settings[name]
    return values


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(inner)
    elif isinstance(value, str):
        yield value


def check_yaml(root: Any) -> None:
    """Raise for a duplicate key, of which YAML takes the last, and for too many values."""
    import yaml

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


@functools.cache
def _schema() -> "DictConfig":
    """Return the defaults as OmegaConf nodes.

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
    """Reduce Hydra's message to key, value and what is allowed."""
    causes = [error]
    while isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    lines = (line.strip() for cause in causes for line in str(cause).splitlines())
    noise = ("object_type", "reference_type", "To append")
    kept = (line.replace("full_key: ", "Key: ") for line in lines if not line.startswith(noise))
    return "\n".join(dict.fromkeys(filter(None, kept)))
