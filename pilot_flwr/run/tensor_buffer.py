"""Tensors in one buffer in the safetensors format: write with one copy, read with none.

Files and messages have the same layout: eight bytes for the length of a JSON header, the header
with each tensor's dtype, shape and offsets, then the tensors without gaps. The safetensors library
reads this layout too, but copies every tensor of a buffer and maps only files.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from pilot_flwr.protocol import State

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {name: code for code, name in _DTYPES.items()}
_METADATA = "__metadata__"
_MOST_DIMENSIONS = 16
_LONGEST_HEADER = 2**22  # 30,000 tensors; parsed, it takes thirty times its length


def layout(tensors: State, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Return the bytes before the first tensor, and the total number of bytes."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    header |= dict.fromkeys(tensors)
    end = 0
    for name in _in_order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def contents(tensors: State) -> Iterator[Any]:
    """Yield the bytes of each tensor, without a copy if it is contiguous on the CPU."""
    import torch

    for name in _in_order(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        vector = tensor.as_strided((tensor.numel(),), (1,))  # one element may have any stride
        yield vector.view(torch.uint8).numpy()


def _in_order(tensors: State) -> list[str]:
    """Return the names in the order of storage, which aligns every tensor."""
    return sorted(tensors, key=lambda name: -tensors[name].itemsize)


def views(buffer: Any) -> State:
    """Return the tensors in a buffer as views; raise `ValueError` if its header is inconsistent.

    Nothing is allocated before the header has been compared with the buffer. Do not write to the
    views of a read-only buffer.
    """
    import torch

    memory = memoryview(buffer)
    length = int.from_bytes(memory[:8], "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes but must have at most {_LONGEST_HEADER}")
    if len(memory) < 8 + length:
        raise ValueError(f"it has {len(memory)} bytes but its header says {length}")
    header = json.loads(bytes(memory[8 : 8 + length]), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    header.pop(_METADATA, None)
    places = {name: _place(name, row) for name, row in header.items()}
    end = 0
    for start, stop in sorted(place for *_, place in places.values()):
        if start != end:
            raise ValueError("its header says that tensors overlap or leave a gap")
        end = stop
    if 8 + length + end != len(memory):
        raise ValueError(f"it has {len(memory)} bytes but its header says {8 + length + end}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        everything = torch.frombuffer(memory, dtype=torch.uint8)[8 + length :]
    return {
        name: everything[start:stop].view(getattr(torch, dtype)).view(shape)
        for name, (dtype, shape, (start, stop)) in places.items()
    }


def _place(name: str, row: Any) -> tuple[str, list[int], tuple[int, int]]:
    """Return a tensor's dtype, shape and offsets; raise `ValueError` unless they agree."""
    import torch

    dtype, shape, (start, stop) = _DTYPES[row["dtype"]], row["shape"], row["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"the shape of `{name[:99]}` has more than {_MOST_DIMENSIONS} dimensions")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise ValueError(f"shape or offsets of `{name[:99]}` are not whole numbers")
    if stop - start != math.prod(shape) * getattr(torch, dtype).itemsize:
        raise ValueError(
            f"its header says {dtype} {tuple(shape)} for `{name[:99]}`, and {stop - start} bytes"
        )
    return dtype, shape, (start, stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found
