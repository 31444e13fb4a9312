"""Which parameter is trained, sent, private or frozen: decided here and nowhere else.

Every parameter of the model belongs to exactly one row of `GROUPS`; one that no row claims
is an error. To add a kind of parameter, add a row. What a row trains and sends, a run can have
less of: `Sharing`.
"""

import re
from dataclasses import dataclass

from torch import nn

from pilot_flwr.config.schema import SharingConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.protocol import GroupName, State

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

    @property
    def may_be_kept(self) -> bool:
        """Whether a client keeps tensors of it: what is sent may be less than the group."""
        return self.private or self.sent


_BOTH = frozenset({1, 2})

GROUPS: dict[GroupName, ParameterGroup] = {
    "lora": ParameterGroup(
        "Θ_l",
        r"model\.language_model\.(?P<key>.+\.lora_[AB])\.default\.weight",
        _BOTH,
        sent=True,
    ),
    "residual": ParameterGroup(
        "R", r"model\.language_model\.(?P<key>.+\.lora_[AB])\.residual\.weight", frozenset()
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


@dataclass(frozen=True)
class Sharing:
    """What of its groups a run trains, sends and keeps on the client.

    Attributes
    ----------
    adapter : bool
        Whether the own task adapter is sent.
    lora : str
        The matrices of the LoRA that are sent: ``AB``, ``A``, ``B`` or none (an empty text).
    trained_lora : str
        Those that are trained: ``AB`` or ``B``.
    """

    adapter: bool = True
    lora: str = "AB"
    trained_lora: str = "AB"

    @classmethod
    def of(cls, sharing: SharingConfig, lora_matrices: str) -> "Sharing":
        """Return that of `strategy.sharing` and `train.lora_matrices`."""
        lora = "" if sharing.lora == "none" else sharing.lora
        return cls(sharing.adapter, lora, lora_matrices)

    def trains(self, group: GroupName, name: str) -> bool:
        """Whether a tensor is trained in the stages of its group."""
        return group != "lora" or name[-1] in self.trained_lora

    def sends(self, group: GroupName, name: str) -> bool:
        """Whether the server and the client send a tensor."""
        if group == "lora":
            return name[-1] in self.lora
        return GROUPS[group].sent and self.adapter

    def keeps(self, group: GroupName, name: str) -> bool:
        """Whether a tensor is the client's own: what is neither sent nor trained is no one's."""
        row = GROUPS[group]
        unsent = row.sent and self.trains(group, name) and not self.sends(group, name)
        return row.private or unsent


WHOLE = Sharing()
"""All is trained, and all of Θ_a and Θ_l is sent: the paper."""

Groups = dict[GroupName, dict[str, nn.Parameter]]
"""Group → name within the group → parameter."""


def group_parameters(model: nn.Module, *, own_task: str) -> Groups:
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
    claimed: Groups = {group: {} for group in GROUPS}
    for name, parameter in model.named_parameters():
        matches = {
            group: match for group, regex in patterns.items() if (match := regex.fullmatch(name))
        }
        if len(matches) != 1:
            claims = f"is claimed by {sorted(matches)}" if matches else "is claimed by no group"
            raise ModelError(
                f"Parameter `{name}` {claims}; see pilot_flwr/algorithm/parameter_groups.py."
            )
        ((group, match),) = matches.items()
        parts = match.groupdict()
        key = parts.get("key", name)  # the base's names are its own
        claimed[group]["/".join(filter(None, (parts.get("task"), key)))] = parameter
    return claimed


def trained_groups(stage: int) -> tuple[GroupName, ...]:
    """Names of the groups that `stage` trains."""
    return tuple(group for group, row in GROUPS.items() if stage in row.stages)


def set_trainable(groups: Groups, *, stage: int, sharing: Sharing = WHOLE) -> None:
    """Give gradients to what `stage` trains, less what `sharing` does not, and to nothing else."""
    for group, parameters in groups.items():
        for name, parameter in parameters.items():
            trained = stage in GROUPS[group].stages and sharing.trains(group, name)
            parameter.requires_grad_(trained)
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
