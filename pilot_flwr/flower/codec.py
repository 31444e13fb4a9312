"""Tensors and values in Flower's records, and back, bit for bit.

A tensor's name ends in ``:bfloat16`` if its two bytes are a bfloat16's bit pattern, because
Flower's arrays do not have that type: what was trained in bfloat16 is sent in bfloat16.
"""

import io
import math
import reprlib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import State

_BFLOAT16 = ":bfloat16"
_T = TypeVar("_T")

_LARGEST = 1e300
"""Numbers beyond it are refused, as sums of them are not finite."""

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 200


def encode_state(state: State) -> ArrayRecord:
    """Pack named tensors; bfloat16 as its bit pattern."""
    record = ArrayRecord()
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            record[name + _BFLOAT16] = Array(tensor.view(torch.int16).numpy())
        else:
            record[name] = Array(tensor.numpy())
    return record


def decode_state(record: ArrayRecord) -> State:
    """Unpack what `encode_state` packed.

    Raises
    ------
    UpdateError
        An array cannot be read, or its name and type contradict each other.
    """
    state: State = {}
    for name, array in record.items():
        try:
            _check_size(array.data)
            tensor = torch.from_numpy(array.numpy())
        except Exception as error:  # numpy's parser of headers raises all kinds on odd ones
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
    """Bytes of the serialised arrays in a message: ``lora``, ``task_adapters``, ``residual``."""
    sizes = {"lora": 0, "task_adapters": 0}
    for name, record in content.array_records.items():
        size = sum(len(array.data) for array in record.values())
        kind = name if name in ("lora", "residual") else "task_adapters"
        sizes[kind] = sizes.get(kind, 0) + size
    return sizes


def _check_size(data: bytes) -> None:
    """Compare an array's header with the bytes that follow, before numpy allocates for it."""
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
        raise ValueError(f"its header says {dtype} {shape} but {len(data)} bytes came")


def config_of(content: RecordDict, name: str) -> ConfigRecord:
    """Return a record of values.

    Raises
    ------
    UpdateError
        It is missing, or not as asked.
    """
    return _named(content.config_records, name, "record")


def arrays_of(content: RecordDict, name: str) -> ArrayRecord:
    """Return a record of arrays.

    Raises
    ------
    UpdateError
        It is missing, or not as asked.
    """
    return _named(content.array_records, name, "arrays")


def metrics_of(content: RecordDict, name: str) -> MetricRecord:
    """Return a record of numbers.

    Raises
    ------
    UpdateError
        It is missing, or not as asked.
    """
    return _named(content.metric_records, name, "metrics")


def number_of(
    values: MetricRecord, name: str, *, low: float = -math.inf, high: float = math.inf
) -> float:
    """Return a finite number within a range.

    Raises
    ------
    UpdateError
        It is missing, or not as asked.
    """
    value = values.get(name)
    if not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise UpdateError(f"metric `{name}` is {_shown(value)} but must be a finite number")
    if not max(low, -_LARGEST) <= value <= min(high, _LARGEST):
        raise UpdateError(
            f"metric `{name}` is {_shown(value)} but must be from {low:g} to {high:g}"
        )
    return value


def value_of(values: ConfigRecord, name: str, kind: type[_T]) -> _T:
    """Return a value of exactly one type.

    Raises
    ------
    UpdateError
        It is missing, or not as asked.
    """
    value = values.get(name)
    if type(value) is not kind:
        raise UpdateError(f"`{_cut(name)}` is {_shown(value)} but must be of type {kind.__name__}")
    return value


def _named(records: Mapping[str, _T], name: str, what: str) -> _T:
    if name not in records:
        raise UpdateError(f"the message has no {what} `{name}`")
    return records[name]


def _shown(value: object) -> str:
    """Return what an error shows of a value from outside, which may be of any length."""
    try:
        return _SHOWN.repr(value)
    except ValueError:  # more digits than Python writes out
        return "a number too long"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN.maxstring else f"{text[: _SHOWN.maxstring]}..."
