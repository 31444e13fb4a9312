"""Every setting with its default and range, composed from ``conf/`` and overrides."""

from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PilotConfig

__all__ = ["PilotConfig", "load_config"]
