"""Convert tensors to Flower's arrays and back, bit for bit; read values from its records."""

import math
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import State
from pilot_flwr.run import tensor_buffer

Allocate = Callable[[int], Any]
"""Returns a writable buffer of the given number of bytes."""

_TENSORS, _FORMAT = "tensors", "safetensors"
_KINDS = {ConfigRecord: "record", ArrayRecord: "arrays", MetricRecord: "metrics"}
_Record = TypeVar("_Record", ConfigRecord, ArrayRecord, MetricRecord)
_T = TypeVar("_T")

_LARGEST = 1e300
"""Larger numbers are refused: their sums overflow."""

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 200


def encode_state(state: State, *, allocate: Allocate = bytearray) -> ArrayRecord:
    """Encode named tensors.

    Each tensor is copied once, into a buffer from `allocate`. All tensors are one array, because
    Flower transfers each array of a record separately, with several requests per hop.
    """
    header, size = tensor_buffer.layout(state)
    buffer = allocate(size)
    memoryview(buffer)[: len(header)] = header
    for name, place in tensor_buffer.views(buffer).items():
        place.copy_(state[name])
    array = Array(dtype="uint8", shape=(size,), stype=_FORMAT, data=b"")
    array.data = buffer  # the constructor takes only bytes
    record = ArrayRecord()
    record[_TENSORS] = array
    return record


def decode_state(record: ArrayRecord) -> State:
    """Decode named tensors, the inverse of `encode_state`, as views of the array; read only."""
    if list(record) != [_TENSORS] or record[_TENSORS].stype != _FORMAT:
        names = ", ".join(f"`{_cut(name)}`" for name in list(record)[:3]) or "none"
        raise UpdateError(
            f"the arrays must be one array, `{_TENSORS}` in {_FORMAT} format, not {names}"
        )
    try:
        return tensor_buffer.views(record[_TENSORS].data)
    except Exception as error:  # a foreign header may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UpdateError(f"array `{_TENSORS}` cannot be read: {_cut(reason)}") from error


def num_bytes(content: RecordDict) -> dict[str, int]:
    """Return the bytes of a message's arrays: ``lora``, ``task_adapters``, ``residual``."""
    sizes = {"lora": 0, "task_adapters": 0}
    for name, record in content.array_records.items():
        size = sum(len(array.data) for array in record.values())
        kind = name if name in ("lora", "residual") else "task_adapters"
        sizes[kind] = sizes.get(kind, 0) + size
    return sizes


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
