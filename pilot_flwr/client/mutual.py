"""Train a shared and a personal model together, each distilled from the other.

In FedDAT (Chen et al., "FedDAT: An Approach for Foundation Model Finetuning in Multi-Modal
Heterogeneous Federated Learning", AAAI 2024, arXiv 2308.12305), a frozen copy of the received
adapter and an adapter of the client form the dual-adapter teacher, here the personal model. Every
step trains first the shared adapter and then the client's, on the same batch::

    L_shared   = L_ce + β T² KL(p_personal ‖ p_shared)
    L_personal = L_ce + β T² KL(p_shared ‖ p_personal)

p are probabilities at temperature T of the answer tokens; those of the other model are constants.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from pilot_flwr.algorithm.losses import distillation_loss
from pilot_flwr.algorithm.parameter_groups import PERSONAL_GROUPS
from pilot_flwr.config.train import PersonalConfig
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import State


@dataclass
class Distillation:
    """One step's distillation: the other model's logits, (M, V) of each micro-batch.

    `logits` collects those of the model that learns.
    """

    config: PersonalConfig
    targets: list[Tensor]
    logits: list[Tensor] = field(default_factory=list)

    def loss(self, logits: Tensor) -> Tensor:
        """Return the next micro-batch's loss with its coefficient, summed over the tokens."""
        target = self.targets[len(self.logits)]
        self.logits.append(logits.detach())
        temperature = self.config.temperature
        return self.config.distillation * distillation_loss(logits, target, temperature=temperature)


class Teacher:
    """The personal model, which shares a `PilotModel` with the shared one.

    The model must hold the received parameters, and the received LoRA as the frozen one. `lora` is
    the client's. Outside `active`, the model is the shared one.
    """

    def __init__(self, model: PilotModel, config: PersonalConfig, lora: State) -> None:
        groups = model.groups()
        self.model, self.config = model, config
        received = [p for group in PERSONAL_GROUPS["whole"] for p in groups[group].values()]
        self.tensors = {parameter: parameter.detach().clone() for parameter in received}
        for name, parameter in groups["lora"].items():
            self.tensors[parameter].copy_(lora[name])
        model.weigh_lora(1.0)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Swap the personal model in for the block; only its LoRA is trained."""
        connector = list(self.model.groups()["own_task_adapter"].values())
        shared = [(parameter, parameter.data) for parameter in self.tensors]
        _set_trained(connector, False)
        for parameter, tensor in self.tensors.items():
            parameter.data = tensor
        self.model.weigh_lora(self.config.share)
        try:
            yield
        finally:
            self.model.weigh_lora(1.0)
            for parameter, tensor in shared:
                parameter.data = tensor
            _set_trained(connector, True)

    def lora(self) -> State:
        """Copy the client's LoRA to the CPU."""
        named = self.model.groups()["lora"].items()
        return {name: self.tensors[parameter].to("cpu", copy=True) for name, parameter in named}


def _set_trained(parameters: list[nn.Parameter], trained: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trained)
