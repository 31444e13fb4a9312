"""The Gaussian mechanism on a client's upload: clipping and noise, as pure functions.

The release is the change Δ of Θ_a and Θ_l in one exchange, all their tensors as one vector::

    Δ       = (Θ_a, Θ_l) after training − (Θ_a, Θ_l) as the server sent them
    Δ̄       = Δ · min(1, C / ‖Δ‖₂)                      C: `privacy.clip_norm`
    release = sent + (Δ̄ + N(0, (z C)² I))               z: `privacy.noise_multiplier`

Two data sets of the client give two Δ̄ of norm C at most, which therefore differ by 2 C at most:
relative to that sensitivity the noise has the multiplier z / 2.
`pilot_flwr.client.privacy_accountant` adds releases up to (ε, δ); docs/how-to/privacy.md says what
this protects.

The noise is made only of the operating system's random bytes. A seed of the run would be no
secret: the server knows it and could subtract the noise. There is no generator whose state could
be inferred, either. So a private run cannot be repeated bit for bit.
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
from pilot_flwr.protocol import State

Normal = Callable[[int], NDArray[np.float64]]
"""Returns that many independent standard normal numbers."""

_Group = TypeVar("_Group", bound=str)
_CHUNK = 2**20

_ROUNDING = 1 - 1e-12
"""Factor on C when clipping, so that float64 rounding does not exceed C."""


@dataclass(frozen=True)
class Clipping:
    """How an upload was clipped: ‖Δ‖₂ before, known only to the client, and the factor."""

    norm: float
    factor: float


def system_normal(count: int) -> NDArray[np.float64]:
    """Return standard normal numbers made of the operating system's random bytes (Box–Muller).

    Every pair takes two uniform numbers of 53 random bits. No number exceeds 8.7; of true
    normal ones, 4e-18 do. Like every sampler in floating point it does not have all real
    numbers as values, see docs/how-to/privacy.md.
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
    """Return what may leave a client instead of what it has trained, in the types of `sent`.

    `trained` and `sent` map groups to tensors, of the same names and shapes; all of them together
    are the one vector that is clipped. Raises `TrainingError` if the change is not finite.

    Computed in float64. Clipped change and noise are added to each other first: everything after
    that, what the server sent and rounding to the wire's type included, is post-processing of a
    noisy vector.
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
