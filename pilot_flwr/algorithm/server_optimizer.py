"""FedAdam: a round's average as a step of Adam on the server.

A pure function over named arrays (*states*, see :mod:`pilot_flwr.algorithm.arrays`); the moments come in and
go out. To add another of Reddi et al.'s optimizers, write a function with the second moment of its
own beside `adam_step`.

Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), Algorithm 2.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class Moments(NamedTuple):
    """What Adam remembers of one average.

    Attributes
    ----------
    steps : int
        Steps made.
    first, second : state
        m and v, in float32 whatever the average's dtype is.
    """

    steps: int
    first: State
    second: State

    def pack(self) -> dict[str, Tensor]:
        """Return all of it as named tensors."""
        return {
            "steps": torch.tensor(self.steps),
            **{f"first/{name}": tensor for name, tensor in self.first.items()},
            **{f"second/{name}": tensor for name, tensor in self.second.items()},
        }

    @classmethod
    def unpack(cls, tensors: State, pattern: State) -> "Moments":
        """Return what was packed, its tensors in the order of `pattern`.

        Raises
        ------
        KeyError, ValueError
            It is not that of a state like `pattern`.
        """
        shapes = {
            f"{kind}/{name}": (tensor.shape, torch.float32)
            for kind in ("first", "second")
            for name, tensor in pattern.items()
        }
        found = {name: (t.shape, t.dtype) for name, t in tensors.items() if name != "steps"}
        if found != shapes:
            raise ValueError("its tensors are not those of the configured model")
        first, second = (
            {n: tensors[f"{kind}/{n}"] for n in pattern} for kind in ("first", "second")
        )
        return cls(int(tensors["steps"]), first, second)


def adam_step(
    current: State,
    average: State,
    moments: Moments | None,
    *,
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    tau: float,
) -> tuple[dict[str, Tensor], Moments]:
    """Step from what clients were sent towards the average of what they sent back.

    ::

        Δ = average − current
        m ← β1 m + (1 − β1) Δ          v ← β2 v + (1 − β2) Δ²          both begin at 0
        new = current + η_t m / (√v + τ),    η_t = η √(1 − β2^(t+1)) / (1 − β1^(t+1))

    Parameters
    ----------
    current : state
        What the clients were sent.
    average : state
        The average of what they sent back, of the same names, shapes and dtypes.
    moments : Moments or None
        Those of the step before; None at the first.
    learning_rate, beta_1, beta_2, tau : float
        η, β1, β2 and τ.

    Returns
    -------
    state, Moments
        What the clients are sent next, in the dtype of `current`; computed in float64.

    Notes
    -----
    As Flower's own ``FedAdam``, so that figures can be compared, and not as Algorithm 2 of Reddi et
    al. in three points: η_t in place of a constant η (its exponent is t + 1, which at the first
    step, with β1 = 0.9 and β2 = 0.99, makes it 0.74 η); v begins at 0 and not at τ² or more; and
    the average is weighted by examples.
    """
    steps = 1 if moments is None else moments.steps + 1
    rate = learning_rate * (1 - beta_2 ** (steps + 1)) ** 0.5 / (1 - beta_1 ** (steps + 1))
    new: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, tensor in current.items():
        start = tensor.double()
        delta = average[name].double() - start
        zero = torch.zeros_like(delta)
        m = beta_1 * (moments.first[name].double() if moments else zero) + (1 - beta_1) * delta
        v = beta_2 * (moments.second[name].double() if moments else zero) + (1 - beta_2) * delta**2
        new[name] = (start + rate * m / (v.sqrt() + tau)).to(tensor.dtype)
        first[name], second[name] = m.float(), v.float()
    return new, Moments(steps, first, second)
