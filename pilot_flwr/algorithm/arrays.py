"""Compare, check and reduce the named arrays of several clients.

A *state* is a mapping from names to tensors, each a ``numpy.ndarray`` or a CPU ``torch.Tensor``
of dtype float16, bfloat16 (torch only), float32 or float64. `combine` and `centred_gram` are the
two passes over the values of K states; the equations of :mod:`pilot_flwr.algorithm.aggregation`
are built on them.

Accuracy: products and sums are float64, and results are rounded to the clients' dtype once. Clients
that start from the same base differ by little beside their norms, so inner products are those of
differences to the first client: a common offset cancels before it costs digits.

Time and memory: columns of all clients are staged in blocks, so that every value is read and
converted once per pass, and the inner products use all cores. A mixture costs by the clients that
its row names. Results are written straight into their final arrays. NaN and Inf are found in the
same pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pilot_flwr.algorithm.mapped import read_soon
from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import State

Array: TypeAlias = NDArray[Any] | torch.Tensor
NamedArrays: TypeAlias = Mapping[str, Array]
Matrix: TypeAlias = NDArray[np.float64]

_NUMPY_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_TORCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Elements of a staged (K, width) block: 1 MiB in float64, which stays in the L2 cache. With many
# clients a block has at least so many columns that adding its (K, K) product costs little.
_BLOCK_ELEMENTS = 1 << 17
_BLOCK_COLUMNS = 2048

# Bytes of all clients' mapped files that the system reads ahead together.
_READ_AHEAD_BYTES = 1 << 26

# A sum over the named clients alone costs as much per client as so many of a matrix product.
_DENSE_SPEED = 8


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: synchronising busy cores takes longer than a block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def layout_difference(state: NamedArrays, pattern: NamedArrays, *, dtypes: bool = True) -> str:
    """Describe the first difference between the layouts of two states; empty if there is none.

    Values are not read. Without `dtypes`, only names and shapes must agree.
    """
    missing, unexpected = pattern.keys() - state.keys(), state.keys() - pattern.keys()
    if missing or unexpected:
        return (
            f"missing tensors {sorted(missing)[:3]}, unexpected ones {sorted(unexpected)[:3]} "
            f"({len(missing)} and {len(unexpected)} in all)"
        )
    for name, wanted in pattern.items():
        found = state[name]
        if found.shape != wanted.shape or (dtypes and _kind(found) != _kind(wanted)):
            return f"tensor `{name}` is {_describe(found)} but must be {_describe(wanted)}"
    return ""


def check_states(states: Sequence[NamedArrays], clients: Sequence[int]) -> None:
    """Check that all states share a layout that can be aggregated; values are not read.

    Raises
    ------
    UpdateError
        No client, a state without tensors or of another layout than the first, or a tensor of an
        unsupported container, dtype or device. `clients` are the clients' indices in errors.
    """
    if not states:
        raise UpdateError("There is no client to aggregate.")
    for client, state in zip(clients, states, strict=True):
        if not state:
            raise UpdateError(f"client {client}: the update holds no tensor.")
        for name, value in state.items():
            if not _is_supported(value):
                raise UpdateError(
                    f"client {client}: tensor `{name}` is {_describe(value)}, which cannot be "
                    "aggregated."
                )
        if difference := layout_difference(state, states[0]):
            raise UpdateError(f"client {client}: {difference}, as client {clients[0]}'s.")


def check_tensors(what: str, state: State, expected: State) -> None:
    """Raise `UpdateError` unless a part of an upload has `expected`'s layout and finite values."""
    if difference := layout_difference(state, expected):
        raise UpdateError(f"its {what} does not fit: {difference}")
    for name, tensor in state.items():
        if not math.isfinite(float(torch.sum(tensor, dtype=torch.float64))):
            raise UpdateError(f"`{name}` of its {what} has values that are not finite")


