"""Which parameter is trained, sent, private or frozen: decided here and nowhere else.

Every parameter of the model belongs to exactly one row of `GROUPS`; one that no row claims
is an error. To add a kind of parameter, add a row.
"""

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from pilot_flwr.errors import ModelError

GroupName = Literal[
    "lora",
    "own_task_adapter",
    "foreign_task_adapters",
    "client_adapter",
    "cross_task_adapters",
    "router",
    "base",
]

_CONNECTOR = r"model\.multi_modal_projector\."


@dataclass(frozen=True)
class ParameterGroup:
    """One kind of parameter and its fate.

    Attributes
    ----------
    symbol : str
        As in the design, section 1.
    pattern : str
        Regular expression of the model's own parameter names; ``{own}`` is the client's
        task. The named group ``key``, with ``task`` before it if there is one, is the name
        under which the tensor is stored and sent.
    stages : frozenset of int
        Stages in which it is trained.
    sent : bool
        Whether the client uploads it.
    private : bool
        Whether it stays on the client's disk.
    """

    symbol: str
    pattern: str
    stages: frozenset[int]
    sent: bool = False
    private: bool = False


_BOTH = frozenset({1, 2})

GROUPS: dict[GroupName, ParameterGroup] = {
    "lora": ParameterGroup(
        "Θ_l",
        r"model\.language_model\.(?P<key>.+\.lora_[AB])\.default\.weight",
        _BOTH,
        sent=True,
    ),
    "own_task_adapter": ParameterGroup(
        "ψ_t",
        _CONNECTOR + r"(?:task_adapter|task_adapters\.{own})\.(?P<key>.+)",
        _BOTH,
        sent=True,
    ),
    "foreign_task_adapters": ParameterGroup(
        "ψ_t^i",
        _CONNECTOR + r"task_adapters\.(?!{own}\.)(?P<task>[^.]+)\.(?P<key>.+)",
        frozenset(),
    ),
    "client_adapter": ParameterGroup(
        "ψ_s", _CONNECTOR + r"client_adapter\.(?P<key>.+)", frozenset({1}), private=True
    ),
    "cross_task_adapters": ParameterGroup(
        "ψ_c",
        _CONNECTOR + r"cross_task_adapters\.(?P<task>[^.]+)\.(?P<key>.+)",
        frozenset({2}),
        private=True,
    ),
    "router": ParameterGroup(
        "φ", _CONNECTOR + r"router\.(?P<key>.+)", frozenset({2}), private=True
    ),
    "base": ParameterGroup(
        "base",
        r"model\.image_newline|(?:model\.(?:vision_tower|language_model)|lm_head)\.(?!.*\blora_).+",
        frozenset(),
    ),
}

State = dict[str, Tensor]
"""Named tensors of one group."""


def claim(model: nn.Module, *, own_task: str) -> dict[GroupName, dict[str, nn.Parameter]]:
    """Sort every parameter of a LLaVA model with a Pilot connector into its group.

    Returns
    -------
    dict
        Group → name within the group → parameter, in the model's order. Groups that the
        model does not have (CT-MoA's, in stage 1) are empty.

    Raises
    ------
    ModelError
        A parameter that no group claims, or that two do.
    """
    patterns = {
        group: re.compile(row.pattern.replace("{own}", re.escape(own_task)))
        for group, row in GROUPS.items()
    }
    claimed: dict[GroupName, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
    for name, parameter in model.named_parameters():
        matches = {
            group: match for group, regex in patterns.items() if (match := regex.fullmatch(name))
        }
        if len(matches) != 1:
            claims = f"is claimed by {sorted(matches)}" if matches else "is claimed by no group"
            raise ModelError(f"Parameter `{name}` {claims}; see pilot_flwr/model/parameters.py.")
        ((group, match),) = matches.items()
        parts = match.groupdict()
        key = parts.get("key", name)  # the base's names are its own
        claimed[group]["/".join(filter(None, (parts.get("task"), key)))] = parameter
    return claimed


def trained_groups(stage: int) -> tuple[GroupName, ...]:
    """Names of the groups that `stage` trains."""
    return tuple(group for group, row in GROUPS.items() if stage in row.stages)


def set_trainable(model: nn.Module, *, own_task: str, stage: int) -> None:
    """Give gradients to what `stage` trains, and to nothing else."""
    for group, parameters in claim(model, own_task=own_task).items():
        for parameter in parameters.values():
            parameter.requires_grad_(stage in GROUPS[group].stages)
            parameter.grad = None


def read(parameters: dict[str, nn.Parameter]) -> State:
    """Copy a group's tensors to the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def write(parameters: dict[str, nn.Parameter], state: State, *, what: str) -> None:
    """Copy `state` into a group's parameters.

    Raises
    ------
    ModelError
        Names or shapes of `state` are not exactly the group's; `what` names it.
    """
    missing, unexpected = parameters.keys() - state.keys(), state.keys() - parameters.keys()
    if missing or unexpected:
        raise ModelError(
            f"{what}: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]} "
            f"({len(missing)} and {len(unexpected)} in all)."
        )
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise ModelError(
                f"{what}: `{name}` has shape {tuple(state[name].shape)} but must have "
                f"{tuple(parameter.shape)}."
            )
        parameter.data.copy_(state[name])
