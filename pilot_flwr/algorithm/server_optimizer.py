"""The optional server optimizer: FedAdam, a step towards the average of the clients' uploads.

`pilot_flwr.algorithm.server_state.ServerState` applies it to every average. To add an optimizer,
write a function like `adam_step` and add its name to `strategy.server_optimizer.name`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pilot_flwr.algorithm.arrays import layout_difference
from pilot_flwr.protocol import State


class Moments(NamedTuple):
    """Adam's m and v of one average, in float32, after `steps` steps."""

    steps: int
    first: State
    second: State

    def pack(self) -> dict[str, Tensor]:
        """Return all moments as named tensors."""
        return {
            "steps": torch.tensor(self.steps),
            **{f"first/{name}": tensor for name, tensor in self.first.items()},
            **{f"second/{name}": tensor for name, tensor in self.second.items()},
        }

    @classmethod
    def unpack(cls, tensors: State, pattern: State) -> "Moments":
        """Invert `pack`; tensors are in the order of `pattern`.

        Raises
        ------
        KeyError, ValueError
            The tensors do not fit a state like `pattern`.
        """
        expected = {
            f"{kind}/{name}": tensor.new_empty(tensor.shape, dtype=torch.float32, device="meta")
            for kind in ("first", "second")
            for name, tensor in pattern.items()
        }
        found = {name: tensor for name, tensor in tensors.items() if name != "steps"}
        if difference := layout_difference(found, expected):
            raise ValueError(f"they do not fit the configured model: {difference}")
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
    """Return FedAdam's step from the state sent to clients towards the average of their uploads.

    ::

        Δ = average − current
        m ← β1 m + (1 − β1) Δ          v ← β2 v + (1 − β2) Δ²          both start at 0
        new = current + η_t m / (√v + τ),    η_t = η √(1 − β2^(t+1)) / (1 − β1^(t+1))

    Parameters
    ----------
    current : State
        Sent to the clients.
    average : State
        Of the same names, shapes and dtypes.
    moments : Moments or None
        Of the previous step; None at the first.
    learning_rate, beta_1, beta_2, tau : float
        η, β1, β2 and τ.

    Returns
    -------
    State, Moments
        The state to send next, in the dtype of `current`, computed in float64; the new moments.

    Notes
    -----
    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295). Follows
    Flower's ``FedAdam``, for comparable figures, which differs from their Algorithm 2 in three
    points: η_t replaces a constant η (its exponent t + 1 makes it 0.74 η at the first step, with
    β1 = 0.9 and β2 = 0.99), v starts at 0, not at τ² or more, and the average is weighted by
    examples. For another optimizer of the paper, write such a function with its own second moment.
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
