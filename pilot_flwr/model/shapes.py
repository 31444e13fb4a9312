"""Shapes of all parameters, from a base model's configuration alone.

The model is built without content, on torch's meta device. This takes seconds, so the shapes are
`remembered` in the user's cache; then a client answers the roster query without torch. Shapes are
by group as in `pilot_flwr.algorithm.parameter_groups.GROUPS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pilot_flwr.algorithm.parameter_groups import GROUPS, WHOLE, Sharing
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.model.architectures import check_files, known_config, remembered
from pilot_flwr.protocol import GroupName

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_LAYOUTS: dict[str, "Layout"] = {}


def group_shapes(
    config: ModelConfig, *, tasks: tuple[str, ...], stage: int
) -> dict[GroupName, Shapes]:
    """Return the shapes of a stage's parameters; `tasks[0]` is the client's own task."""

    def built() -> dict[GroupName, Shapes]:
        from pilot_flwr.model.pilot_model import empty_model

        model = empty_model(config, known_config(config), tasks=tasks, stage=stage)
        return {g: {n: tuple(p.shape) for n, p in ps.items()} for g, ps in model.groups().items()}

    found = remembered("shapes", config, (repr(config), tasks, stage), built)
    return {g: {n: tuple(shape) for n, shape in ps.items()} for g, ps in found.items()}


def lora_shapes(config: ModelConfig) -> Shapes:
    """Return the shapes of Θ_l, in the parameter order of peft's model."""
    return group_shapes(config, tasks=("any",), stage=1)["lora"]


def numel(shapes: Mapping[str, Shape]) -> int:
    """Return the number of parameters."""
    return sum(math.prod(shape) for shape in shapes.values())


@dataclass(frozen=True)
class Layout:
    """Shapes and sizes of one client's parameters."""

    sent: dict[str, dict[str, list[int]]]
    """Group → tensor → shape of the shared parts of Θ_a and Θ_l, in `model.sent_dtype`."""
    private_bytes: int
    """Size of the private state after the last stage: ψ_s, T − 1 ψ_c, φ, and unshared tensors."""
    personal_bytes: dict[GroupName, int]
    """Sizes of copies of Θ_a and Θ_l, of which a personal model consists (`train.personal`)."""
    moments_bytes: int
    """Size of AdamW's two moments of all tensors that the last stage trains (`train.schedule`)."""
    error_bytes: int
    """Size of the errors of compressed uploads (`model.sent_dtype`), 0 without compression."""


def layout_of(
    config: ModelConfig, tasks: tuple[str, ...], sharing: Sharing = WHOLE, *, stages: int = 2
) -> Layout:
    """Return a client's layout in a run of `stages` stages; only the last result is cached."""
    key = f"{config}/{len(tasks)}/{sharing}/{stages}"
    if key not in _LAYOUTS:
        _LAYOUTS.clear()  # one run, one layout
        # The last stage has every private and every sent tensor of the first.
        check_files(config)
        groups = group_shapes(config, tasks=tasks, stage=stages)
        width = DTYPE_BYTES[config.adapter_dtype]
        uploaded: list[GroupName] = [group for group, row in GROUPS.items() if row.sent]
        sent: dict[str, dict[str, list[int]]] = {
            group: {n: list(s) for n, s in groups[group].items() if sharing.sends(group, n)}
            for group in uploaded
        }
        private = sum(
            numel({n: s for n, s in shapes.items() if sharing.keeps(group, n)})
            for group, shapes in groups.items()
        )
        trained = sum(
            numel({n: s for n, s in groups[group].items() if sharing.trains(group, n)})
            for group, row in GROUPS.items()
            if stages in row.stages
        )
        uploads = sum(math.prod(shape) for shapes in sent.values() for shape in shapes.values())
        _LAYOUTS[key] = Layout(
            sent,
            private_bytes=width * private,
            personal_bytes={group: width * numel(groups[group]) for group in uploaded},
            moments_bytes=2 * width * trained,
            error_bytes=DTYPE_BYTES[config.wire_dtype] * uploads if config.upload_bits else 0,
        )
    return _LAYOUTS[key]
