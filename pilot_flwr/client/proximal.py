"""A pull back to where a training began: FedProx's proximal term, and Ditto's.

::

    μ / 2 · ‖w − w_sent‖²

FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2) adds
it to the loss of the shared model; Ditto (Li et al., "Ditto: Fair and Robust Federated Learning
Through Personalization", ICML 2021, algorithm 1) to that of a personal one. The sum is over what
the client was sent and trains.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pilot_flwr.client.accumulation import LOSSES
from pilot_flwr.model.parameters import Sharing
from pilot_flwr.model.pilot_model import PilotModel


class Proximal:
    """``weight / 2 · ‖w − anchor‖²``; the anchor is what the parameters are when this is made.

    Parameters
    ----------
    parameters : iterable of Parameter
        w.
    weight : float
        μ.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight: float) -> None:
        self.parameters = list(parameters)
        self.weight = weight
        self.anchors = [parameter.detach().clone() for parameter in self.parameters]

    def loss(self) -> Tensor:
        """Return the term, a float32 scalar."""
        squares = [
            (parameter.float() - anchor.float()).square().sum()
            for parameter, anchor in zip(self.parameters, self.anchors, strict=True)
        ]
        return 0.5 * self.weight * torch.stack(squares).sum()

    def backpropagate(self) -> Tensor:
        """Add the term's gradient to the parameters'; return `LOSSES`, float64, of it alone."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        losses = torch.zeros(len(LOSSES), dtype=torch.float64, device=loss.device)
        for name in ("total", "proximal"):
            losses[LOSSES.index(name)] = loss.detach().double()
        return losses


def sent_parameters(model: PilotModel, sharing: Sharing) -> list[nn.Parameter]:
    """Return what the client was sent and trains: w of `Proximal`."""
    return [
        parameter
        for group, named in model.groups().items()
        for name, parameter in named.items()
        if sharing.sends(group, name) and sharing.trains(group, name)
    ]
