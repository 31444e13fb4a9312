"""Convert tensors to Flower's arrays and back, bit for bit; read values from its records.

Flower's arrays have no bfloat16, so such a tensor is sent as its bit pattern, with ``:bfloat16``
appended to its name.
"""

import io
import math
import reprlib
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import State

_BFLOAT16 = ":bfloat16"
_KINDS = {ConfigRecord: "record", ArrayRecord: "arrays", MetricRecord: "metrics"}
_Record = TypeVar("_Record", ConfigRecord, ArrayRecord, MetricRecord)
_T = TypeVar("_T")

_LARGEST = 1e300
"""Larger numbers are refused: their sums overflow."""

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 200


def encode_state(state: State) -> ArrayRecord:
    """Encode named tensors."""
    import torch

    record = ArrayRecord()
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            record[name + _BFLOAT16] = Array(tensor.view(torch.int16).numpy())
        else:
            record[name] = Array(tensor.numpy())
    return record


def decode_state(record: ArrayRecord) -> State:
    """Decode named tensors, the inverse of `encode_state`."""
    import torch

    state: State = {}
    for name, array in record.items():
        try:
            _check_size(array.data)
            tensor = torch.from_numpy(array.numpy())
        except Exception as error:  # numpy's header parser raises many kinds
            reason = f"{type(error).__name__}: {error}"
            raise UpdateError(f"array `{_cut(name)}` cannot be read: {_cut(reason)}") from error
        if name.endswith(_BFLOAT16):
            if tensor.dtype != torch.int16:
                raise UpdateError(
                    f"array `{_cut(name)}` has type {tensor.dtype}, not a bit pattern"
                )
            name, tensor = name.removesuffix(_BFLOAT16), tensor.view(torch.bfloat16)
        state[name] = tensor
    return state


def num_bytes(content: RecordDict) -> dict[str, int]:
    """Return the bytes of a message's arrays: ``lora``, ``task_adapters``, ``residual``."""
    sizes = {"lora": 0, "task_adapters": 0}
    for name, record in content.array_records.items():
        size = sum(len(array.data) for array in record.values())
        kind = name if name in ("lora", "residual") else "task_adapters"
        sizes[kind] = sizes.get(kind, 0) + size
    return sizes


def _check_size(data: bytes) -> None:
    """Compare an array's header with its number of bytes before numpy allocates memory."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"numpy format {version}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"its header says {dtype} {shape} but it has {len(data)} bytes")


def record_of(content: RecordDict, name: str, kind: type[_Record]) -> _Record:
    """Return the named record; raise `UpdateError` if it is missing or of another kind."""
    record = content.get(name)
    if not isinstance(record, kind):
        raise UpdateError(f"the message has no {_KINDS[kind]} `{name}`")
    return record


def number_of(
    values: MetricRecord, name: str, *, low: float = -math.inf, high: float = math.inf
) -> float:
    """Return a finite number from `low` to `high`; raise `UpdateError` for any other value."""
    value = values.get(name)
    if not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise UpdateError(f"metric `{name}` is {_shown(value)} but must be a finite number")
    if not max(low, -_LARGEST) <= value <= min(high, _LARGEST):
        raise UpdateError(
            f"metric `{name}` is {_shown(value)} but must be from {low:g} to {high:g}"
        )
    return value


def value_of(values: ConfigRecord, name: str, kind: type[_T]) -> _T:
    """Return a value of exactly this type; raise `UpdateError` for any other."""
    value = values.get(name)
    if type(value) is not kind:
        raise UpdateError(f"`{_cut(name)}` is {_shown(value)} but must be of type {kind.__name__}")
    return value


def _shown(value: object) -> str:
    """Format a foreign value, which may be of any length, for an error."""
    try:
        return _SHOWN.repr(value)
    except ValueError:  # more digits than Python converts
        return "a number too long to show"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN.maxstring else f"{text[: _SHOWN.maxstring]}..."
