"""The Gaussian mechanism on a client's upload: clipping and noise, as pure functions.

The release is the change Δ of Θ_a and Θ_l in one exchange, all their tensors as one vector::

    Δ       = (Θ_a, Θ_l) after training − (Θ_a, Θ_l) as the server sent them
    Δ̄       = Δ · min(1, C / ‖Δ‖₂)                      C: `privacy.clip_norm`
    release = sent + (Δ̄ + N(0, (z C)² I))               z: `privacy.noise_multiplier`

Both Δ̄ of two data sets have a norm of at most C, so they differ by at most 2 C: relative to that
sensitivity, the noise multiplier is z / 2. `pilot_flwr.client.privacy_accountant` adds releases up
to (ε, δ); docs/how-to/privacy.md explains what this protects.

The noise comes from the operating system's random bytes alone. The server knows the run's seed and
could subtract noise drawn from it, and the state of a generator might be inferred. So a private run
cannot be repeated bit for bit.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

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


class Clipping(NamedTuple):
    """‖Δ‖₂ before clipping, which only the client knows, and the factor applied."""

    norm: float
    factor: float


def system_normal(count: int) -> NDArray[np.float64]:
    """Return standard normal numbers, from the operating system's random bytes (Box–Muller).

    Every pair takes two uniform numbers of 53 random bits, so none exceeds 8.7; of true normal
    numbers, 4e-18 do. Limits of sampling in floating point: docs/how-to/privacy.md.
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
    """Clip and noise the upload of a client; return it in the types of `sent`.

    `trained` and `sent` map groups to tensors of the same names and shapes, clipped together as one
    vector. Raises `TrainingError` if the change is not finite.

    Computed in float64. The noise is added to the clipped change before anything else, so all later
    steps, including rounding to the wire's type, only post-process a noisy vector.
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
