"""What a site demands of a run's differential privacy; the server is not trusted to keep it on.

The node config sets it (`pilot_flwr.client.node`), and what the site sets wins: a run that
asks for less is refused at the roster, and again at every order.

The Gaussian mechanism on a client's upload: clipping and noise, as pure functions.

What is released is the change Δ of Θ_a and Θ_l in one exchange, all their tensors as one vector::

    Δ       = (Θ_a, Θ_l) after training − (Θ_a, Θ_l) as the server sent them
    Δ̄       = Δ · min(1, C / ‖Δ‖₂)                      C: `privacy.clip_norm`
    release = sent + (Δ̄ + N(0, (z C)² I))               z: `privacy.noise_multiplier`

Two data sets of the client give two Δ̄ of norm C at most, which therefore differ by 2 C at most:
relative to that sensitivity the noise has the multiplier z / 2. How releases add up to (ε, δ) is
in `pilot_flwr.client.privacy_accountant`, and what this protects in docs/privacy.md.

The noise is made of the operating system's random bytes alone. A seed of the run would be no
secret, as the server knows it and could subtract the noise; and there is no generator whose state
could be worked out. So a private run cannot be repeated bit for bit.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pilot_flwr.config.schema import PrivacyConfig
from pilot_flwr.errors import ConfigError, TrainingError
from pilot_flwr.protocol import State


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


Normal = Callable[[int], NDArray[np.float64]]
"""Gives that many independent standard normal numbers."""

_Group = TypeVar("_Group", bound=str)
_CHUNK = 2**20

_ROUNDING = 1 - 1e-12
"""What a clipped vector is shorter than C by, so that float64 arithmetic does not exceed C."""


@dataclass(frozen=True)
class Clipping:
    """How an upload was clipped: ‖Δ‖₂ before, known to the client alone, and the factor."""

    norm: float
    factor: float


def system_normal(count: int) -> NDArray[np.float64]:
    """Return standard normal numbers made of the operating system's random bytes (Box–Muller).

    Parameters
    ----------
    count : int
        How many.

    Notes
    -----
    Every pair takes two uniform numbers of 53 random bits. No number is beyond 8.7; of true
    normal ones that share is 4e-18. Like every sampler in floating point it does not have
    all real numbers as values, see docs/privacy.md.
    """
    numbers = np.empty(count)
    for start in range(0, count, _CHUNK):
        part = numbers[start : start + _CHUNK]
        pairs = (len(part) + 1) // 2
        bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
        angle = 2.0 * math.pi * uniform[pairs:]
        part[:pairs] = radius * np.cos(angle)
        part[pairs:] = (radius * np.sin(angle))[: len(part) - pairs]
    return numbers


def release(
    trained: Mapping[_Group, State],
    sent: Mapping[_Group, State],
    *,
    clip_norm: float,
    noise_multiplier: float,
    normal: Normal = system_normal,
) -> tuple[dict[_Group, State], Clipping]:
    """Return what may leave a client instead of what it has trained.

    Parameters
    ----------
    trained, sent : mapping
        Group → its tensors, after training and as the server sent them; the same names and
        shapes. All of them together are the one vector that is clipped.
    clip_norm, noise_multiplier : float
        C and z, both above zero.
    normal : callable, optional
        Where the noise comes from; by default the operating system's entropy.

    Returns
    -------
    dict, Clipping
        Group → tensors with the types of `sent`, and how they were clipped.

    Raises
    ------
    TrainingError
        The change is not finite, so it has no norm to clip to.

    Notes
    -----
    Computed in float64. Clipped change and noise are added to each other first: whatever the
    server sent, all after that is post-processing of a noisy vector, rounding to the type on the
    wire included.
    """
    norm = change_norm(trained, sent)
    if not math.isfinite(norm):
        raise TrainingError("The change of the adapters in this exchange is not finite.")
    factor = min(1.0, clip_norm * _ROUNDING / norm) if norm > 0 else 1.0
    released = {
        group: {
            name: _noisy(tensor, sent[group][name], factor, noise_multiplier * clip_norm, normal)
            for name, tensor in state.items()
        }
        for group, state in trained.items()
    }
    return released, Clipping(norm, factor)


def change_norm(trained: Mapping[_Group, State], sent: Mapping[_Group, State]) -> float:
    """Return ‖Δ‖₂ over all tensors, in float64."""
    squares = 0.0
    for group, state in trained.items():
        assert state.keys() == sent[group].keys(), group
        for name, tensor in state.items():
            change = _change(tensor, sent[group][name])
            squares += float(torch.dot(change, change))
    return math.sqrt(squares) if squares >= 0 else math.nan


def _change(trained: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
    assert trained.shape == sent.shape
    return (trained.to(torch.float64) - sent.to(torch.float64)).flatten()


def _noisy(
    trained: torch.Tensor, sent: torch.Tensor, factor: float, deviation: float, normal: Normal
) -> torch.Tensor:
    noise = torch.from_numpy(normal(trained.numel())) * deviation
    noisy = noise.add_(_change(trained, sent), alpha=factor).view(trained.shape)
    return noisy.add_(sent.to(torch.float64)).to(sent.dtype)
