"""Assign every parameter to a group: trained, uploaded, private or frozen.

Every parameter of the model matches exactly one row of `GROUPS`; any other is an error. To add a
kind of parameter, add a row. `Sharing` restricts what a run trains and uploads of the groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pilot_flwr.config.schema import SharingConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.protocol import GroupName

if TYPE_CHECKING:
    from torch import nn

_CONNECTOR = r"model\.(?:\w+\.)+pilot\."
_DECODER = r"model\.(?:language|text)_model\."


@dataclass(frozen=True)
class ParameterGroup:
    """One kind of parameter."""

    symbol: str
    """As in docs/explanation/method.md, section 1."""
    pattern: str
    """Regular expression of the model's parameter names; ``{own}`` is the client's task. Tensors
    are stored and sent as ``<task>/<key>``, or ``<key>`` without a group ``task``."""
    stages: tuple[int, ...]
    """Stages that train it."""
    sent: bool = False
    """Whether the client uploads it."""
    private: bool = False
    """Whether the client keeps it on its disk."""

    @property
    def may_be_kept(self) -> bool:
        """Whether a client may store some of it: `Sharing` may upload less than the group."""
        return self.private or self.sent


GROUPS: dict[GroupName, ParameterGroup] = {
    "lora": ParameterGroup(
        "Θ_l",
        _DECODER + r"(?P<key>.+\.lora_[AB])\.default\.weight",
        (1, 2),
        sent=True,
    ),
    # R of exact aggregation, or the received LoRA beside a personal one.
    "residual": ParameterGroup("R", _DECODER + r"(?P<key>.+\.lora_[AB])\.residual\.weight", ()),
    "own_task_adapter": ParameterGroup(
        "ψ_t",
        _CONNECTOR + r"(?:task_adapter|task_adapters\.{own})\.(?P<key>.+)",
        (1, 2),
        sent=True,
    ),
    "foreign_task_adapters": ParameterGroup(
        "ψ_t^i",
        _CONNECTOR + r"task_adapters\.(?!{own}\.)(?P<task>[^.]+)\.(?P<key>.+)",
        (),
    ),
    "client_adapter": ParameterGroup(
        "ψ_s", _CONNECTOR + r"client_adapter\.(?P<key>.+)", (1,), private=True
    ),
    "cross_task_adapters": ParameterGroup(
        "ψ_c",
        _CONNECTOR + r"cross_task_adapters\.(?P<task>[^.]+)\.(?P<key>.+)",
        (2,),
        private=True,
    ),
    "router": ParameterGroup("φ", _CONNECTOR + r"router\.(?P<key>.+)", (2,), private=True),
    "base": ParameterGroup("base", r"(?:model|lm_head)\.(?!.*\b(?:pilot|lora_[AB])\.).+", ()),
}


@dataclass(frozen=True)
class Sharing:
    """Selects the tensors that a run trains and uploads."""

    adapter: bool = True
    """Whether the own task adapter is uploaded."""
    lora: str = "AB"
    """Uploaded LoRA matrices: ``AB``, ``A``, ``B`` or none (empty)."""
    trained_lora: str = "AB"
    """Trained LoRA matrices: ``AB`` or ``B``."""
    trained_adapter: bool = True
    """Whether the own task adapter is trained."""

    @classmethod
    def of(cls, sharing: SharingConfig, lora_matrices: str) -> Sharing:
        """Build it from `strategy.sharing` and `train.lora_matrices`."""
        return cls(sharing.adapter, sharing.lora.replace("none", ""), lora_matrices)

    def trains(self, group: GroupName, name: str) -> bool:
        """Whether a tensor is trained in the stages of its group."""
        if group == "lora":
            return name[-1] in self.trained_lora
        return group != "own_task_adapter" or self.trained_adapter

    def sends(self, group: GroupName, name: str) -> bool:
        """Whether a tensor travels, in both directions."""
        if group == "lora":
            return name[-1] in self.lora
        return GROUPS[group].sent and self.adapter

    def keeps(self, group: GroupName, name: str) -> bool:
        """Whether the client stores this tensor (private, or trained but not uploaded)."""
        row = GROUPS[group]
        unsent = row.sent and self.trains(group, name) and not self.sends(group, name)
        return row.private or unsent


WHOLE = Sharing()
"""The paper's: all is trained, and Θ_a and Θ_l are uploaded in full."""

PERSONAL_GROUPS: dict[str, tuple[GroupName, ...]] = {
    "none": (),
    "whole": ("own_task_adapter", "lora"),
    "beside": ("lora",),
}
"""Groups of a client's personal model, by `train.personal.model`."""

Groups: TypeAlias = "dict[GroupName, dict[str, nn.Parameter]]"
"""Group → name within the group → parameter."""


def group_parameters(model: nn.Module, *, own_task: str) -> Groups:
    """Assign every parameter of a base model with a LoRA and Pilot's connector to its group.

    `own_task` is the client's; the other task adapters are foreign. Parameters keep the model's
    order; groups that the model does not have are empty.

    Raises
    ------
    ModelError
        A parameter matches no group, or several.
    """
    patterns = {
        group: re.compile(row.pattern.replace("{own}", re.escape(own_task)))
        for group, row in GROUPS.items()
    }
    groups: Groups = {group: {} for group in GROUPS}
    for name, parameter in model.named_parameters():
        matches = {
            group: match for group, regex in patterns.items() if (match := regex.fullmatch(name))
        }
        if len(matches) != 1:
            found = f"several groups: {sorted(matches)}" if matches else "no group"
            raise ModelError(
                f"Parameter `{name}` matches {found}; see pilot_flwr/algorithm/parameter_groups.py."
            )
        ((group, match),) = matches.items()
        parts = match.groupdict()
        key = parts.get("key", name)  # the base model keeps its names
        groups[group]["/".join(filter(None, (parts.get("task"), key)))] = parameter
    return groups


def decoder_matrix(name: str, shape: Sequence[int]) -> str:
    """Return a frozen matrix's name in its decoder layer, such as ``mlp.up_proj``, else ''."""
    match = re.fullmatch(rf"{_DECODER}layers\.\d+\.(.+?)(?:\.base_layer)?\.weight", name)
    return match[1] if match and len(shape) == 2 else ""


def trained_groups(stage: int) -> tuple[GroupName, ...]:
    """Return the groups that a stage trains."""
    return tuple(group for group, row in GROUPS.items() if stage in row.stages)


def set_trainable(groups: Groups, *, stage: int, sharing: Sharing = WHOLE) -> None:
    """Enable gradients for exactly the tensors that `stage` and `sharing` train."""
    for group, parameters in groups.items():
        for name, parameter in parameters.items():
            trained = stage in GROUPS[group].stages and sharing.trains(group, name)
            parameter.requires_grad_(trained)
            parameter.grad = None
