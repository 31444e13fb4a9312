"""Whether the tensors of an upload are those that were asked for."""

import math

import torch

from pilot_flwr.errors import UpdateError
from pilot_flwr.model.parameters import State


def check_tensors(what: str, state: State, expected: State) -> None:
    """Check names, shapes, types and values; `what` names the part of the upload.

    Raises
    ------
    UpdateError
        A tensor is missing, unexpected, of another shape or type, or not finite.
    """
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        raise UpdateError(
            f"its {what} has missing tensors {sorted(missing)[:3]} and unexpected ones "
            f"{sorted(unexpected)[:3]} ({len(missing)} and {len(unexpected)} in all)"
        )
    for name, tensor in expected.items():
        got = state[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise UpdateError(
                f"`{name}` of its {what} is {_describe(got)} but must be {_describe(tensor)}"
            )
        if not math.isfinite(float(torch.sum(got, dtype=torch.float64))):
            raise UpdateError(f"`{name}` of its {what} has values that are not finite")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
