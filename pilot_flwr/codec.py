"""Tensors and values in Flower's records, and back, bit for bit.

A tensor's name ends in ``:bfloat16`` if its two bytes are a bfloat16's bit pattern, because
Flower's arrays do not have that type: what was trained in bfloat16 is sent in bfloat16.
"""

import io
import math
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pilot_flwr.errors import UpdateError
from pilot_flwr.parameters import State

_BFLOAT16 = ":bfloat16"
_T = TypeVar("_T")


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
        except (TypeError, ValueError, EOFError, OSError) as error:
            raise UpdateError(f"array `{name}` cannot be read: {error}") from error
        if name.endswith(_BFLOAT16):
            if tensor.dtype != torch.int16:
                raise UpdateError(f"array `{name}` has type {tensor.dtype}, not a bit pattern")
            name, tensor = name.removesuffix(_BFLOAT16), tensor.view(torch.bfloat16)
        state[name] = tensor
    return state


def num_bytes(content: RecordDict) -> dict[str, int]:
    """Bytes of the serialised arrays in a message: ``lora`` and ``task_adapters``."""
    sizes = {"lora": 0, "task_adapters": 0}
    for name, record in content.array_records.items():
        size = sum(len(array.data) for array in record.values())
        sizes["lora" if name == "lora" else "task_adapters"] += size
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
    if name not in content.config_records:
        raise UpdateError(f"the message has no record `{name}`")
    return content.config_records[name]


def arrays_of(content: RecordDict, name: str) -> ArrayRecord:
    """Return a record of arrays.

    Raises
    ------
    UpdateError
        It is missing, or not as asked.
    """
    if name not in content.array_records:
        raise UpdateError(f"the message has no arrays `{name}`")
    return content.array_records[name]


def metrics_of(content: RecordDict, name: str) -> MetricRecord:
    """Return a record of numbers.

    Raises
    ------
    UpdateError
        It is missing, or not as asked.
    """
    if name not in content.metric_records:
        raise UpdateError(f"the message has no metrics `{name}`")
    return content.metric_records[name]


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
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UpdateError(f"metric `{name}` is {value} but must be a finite number")
    if not low <= value <= high:
        raise UpdateError(f"metric `{name}` is {value} but must be from {low:g} to {high:g}")
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
        raise UpdateError(f"`{name}` is {value!r} but must be of type {kind.__name__}")
    return value