@_one_thread()
@np.errstate(invalid="ignore", over="ignore")  # raised as errors below
def combine(
    states: Sequence[NamedArrays],
    weights: Matrix,
    clients: Sequence[int],
    allocate: Callable[[int], dict[str, Array]] | None = None,
) -> list[dict[str, Array]]:
    """Compute weighted sums of states.

    ::

        S'_r = sum_j W_rj S_j

    Parameters
    ----------
    states : sequence of state
        One per client, checked by :func:`check_states`.
    weights : ndarray, shape (R, K)
        R <= K row-stochastic rows.
    clients : sequence of int
        The clients' indices in errors.
    allocate : callable, optional
        Returns a contiguous state of the inputs' layout, to be filled with the r-th sum. By
        default, states are allocated in memory.

    Returns
    -------
    list of state
        R new states of the inputs' containers and dtypes. Identical bits of all clients with
        weight in a row are kept.

    Raises
    ------
    UpdateError
        A tensor holds NaN or Inf, or its sum overflows.
    """
    rows = len(weights)
    # Allocated before the results: between these, they would fragment the heap.
    staging = _staging(states)
    weighted_sum = _WeightedSum(weights, staging.size // len(states))
    if allocate is None:
        results = [{n: _empty_like(v) for n, v in states[0].items()} for _ in range(rows)]
    else:
        results = [allocate(row) for row in range(rows)]
        assert not any(layout_difference(result, states[0]) for result in results)
    for name in states[0]:
        vectors = [_vector(state[name]) for state in states]
        targets = [_vector(result[name]) for result in results]
        for columns, block in _blocks(vectors, staging):
            if not np.isfinite(block.sum()):  # NaN and Inf survive the sum
                raise _not_finite(name, vectors, clients)
            mixed = weighted_sum(block)
            for target, source in zip(targets, mixed, strict=True):
                _round_into(target[columns], source)
    return results


@np.errstate(invalid="ignore", over="ignore")  # raised as errors below
def centred_gram(states: Sequence[NamedArrays]) -> Matrix:
    """Compute the inner products of the clients' differences to the first client.

    ::

        G = D D^T,   D_k = S_k - S_0   (all tensors as one vector)

    Parameters
    ----------
    states : sequence of state
        One per client, checked by :func:`check_states`.

    Returns
    -------
    ndarray of float64, shape (K, K)
        G.

    Raises
    ------
    UpdateError
        A tensor holds NaN or Inf, or its squares overflow.
    """
    total = np.zeros((len(states), len(states)))
    staging = _staging(states)
    for name in states[0]:
        vectors = [_vector(state[name]) for state in states]
        for _, block in _blocks(vectors, staging):
            block -= block[0].copy()
            total += block @ block.T  # one triangle, mirrored: BLAS `syrk`
        if not np.isfinite(total.trace()):  # NaN and Inf survive the squares
            raise _not_finite(name, vectors, range(len(states)))
    return total


class _WeightedSum:
    """Weighted sums of the rows of a block: over the named rows alone where these are few."""

    def __init__(self, weights: Matrix, width: int) -> None:
        named = weights > 0
        self.most = int(named.sum(axis=1).max())
        # The named clients of each row in order, then the first of them again with weight 0.
        self.clients = np.argsort(~named, axis=1, kind="stable")[:, : self.most]
        unnamed = ~np.take_along_axis(named, self.clients, axis=1)
        self.factors = np.where(unnamed, 0, np.take_along_axis(weights, self.clients, axis=1))
        self.clients = np.where(unnamed, self.clients[:, :1], self.clients)
        self.weights = weights
        self.sparse = _DENSE_SPEED * self.most <= weights.shape[1]
        self.product = np.empty(len(weights) * width)
        # So many rows at once stay in the L2 cache while their clients are added to them.
        self.step = max(1, _BLOCK_ELEMENTS // (2 * width))
        self.gathered = np.empty(self.step * width if self.sparse else 0)

    def __call__(self, block: Matrix) -> Matrix:
        rows, width = len(self.weights), block.shape[1]
        first = block[:, 0]
        if (first == first[0]).all() and (block == block[0]).all():
            return block[:rows]
        mixed = _reshaped(self.product, rows, width)
        if self.sparse:
            self._add_named(block, mixed)
        else:
            factors, source = torch.from_numpy(self.weights), torch.from_numpy(block)
            torch.mm(factors, source, out=torch.from_numpy(mixed))
        # A float64 sum of equal values may be off by a bit, so equal rows are copied.
        leading = first[self.clients]
        for row in np.flatnonzero((leading == leading[:, :1]).all(axis=1)):
            origin, *others = self.clients[row]
            if all((block[other] == block[origin]).all() for other in others):
                mixed[row] = block[origin]
        return mixed

    def _add_named(self, block: Matrix, out: Matrix) -> None:
        for start in range(0, len(out), self.step):
            target = out[start : start + self.step]
            rows = slice(start, start + len(target))
            gathered = _reshaped(self.gathered, *target.shape)
            target[:] = 0
            for place in range(self.most):
                np.take(block, self.clients[rows, place], axis=0, out=gathered, mode="clip")
                gathered *= self.factors[rows, place, None]
                target += gathered


def _staging(states: Sequence[NamedArrays]) -> Matrix:
    """Allocate a block of all clients."""
    clients = len(states)
    widest = max(math.prod(value.shape) for value in states[0].values())
    return np.empty(clients * max(1, min(widest, max(_BLOCK_ELEMENTS // clients, _BLOCK_COLUMNS))))


def _blocks(vectors: Sequence[Array], buffer: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """Yield the columns of K vectors as float64 (K, width) blocks, each staged in `buffer`."""
    size, clients = vectors[0].shape[0], len(vectors)
    width = buffer.size // clients
    ahead = width * max(1, _READ_AHEAD_BYTES // (clients * width * vectors[0].itemsize))
    for start in range(0, size, width):
        if start % ahead == 0:
            read_soon(vectors, slice(start, start + ahead))
        columns = slice(start, min(size, start + width))
        block = _reshaped(buffer, clients, columns.stop - start)
        for row, vector in zip(block, vectors, strict=True):
            part = vector[columns]
            if isinstance(part, torch.Tensor):
                torch.from_numpy(row).copy_(part)
            else:
                row[:] = part
        yield columns, block


def _reshaped(buffer: Matrix, rows: int, columns: int) -> Matrix:
    return buffer[: rows * columns].reshape(rows, columns)


def _round_into(target: Array, source: Matrix) -> None:
    if isinstance(target, torch.Tensor):
        target.copy_(torch.from_numpy(source))
    else:
        np.copyto(target, source, casting="same_kind")


def _kind(value: Array) -> tuple[bool, object]:
    return isinstance(value, torch.Tensor), value.dtype


def _is_supported(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in _TORCH_DTYPES and value.device.type == "cpu"
    return isinstance(value, np.ndarray) and value.dtype in _NUMPY_DTYPES


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"torch {str(value.dtype).removeprefix('torch.')}{device} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype} {value.shape}"
    return f"of type {type(value).__name__}"


def _vector(value: Array) -> Array:
    """Return all elements as a vector; a view where the memory layout allows it.

    An ndarray where numpy has the dtype: its short copies cost a fraction of torch's.
    """
    if isinstance(value, torch.Tensor):
        vector = value.detach().reshape(-1)
        return vector if vector.dtype == torch.bfloat16 else vector.numpy()
    return value.reshape(-1)


def _empty_like(value: Array) -> Array:
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    return np.empty(value.shape, dtype=value.dtype)


def _not_finite(name: str, vectors: Sequence[Array], clients: Sequence[int]) -> UpdateError:
    """Build the error for a tensor whose sum is not finite; name the client at fault."""
    for client, vector in zip(clients, vectors, strict=True):
        finite = vector.isfinite() if isinstance(vector, torch.Tensor) else np.isfinite(vector)
        if not finite.all():
            return UpdateError(f"client {client}: tensor `{name}` holds NaN or Inf.")
    return UpdateError(f"The values of tensor `{name}` are too large to aggregate.")
