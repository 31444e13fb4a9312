"""Build a client's personalised model: the base model, the private state and the server's share.

The server holds the task adapters ψ_t and the client's LoRA Θ̄_l. The client holds ψ_s, after stage
2 ψ_c and φ, and the parts of ψ_t and Θ_l that the run does not send (`strategy.sharing`).

With `train.personal`, a client has a second, personal model: a connector and a LoRA v in place of
the shared ones (Ditto: Li et al., ICML 2021), or a LoRA beside the received Θ̄_l (FedDPA: Yang et
al., NeurIPS 2024). A layer then computes, with s = α / r and the personal weight a::

    W x + s (a B_v A_v + (1 − a) B̄ Ā) x
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from pilot_flwr.algorithm.lora_ranks import rank_of
from pilot_flwr.algorithm.parameter_groups import GROUPS, PERSONAL_GROUPS, WHOLE, Sharing
from pilot_flwr.algorithm.server_state import draw_lora
from pilot_flwr.client.private_state import PrivateState
from pilot_flwr.config.train import PersonalConfig
from pilot_flwr.errors import StateError
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import GroupName, State


@dataclass(frozen=True)
class Received:
    """The server's share of one client's model.

    `adapters` has ψ_t of all T tasks in stage 2, at least the client's own in stage 1; `lora` is
    Θ̄_l at the client's rank; `residual` is R, which exact aggregation adds to the frozen base.
    `seed` draws the LoRA matrices that are never sent. `personal` says what the client's personal
    model consists of.
    """

    task: str
    tasks: tuple[str, ...]
    adapters: Mapping[str, State]
    lora: State
    residual: State = field(default_factory=dict)
    sharing: Sharing = WHOLE
    seed: int = 0
    personal: PersonalConfig = field(default_factory=PersonalConfig)


def personalize(
    model: PilotModel,
    private: PrivateState | None,
    received: Received,
    *,
    stage: int,
    generator: torch.Generator,
    initialisation: str | None = None,
) -> None:
    """Load the client's adapters into `model`, in the architecture of `stage`.

    `generator` draws φ when stage 2 begins. `initialisation` overrides the model's own for a client
    without private state. Raises `StateError` if the private state is for other tasks, another
    `strategy.sharing` or another `train.personal.model`.
    """
    if private is None:
        model.enter_stage1(received.task, initialisation=initialisation)
    else:
        _check_personal(private, received.personal.model)
        model.enter_stage1(received.task)
        model.load("client_adapter", private.groups["client_adapter"])
        if stage == 2:
            model.enter_stage2(received.tasks, generator)
        if stage == private.stage == 2:  # ψ_c and φ are not new
            others = (task for task in received.tasks if task != model.own_task)
            if private.tasks != (present := (model.own_task, *others)):
                raise StateError(
                    f"The private state is for tasks {list(private.tasks)} but the server has "
                    f"{list(present)}."
                )
            for group in ("cross_task_adapters", "router"):
                model.load(group, private.groups[group])
    _load_received(model, private, received)


def personalize_as_trained(
    model: PilotModel, private: PrivateState | None, received: Received
) -> None:
    """Load the client's adapters as it last trained them, to evaluate, use or export the model.

    Without private state this is stage 1 with an inert ψ_s, also the consensus model of a task.
    A client that has trained a personal model gets that one.
    """
    # A private state of stage 2 holds φ, which replaces the one that the generator draws.
    personalize(
        model,
        private,
        received,
        stage=private.stage if private else 1,
        generator=torch.Generator(),
        initialisation="identity",
    )
    if private is not None:
        load_personal(model, private, received)


def load_personal(model: PilotModel, private: PrivateState | None, received: Received) -> None:
    """Turn the shared model, which `personalize` has loaded, into the client's personal one.

    Without private state the personal parameters are new and start as the received ones.
    """
    if received.personal.model == "beside":
        model.set_residual(received.lora, share=received.personal.share)
    for group, state in (private.personal if private else {}).items():
        model.load(group, state)


def _check_personal(private: PrivateState, kind: str) -> None:
    """Raise `StateError` unless the private state's personal model is of `kind`."""
    if private.personal.keys() != set(PERSONAL_GROUPS[kind]):
        found = f"a personal model of {' and '.join(sorted(private.personal))}"
        raise StateError(
            f"The private state holds {found if private.personal else 'no personal model'} but "
            f"this run has `train.personal.model={kind}`: the state is of another run."
        )


def extract_private_state(model: PilotModel, sharing: Sharing) -> PrivateState:
    """Copy the tensors that the client stores after training."""
    groups: dict[GroupName, State] = {}
    for group, row in GROUPS.items():
        kept = model.state(group, wanted=functools.partial(sharing.keeps, group))
        if kept or row.private:
            groups[group] = kept
    return PrivateState(model.stage, getattr(model.connector, "tasks", ()), groups)


def _load_received(model: PilotModel, private: PrivateState | None, received: Received) -> None:
    """Load the server's share, and the rest of ψ_t and Θ_l from the private state.

    Tensors neither sent nor trained yet are the same at every client: the pretrained projector,
    which the model already holds, and a LoRA drawn from the run's seed.
    """
    sharing, adapters = received.sharing, received.adapters
    model.set_lora_rank(rank_of(received.lora) or model.config.lora.rank)
    model.set_residual(received.residual)
    own = {
        group: {} if private is None else _unsent(model, private, sharing, group)
        for group in ("lora", "own_task_adapter")
    }
    model.load("lora", _drawn_lora(model, received, own["lora"]) | own["lora"] | received.lora)
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


def _unsent(model: PilotModel, private: PrivateState, sharing: Sharing, group: GroupName) -> State:
    """Return the tensors of a shared group that the client stores instead of sending."""
    state = private.groups.get(group, {})
    kept = {name for name in model.groups()[group] if sharing.keeps(group, name)}
    if state.keys() != kept:
        raise StateError(
            f"The private state holds {len(state)} tensors of {group} but must hold "
            f"{len(kept)}: it is from a run with another `strategy.sharing`."
        )
    return state


def _drawn_lora(model: PilotModel, received: Received, own: State) -> State:
    """Draw the LoRA tensors that are neither sent nor in the client's private state."""
    shapes = {name: p.shape for name, p in model.groups()["lora"].items()}
    missing = {n for n in shapes if not received.sharing.sends("lora", n)} - own.keys()
    if not missing:
        return {}
    dtype = getattr(torch, model.config.wire_dtype)
    drawn = draw_lora(shapes, dtype, seed=received.seed)
    return {name: drawn[name] for name in missing}
