"""A run's settings, some of them different now: where its data or its base model are.

Results do not depend on what may change here; `pilot_flwr.storage.run_identity` says what does.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from pilot_flwr.config import from_yaml
from pilot_flwr.errors import ConfigError
from pilot_flwr.federation_file import with_folder
from pilot_flwr.settings.pilot import PilotConfig


def changed(recorded: PilotConfig, text: str, overrides: Sequence[str]) -> PilotConfig:
    """Return the configuration with some settings changed; a new `data.folder` counts from here.

    Parameters
    ----------
    recorded : PilotConfig
        The run's.
    text : str
        The same as the run folder has it.
    overrides : sequence of str
        Each ``key=value``.

    Raises
    ------
    ConfigError
        An override is none, or its value is not allowed; names the first that is wrong.
    """
    groups = [f.name for f in fields(PilotConfig) if is_dataclass(getattr(recorded, f.name))]
    for word in overrides:
        key = word.partition("=")[0]
        if key in [*groups, "experiment"] or not key[:1].isalpha():
            raise ConfigError(
                f"{word!r} must be one setting, such as `data.folder=/new/place`: the groups of a "
                "run's settings are not chosen again."
            )
    try:
        config = from_yaml(text, overrides)
    except ConfigError as error:
        for word in overrides:  # the first that is wrong by itself
            try:
                from_yaml(text, [word])
            except ConfigError as own:
                raise ConfigError(f"{word!r}: {own}") from None
        raise error from None
    return with_folder(config, ())[0] if config.data.folder != recorded.data.folder else config
