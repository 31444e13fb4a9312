"""Ditto: a personal model beside the shared one (Li et al., ICML 2021, arXiv 2012.04221).

In every turn a client trains the shared model w as without Ditto, and then a personal one, v, on
its own loss F_k and a pull to the shared one as the server sent it (algorithm 1, lines 5 to 8)::

    min over v of   F_k(v) + λ / 2 · ‖v − w_sent‖²

v begins as the first w that is sent, never leaves the client, and is what the client is evaluated
by. Each of the two has half of the turn's epochs, so that a turn takes as many steps as another
method's.
"""

from dataclasses import replace

import torch

from pilot_flwr.client.kit import Kit
from pilot_flwr.client.proximal import Proximal, sent_parameters
from pilot_flwr.client.training import TrainingResult, check_finite
from pilot_flwr.errors import StateError
from pilot_flwr.model.parameters import GroupName, State
from pilot_flwr.storage.private_state import PrivateState

PERSONAL: tuple[GroupName, ...] = ("lora", "own_task_adapter")
"""What v is made of."""


def train_personal(
    kit: Kit, private: PrivateState | None, generator: torch.Generator
) -> tuple[dict[GroupName, State], TrainingResult]:
    """Train v, in place of the model that the server sent.

    Parameters
    ----------
    kit : Kit
        Its model holds w as it was sent.
    private : PrivateState or None
        Holds v of the turn before, if there was one.
    generator : torch.Generator
        Of the order of examples and of dropout.

    Returns
    -------
    dict, TrainingResult
        v, by group, and what happened.

    Raises
    ------
    StateError
        The client has trained in this run, but without a personal model.
    TrainingError
        As in `pilot_flwr.client.training.train`.
    """
    model = kit.model
    pull = Proximal(sent_parameters(model, kit.sharing), kit.config.train.ditto.weight)
    if private is not None:
        if private.personal.keys() != set(PERSONAL):
            raise StateError(
                "The private state holds no personal model: it is of a run without "
                "`train.ditto.enabled`."
            )
        for group, state in private.personal.items():
            model.load(group, state)
    result = kit.fit(generator, pull)
    check_finite(model)
    return {group: model.state(group) for group in PERSONAL}, result


def both(shared: TrainingResult, personal: TrainingResult) -> TrainingResult:
    """Return what is reported of a turn: steps and time of both trainings, w's losses."""
    return replace(
        shared,
        steps=shared.steps + personal.steps,
        seconds=shared.seconds + personal.seconds,
    )
