"""Settings of client-level differential privacy; what they mean is in docs/privacy.md."""

from dataclasses import dataclass

from pilot_flwr.checks import at_least, at_most, positive, share

LEAST_NOISE, MOST_NOISE = 1e-6, 1e6
"""Range of `privacy.noise_multiplier`: at either end one upload's ε, at δ = 1e-5, is 2e12 or 0."""


@dataclass(frozen=True)
class PrivacyConfig:
    """Client-level differential privacy: each client clips its upload and adds noise itself.

    The change of Θ_a and Θ_l that a client uploads is clipped, as one vector, to L2 norm
    `clip_norm`; then Gaussian noise of standard deviation `noise_multiplier` × `clip_norm` is
    added to every number of it; `noise_multiplier` is `LEAST_NOISE` at least and `MOST_NOISE` at
    most. `delta` is the δ for which ε is reported. Losses and scores are
    exact functions of the client's data and are outside that guarantee: with
    `send_metrics` false no client sends any.
    """

    enabled: bool = False
    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    send_metrics: bool = False

    def __post_init__(self) -> None:
        positive("privacy.clip_norm", self.clip_norm)
        at_least("privacy.noise_multiplier", self.noise_multiplier, LEAST_NOISE)
        at_most("privacy.noise_multiplier", self.noise_multiplier, MOST_NOISE)
        positive("privacy.delta", self.delta)
        share("privacy.delta", self.delta)

    @property
    def withholds_metrics(self) -> bool:
        """Whether losses and scores stay at the client."""
        return self.enabled and not self.send_metrics
