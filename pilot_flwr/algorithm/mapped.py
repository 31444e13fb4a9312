"""Advise the kernel how the mapped files of many clients are accessed (``madvise``).

By default, a page fault reads megabytes around the missing page. Aggregation reads a little of
every client's file in turn, and writes a little of every result's: with 64 clients and less memory
than their files take, it would read each file hundreds of times. The advice changes no value, and
none is needed if memory suffices.
"""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import
    from numpy.typing import NDArray
    from torch import Tensor

_advise: Callable[[Any, Any, int], int] = ctypes.CDLL(None).madvise


def prefetch(vectors: Sequence["NDArray[Any] | Tensor"], columns: slice) -> None:
    """Start to read the same elements of contiguous vectors from disk, where they are mapped."""
    for vector in vectors:
        part = vector[columns]
        start = part.data_ptr() if hasattr(part, "data_ptr") else part.ctypes.data
        _advise_range(start, part.nbytes, mmap.MADV_WILLNEED)


def read_around(mapped: "Tensor", enabled: bool) -> None:
    """Let page faults of a mapped file read the pages around them, or the missing page alone."""
    advice = mmap.MADV_NORMAL if enabled else mmap.MADV_RANDOM
    _advise_range(mapped.data_ptr(), mapped.nbytes, advice)


def _advise_range(start: int, size: int, advice: int) -> None:
    page = start // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(ctypes.c_void_p(page), ctypes.c_size_t(start + size - page), advice)
