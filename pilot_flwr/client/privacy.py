"""The Gaussian mechanism on a client's upload: clipping and noise, as pure functions.

The release is the change Δ of Θ_a and Θ_l in one exchange, all their tensors as one vector::

    Δ       = (Θ_a, Θ_l) after training − (Θ_a, Θ_l) as the server sent them
    Δ̄       = Δ · min(1, C / N)                         C: `privacy.clip_norm`, N ≥ ‖Δ‖₂
    release = sent + (Δ̄ + N(0, (z C)² I))               z: `privacy.noise_multiplier`

N is ‖Δ‖₂ plus a bound on its rounding errors (`clipping_factor`). Both Δ̄ of two data sets have a
norm of at most C, so they differ by at most 2 C: relative to that sensitivity, the noise multiplier
is z / 2. `pilot_flwr.client.privacy_accountant` adds releases up
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

from pilot_flwr.config.schema import LEAST_CLIP
from pilot_flwr.errors import TrainingError
from pilot_flwr.protocol import State

Normal = Callable[[int], NDArray[np.float64]]
"""Returns that many independent standard normal numbers."""

_Group = TypeVar("_Group", bound=str)
_CHUNK = 2**20

_UNIT = 2.0**-53
"""u: largest relative error of one float64 operation that does not underflow."""

_TINY = 2.0**-1022
"""Bound on the absolute error of a float64 product that underflows, flushed to zero or not."""


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
    numbers = sum(tensor.numel() for state in trained.values() for tensor in state.values())
    factor = clipping_factor(norm, numbers, clip_norm)
    released = {
        group: {
            name: _noisy(tensor, sent[group][name], factor, noise_multiplier * clip_norm, normal)
            for name, tensor in state.items()
        }
        for group, state in trained.items()
    }
    return released, Clipping(norm, factor)


def clipping_factor(norm: float, numbers: int, clip_norm: float) -> float:
    """Return f ≤ 1 such that the float64 products f · x_i have a norm of at most C, exactly.

    `norm` is ν, the computed norm of x_1 … x_n, and `numbers` is n. Let u = 2⁻⁵³, n u ≤ 1/4 and
    τ = 2⁻¹⁰²². In any order of summation, with or without fused operations, the computed sum of
    squares Ŝ, of which ν is the root, satisfies (Higham, "Accuracy and Stability of Numerical
    Algorithms", 2002, section 3.1, and at most τ for each square or sum that underflows)::

        S = Σ x_i²  ≤  (Ŝ + 2 n τ) / (1 − γ),    γ = n u / (1 − n u)
        1 / √(1 − γ) = √((1 − n u) / (1 − 2 n u))  ≤  1 + n u
        ‖x‖₂ = √S   ≤  (√Ŝ + √(2 n τ)) (1 + n u)

    At most eight further roundings occur: in ν, √(2 n τ), their sum, the factor below, N, C / N and
    f · x_i. Each contributes a factor of at most 1 / (1 − u), together less than 1 + 16 u. As
    (1 + n u)(1 + 16 u) ≤ 1 + 2 (n + 10) u, it is enough to divide by::

        N = (ν + √(2 n τ)) (1 + 2 (n + 16) u),    f = min(1, C / N)

    A product f · x_i that underflows may be rounded up by 2⁻¹⁰⁷⁵. All of them add less than C u to
    the norm if C is at least `LEAST_CLIP`, which the rest of N's margin covers.
    """
    assert numbers * _UNIT <= 0.25 and clip_norm >= LEAST_CLIP
    bound = (norm + math.sqrt(2 * numbers * _TINY)) * (1 + 2 * (numbers + 16) * _UNIT)
    return min(1.0, clip_norm / bound) if bound > 0 else 1.0


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
    clipped = _change(trained, sent).mul_(factor)  # rounded here, as `clipping_factor` assumes
    noisy = noise.add_(clipped).view(trained.shape)
    return noisy.add_(sent.to(torch.float64)).to(sent.dtype)
