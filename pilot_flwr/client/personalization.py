"""A client's personalised model, put together from what is its own and what the server has.

The server has the task adapters ψ_t and the client's LoRA Θ̄_l; the client's own are ψ_s and,
after stage 2, ψ_c and φ, and what a run does not send of ψ_t and Θ_l (`strategy.sharing`).
Training starts from it, evaluation scores it, and an exported model is it.
"""

from collections.abc import Mapping

import torch

from pilot_flwr.algorithm.parameter_groups import WHOLE, Sharing
from pilot_flwr.algorithm.server_state import draw_lora
from pilot_flwr.client.private_state import PrivateState
from pilot_flwr.errors import StateError
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import GroupName, State


def assemble(
    model: PilotModel,
    task: str,
    private: PrivateState | None,
    *,
    adapters: Mapping[str, State],
    lora: State,
    tasks: tuple[str, ...],
    sharing: Sharing = WHOLE,
    seed: int = 0,
    residual: State | None = None,
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
    sharing : Sharing, optional
        What of the adapter and the LoRA the server has.
    seed : int
        The run's: what is never sent of a LoRA begins as it is drawn by it.
    residual : State, optional
        What exact aggregation has added to the frozen base.

    Raises
    ------
    StateError
        The private state is for other tasks, or of a run that shares something else.
    """
    if private is None:
        model.enter_stage1(task, initialisation="identity")
    else:
        enter_own(model, task, private)
        if private.stage == 2:
            enter_stage2(model, private, tasks, torch.Generator())
    load_received(
        model, private, adapters, lora, sharing=sharing, seed=seed, residual=residual or {}
    )
    for group, state in (private.personal if private else {}).items():
        model.load(group, state)


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


def load_received(
    model: PilotModel,
    private: PrivateState | None,
    adapters: Mapping[str, State],
    lora: State,
    *,
    sharing: Sharing,
    seed: int,
    residual: State,
) -> None:
    """Load what the server has for this client, and of ψ_t and Θ_l what is the client's own.

    Of these, what the client has not trained yet begins as it does at every other: the adapter as
    the pretrained projector, which it is already, the LoRA as the run's seed draws it.
    """
    model.set_residual(residual)
    groups = model.groups()
    own: dict[GroupName, State] = {
        group: {} if private is None else private.groups.get(group, {})
        for group in ("lora", "own_task_adapter")
    }
    for group, state in own.items():
        kept = {name for name in groups[group] if sharing.keeps(group, name)}
        if private is not None and state.keys() != kept:
            raise StateError(
                f"The private state holds {len(state)} tensors of {group} but must hold "
                f"{len(kept)}: it is of a run with another `strategy.sharing`."
            )
    unsent = {n: p.shape for n, p in groups["lora"].items() if not sharing.sends("lora", n)}
    if unsent.keys() - own["lora"].keys():
        dtype = getattr(torch, model.config.wire_dtype)
        shapes = {name: p.shape for name, p in groups["lora"].items()}
        drawn = draw_lora(shapes, dtype, seed=seed)
        own["lora"] = {name: drawn[name] for name in unsent} | own["lora"]
    model.load("lora", own["lora"] | lora)
    if sharing.adapter:
        model.load("own_task_adapter", adapters[model.own_task])
    elif private is not None:
        model.load("own_task_adapter", own["own_task_adapter"])
    if model.stage == 2:
        foreign = {
            f"{task}/{name}": tensor
            for task, state in adapters.items()
            if task != model.own_task
            for name, tensor in state.items()
        }
        model.load("foreign_task_adapters", foreign)
