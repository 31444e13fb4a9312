"""A client's personalised model, put together from what is its own and what the server has.

The server has the task adapters ψ_t and the client's LoRA Θ̄_l; the client's own are ψ_s and,
after stage 2, ψ_c and φ. Training starts from it, evaluation scores it, and an exported model
is it.
"""

from collections.abc import Mapping

import torch

from pilot_flwr.errors import StateError
from pilot_flwr.model.parameters import State
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.storage.private_state import PrivateState


def assemble(
    model: PilotModel,
    task: str,
    private: PrivateState | None,
    *,
    adapters: Mapping[str, State],
    lora: State,
    tasks: tuple[str, ...],
) -> None:
    """Make `model` the client's, in the architecture that the client last trained.

    Without a private state this is stage 1 with an inert ψ_s: the base model with the task
    adapter and the LoRA that are given, which is also the consensus model of a task.

    Parameters
    ----------
    model : PilotModel
        Its adapters are replaced, in place.
    task : str
        The client's task.
    private : PrivateState or None
        What never leaves the client, if it has trained.
    adapters : Mapping[str, State]
        Task → ψ_t: all T if the private state is of stage 2, else the own one is enough.
    lora : State
        Θ̄_l.
    tasks : tuple of str
        All T tasks in the federation's order.

    Raises
    ------
    StateError
        The private state is for other tasks.
    """
    if private is None:
        model.enter_stage1(task, initialisation="identity")
    else:
        enter_own(model, task, private)
        if private.stage == 2:
            enter_stage2(model, private, tasks, torch.Generator())
    load_received(model, adapters, lora)


def enter_own(model: PilotModel, task: str, private: PrivateState) -> None:
    """Begin with stage 1 and the client's own ψ_s."""
    model.enter_stage1(task)
    model.load("client_adapter", private.groups["client_adapter"])


def enter_stage2(
    model: PilotModel, private: PrivateState, tasks: tuple[str, ...], generator: torch.Generator
) -> None:
    """Switch to CT-MoA; ψ_c and φ are new at the first time and the client's own afterwards."""
    model.enter_stage2(tasks, generator)
    if private.stage == 2:
        present = (model.own_task, *(t for t in tasks if t != model.own_task))
        if private.tasks != present:
            raise StateError(
                f"The private state is for tasks {list(private.tasks)} but the server has "
                f"{list(present)}."
            )
        for group in ("cross_task_adapters", "router"):
            model.load(group, private.groups[group])


def load_received(model: PilotModel, adapters: Mapping[str, State], lora: State) -> None:
    """Load what the server has for this client."""
    model.load("lora", lora)
    model.load("own_task_adapter", adapters[model.own_task])
    if model.stage == 2:
        foreign = {
            f"{task}/{name}": tensor
            for task, state in adapters.items()
            if task != model.own_task
            for name, tensor in state.items()
        }
        model.load("foreign_task_adapters", foreign)
