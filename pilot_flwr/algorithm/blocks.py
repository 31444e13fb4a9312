"""Stage columns of many clients' tensors in float64 blocks, and process these in a pool of threads.

The passes of :mod:`pilot_flwr.algorithm.arrays` are functions of one block. Each thread has its own
buffers and calls single-threaded libraries: threads that share one small product wait for each
other, on a busy machine for long. Results are yielded in the order of the blocks, so that sums do
not depend on the number of threads.
"""

import functools
import math
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray

from pilot_flwr.algorithm.mapped import prefetch

BLOCK_ELEMENTS = 1 << 17
"""Elements of a staged (K, width) block: 1 MiB in float64, which stays in the L2 cache."""

_BLOCK_COLUMNS = 2048
"""Minimum number of columns for many clients, so that adding a block's (K, K) product is cheap."""

_THREAD_BYTES = 1 << 29
"""Maximum size of all threads' buffers; larger products are parallelised by BLAS itself."""

# Bytes to prefetch at a time from the mapped files of all clients together.
_READ_AHEAD_BYTES = 1 << 26

Vector: TypeAlias = NDArray[Any] | torch.Tensor

_Rows: TypeAlias = NDArray[np.float64]
_Buffers = TypeVar("_Buffers")
_Result = TypeVar("_Result")


class Columns(NamedTuple):
    """Columns of a tensor of K states, which are given as vectors."""

    name: str
    vectors: list[Vector]
    columns: slice

    def stage(self, buffer: _Rows) -> _Rows:
        """Return the columns as a (K, width) block in `buffer`."""
        width = self.columns.stop - self.columns.start
        block = reshaped(buffer, len(self.vectors), width)
        for row, vector in zip(block, self.vectors, strict=True):
            copy_into(row, vector[self.columns])
        return block


def block_width(states: Sequence[Mapping[str, Vector]]) -> int:
    """Return the number of columns of a block of all clients."""
    widest = max(math.prod(value.shape) for value in states[0].values())
    return max(1, min(widest, max(BLOCK_ELEMENTS // len(states), _BLOCK_COLUMNS)))


def blocks(
    states: Sequence[Mapping[str, Vector]], width: int, *, read: bool = True
) -> Iterator[Columns]:
    """Yield all columns of all tensors, `width` at a time; with `read`, prefetch mapped files."""
    for name in states[0]:
        vectors = [_vector(state[name]) for state in states]
        size = vectors[0].shape[0]
        ahead = width * max(1, _READ_AHEAD_BYTES // (len(states) * width * vectors[0].itemsize))
        for start in range(0, size, width):
            if read and start % ahead == 0:
                prefetch(vectors, slice(start, start + ahead))
            yield Columns(name, vectors, slice(start, min(size, start + width)))


@contextmanager
def one_thread() -> Iterator[int]:
    """Limit torch to one thread within the context; yield the number that it used before."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


@contextmanager
def threads(bytes_each: int) -> Iterator[int]:
    """Yield the number of threads for the blocks; the buffers of one have `bytes_each`.

    Within the context, torch uses one thread, and BLAS an equal share of the cores in each thread.
    """
    with one_thread() as cores:
        number = max(1, min(cores, _THREAD_BYTES // bytes_each))
        with _libraries().limit(limits=cores // number, user_api="blas"):
            yield number


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()  # scans the libraries of the process


def in_threads(
    jobs: Iterable[Callable[[_Buffers], _Result]], buffers: Sequence[_Buffers]
) -> Iterator[_Result]:
    """Run jobs in a pool with one thread per buffer; yield their results in order."""
    free: queue.SimpleQueue[_Buffers] = queue.SimpleQueue()
    for one in buffers:
        free.put(one)

    def run(job: Callable[[_Buffers], _Result]) -> _Result:
        own = free.get()
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # raised as errors by the callers
                return job(own)
        finally:
            free.put(own)

    if len(buffers) == 1:
        yield from map(run, jobs)
        return
    with ThreadPoolExecutor(len(buffers)) as pool:
        pending: deque[Future[_Result]] = deque()
        for job in jobs:
            pending.append(pool.submit(run, job))
            if len(pending) > len(buffers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def copy_into(row: _Rows, part: Vector) -> None:
    """Convert a vector into a row of float64."""
    if isinstance(part, torch.Tensor):
        torch.from_numpy(row).copy_(part)
    else:
        row[:] = part


def reshaped(buffer: _Rows, rows: int, columns: int) -> _Rows:
    """Return the first elements of a buffer as a matrix."""
    return buffer[: rows * columns].reshape(rows, columns)


def _vector(value: Vector) -> Vector:
    """Return all elements of a tensor as a vector; a view where the memory layout allows it.

    An ndarray where numpy has the dtype: its short copies cost a fraction of torch's.
    """
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1)
        return flat if flat.dtype == torch.bfloat16 else flat.numpy()
    return value.reshape(-1)
