"""What a site demands of a run's differential privacy; the server is not trusted to keep it on.

The node config sets it (`pilot_flwr.client.node_config`), and what the site sets wins: a run that
asks for less is refused at the roster, and again at every order.
"""

import math
from dataclasses import dataclass

from pilot_flwr.errors import ConfigError
from pilot_flwr.settings.privacy import PrivacyConfig


@dataclass(frozen=True)
class PrivacyDemands:
    """A site's own limits; without any, the run's settings hold as they are.

    Attributes
    ----------
    min_noise_multiplier : float
        Least `privacy.noise_multiplier`; 0 for no demand.
    max_clip_norm : float
        Largest `privacy.clip_norm`. It takes one of the other two beside it: noise has the size
        z C, so that a run with z next to 0 would be as good as exact.
    max_epsilon, delta : float
        Largest ε, at this δ, of all that the client ever released, over all runs.
    allow_metrics : bool
        Whether losses and scores, which the guarantee does not cover, may leave all the same.

    Raises
    ------
    ConfigError
        `max_clip_norm` stands alone.
    """

    min_noise_multiplier: float = 0.0
    max_clip_norm: float = math.inf
    max_epsilon: float = math.inf
    delta: float = 1e-5
    allow_metrics: bool = False

    def __post_init__(self) -> None:
        bounds_noise = self.min_noise_multiplier > 0 or self.max_epsilon < math.inf
        if self.max_clip_norm < math.inf and not bounds_noise:
            raise ConfigError(
                f"`max-clip-norm` is {self.max_clip_norm:g} but bounds no ε by itself, as the "
                "noise may be as small as the run likes: set `min-noise-multiplier` or "
                "`max-epsilon` beside it."
            )

    @property
    def any(self) -> bool:
        """Whether this site takes part in private runs only."""
        limits = (self.max_clip_norm, self.max_epsilon)
        return self.min_noise_multiplier > 0 or min(limits) < math.inf

    def check(self, privacy: PrivacyConfig) -> None:
        """Compare a run's settings with the demands.

        Raises
        ------
        ConfigError
            The run asks for less than this site demands.
        """
        if not self.any:
            return
        if not privacy.enabled:
            raise ConfigError(
                "`privacy.enabled` of the run is false but this site demands differential privacy "
                "(`min-noise-multiplier`, `max-clip-norm` or `max-epsilon` in its node config)."
            )
        if privacy.noise_multiplier < self.min_noise_multiplier:
            raise ConfigError(
                f"`privacy.noise_multiplier` of the run is {privacy.noise_multiplier:g} but this "
                f"site demands at least {self.min_noise_multiplier:g} (`min-noise-multiplier`)."
            )
        if privacy.clip_norm > self.max_clip_norm:
            raise ConfigError(
                f"`privacy.clip_norm` of the run is {privacy.clip_norm:g} but this site demands "
                f"at most {self.max_clip_norm:g} (`max-clip-norm`)."
            )
        if privacy.send_metrics and not self.allow_metrics:
            raise ConfigError(
                "`privacy.send_metrics` of the run is true but this site keeps losses and scores "
                "to itself; `allow-metrics=true` in its node config would let them leave."
            )

    def check_budget(self, epsilon_after: float) -> None:
        """Compare ε after one more release with the largest one.

        Raises
        ------
        ConfigError
            It would be exceeded.
        """
        if epsilon_after > self.max_epsilon:
            raise ConfigError(
                f"One more upload would bring this site to ε = {epsilon_after:.4g} at δ = "
                f"{self.delta:g}, over all its runs, but its `max-epsilon` is "
                f"{self.max_epsilon:g}: it takes no further part."
            )
