"""The Gaussian mechanism on a client's upload: clipping and noise, as pure functions.

What is released is the change Δ of Θ_a and Θ_l in one exchange, all their tensors as one vector::

    Δ       = (Θ_a, Θ_l) after training − (Θ_a, Θ_l) as the server sent them
    Δ̄       = Δ · min(1, C / ‖Δ‖₂)                      C: `privacy.clip_norm`
    release = sent + (Δ̄ + N(0, (z C)² I))               z: `privacy.noise_multiplier`

Two data sets of the client give two Δ̄ of norm C at most, which therefore differ by 2 C at most:
relative to that sensitivity the noise has the multiplier z / 2. How releases add up to (ε, δ) is
in `pilot_flwr.client.privacy_account`, and what this protects in docs/privacy.md.

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

from pilot_flwr.errors import TrainingError
from pilot_flwr.model.parameters import State

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
