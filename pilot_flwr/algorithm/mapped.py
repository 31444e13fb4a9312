"""Tell the system how the mapped files of many clients are read and written.

The system assumes that a file is read in one go: at the first byte that is missing in memory it
reads megabytes around it. Aggregation reads a little of every client's file in turn, and writes a
little of every result's: with 64 clients and less memory than their files take, it would read each
file hundreds of times. Advice changes no value, and none is needed where memory suffices.
"""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[Any] | torch.Tensor

_advise: Callable[[Any, Any, int], int] = ctypes.CDLL(None).madvise


def read_soon(vectors: Sequence[Vector], columns: slice) -> None:
    """Start to read the same elements of contiguous vectors, as far as they are on the disk."""
    for vector in vectors:
        part = vector[columns]
        start = part.data_ptr() if isinstance(part, torch.Tensor) else part.ctypes.data
        _advise_range(start, part.nbytes, mmap.MADV_WILLNEED)


def written_in_pieces(mapped: torch.Tensor, so: bool) -> None:
    """Read no more of a file than the pages that are used, or do so again."""
    _advise_range(mapped.data_ptr(), mapped.nbytes, mmap.MADV_RANDOM if so else mmap.MADV_NORMAL)


def _advise_range(start: int, size: int, advice: int) -> None:
    page = start // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(ctypes.c_void_p(page), ctypes.c_size_t(start + size - page), advice)
