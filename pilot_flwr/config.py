"""The one source of configuration (design section 7): ``conf/`` and a string of overrides.

ServerApp, ClientApp, command line and tests all call `load_config` with the same string.
Types, defaults and ranges are in `pilot_flwr.settings`; to add a choice, add a YAML file
under ``conf/<group>/``.
"""

import shlex
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pilot_flwr.errors import ConfigError
from pilot_flwr.settings import PilotConfig

__all__ = ["PilotConfig", "config_folder", "from_yaml", "load_config", "to_dict", "to_yaml"]


def config_folder() -> Path:
    """Folder of the Hydra groups: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
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
        An unknown key, a wrong type, a value out of range, or text that is no override.
    """
    try:
        arguments = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(
            f"The overrides {overrides!r} cannot be split into words: {error}."
        ) from None
    try:
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
        config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(text), changes))
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise ConfigError(_readable(error)) from None
    if not isinstance(config, PilotConfig):
        raise ConfigError("It is YAML but not a configuration.")
    return config


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
