"""Compare, check and reduce the named arrays of several clients.

A *state* is a mapping from names to tensors, each a ``numpy.ndarray`` or a CPU ``torch.Tensor``
of dtype float16, bfloat16 (torch only), float32 or float64. `combine`, `centred_gram` and
`sketch` are the passes over the values of K states; the equations of
:mod:`pilot_flwr.algorithm.aggregation` are built on them.

Accuracy: products and sums are float64, and results are rounded to the clients' dtype once. Clients
that start from the same base differ by little beside their norms, so inner products are those of
differences to the first client: a common offset cancels before it costs digits.

Time and memory: columns of all clients are staged in blocks, so that every value is read and
converted once per pass (:mod:`pilot_flwr.algorithm.blocks`); inner products use all cores. The time
of a weighted sum grows with the number of its nonzero weights. Results are written into their final
arrays. NaN and Inf are found in the same pass.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pilot_flwr.algorithm.blocks import (
    BLOCK_ELEMENTS,
    Columns,
    block_width,
    blocks,
    copy_into,
    in_threads,
    one_thread,
    reshaped,
    threads,
)
from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import State

Array: TypeAlias = NDArray[Any] | torch.Tensor
NamedArrays: TypeAlias = Mapping[str, Array]
Matrix: TypeAlias = NDArray[np.float64]

_NUMPY_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_TORCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Per client, a sum over the nonzero weights alone takes this many times as long as a product.
_DENSE_SPEED = 8


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


@one_thread()  # several wait for the same memory, and cost more than they save
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
        R new states of the inputs' containers and dtypes. A value that is the same in all clients
        with weight in a row is kept bit for bit.

    Raises
    ------
    UpdateError
        A tensor holds NaN or Inf, or its sum overflows.
    """
    rows, width = len(weights), block_width(states)

    # Allocated before the results: between these, they would fragment the heap.
    weighted_sum, staging = _WeightedSum(weights, width), np.empty(len(states) * width)
    if allocate is None:
        results = [{n: _empty_like(v) for n, v in states[0].items()} for _ in range(rows)]
    else:
        results = [allocate(row) for row in range(rows)]
        assert not any(layout_difference(result, states[0]) for result in results)
    # By name: a given state may order its tensors otherwise.
    targets = [{name: result[name] for name in states[0]} for result in results]
    places = zip(blocks(states, width), blocks(targets, width, read=False), strict=True)
    for source, target in places:
        block = source.stage(staging)
        if not np.isfinite(block.sum()):  # NaN and Inf survive the sum
            raise _not_finite(source.name, source.vectors, clients)
        for vector, mixed in zip(target.vectors, weighted_sum(block), strict=True):
            _round_into(vector[target.columns], mixed)
    return results


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
    clients, width = len(states), block_width(states)
    total = np.zeros((clients, clients))

    def product(source: Columns, staging: Matrix) -> tuple[Columns, Matrix]:
        block = source.stage(staging)
        block -= block[0].copy()
        return source, block @ block.T  # one triangle, mirrored: BLAS `syrk`

    with threads(8 * (clients * width + 2 * clients**2)) as number:
        staging = [np.empty(clients * width) for _ in range(number)]
        jobs = (functools.partial(product, source) for source in blocks(states, width))
        for source, part in in_threads(jobs, staging):
            total += part
            if not np.isfinite(total.trace()):  # NaN and Inf survive the squares
                raise _not_finite(source.name, source.vectors, range(clients))
    return total


@np.errstate(invalid="ignore", over="ignore")  # raised as errors below
def sketch(states: Sequence[NamedArrays], size: int, generator: np.random.Generator) -> Matrix:
    """Project the clients' differences to the first client onto `size` sums with random signs.

    ::

        Y_kc = sum_{i: h(i) = c} s_i D_ki,   D_k = S_k - S_0   (all tensors as one vector)

    The signs s_i are independent. Each run of at most `size` consecutive values maps to consecutive
    columns, cyclically from a random one, so two values share a column with probability at most
    1 / size.

    Parameters
    ----------
    states : sequence of state
        One per client, checked by :func:`check_states`.
    size : int
        Columns m of the sketch.
    generator : numpy.random.Generator
        Draws s and h, which depend only on its seed, `size` and the states' layout.

    Returns
    -------
    ndarray of float64, shape (K, size)
        Y; identical clients have identical rows, and the first client's is 0.

    Raises
    ------
    UpdateError
        A tensor holds NaN or Inf, or its sums overflow.
    """
    sketches = np.zeros((len(states), size))
    reference, row = np.empty((2, size))
    for name, vectors, columns in blocks(states, size):
        width = columns.stop - columns.start
        signs, first = 1.0 - 2 * generator.integers(0, 2, width), int(generator.integers(size))
        fits = min(width, size - first)
        copy_into(reference[:width], vectors[0][columns])
        for one, total in zip(vectors, sketches, strict=True):
            copy_into(row[:width], one[columns])
            row[:width] -= reference[:width]
            row[:width] *= signs
            total[first : first + fits] += row[:fits]
            total[: width - fits] += row[fits:width]
        if columns.stop == vectors[0].shape[0] and not np.isfinite(sketches.sum()):
            raise _not_finite(name, vectors, range(len(states)))  # they survive the sums
    return sketches


class _WeightedSum:
    """Weighted sums of the rows of a block, over the rows with nonzero weight alone if few."""

    def __init__(self, weights: Matrix, width: int) -> None:
        named = weights > 0
        self.most = int(named.sum(axis=1).max())
        # The clients with weight in each row, padded with the first of them at weight 0.
        self.clients = np.argsort(~named, axis=1, kind="stable")[:, : self.most]
        unnamed = ~np.take_along_axis(named, self.clients, axis=1)
        self.factors = np.where(unnamed, 0, np.take_along_axis(weights, self.clients, axis=1))
        self.clients = np.where(unnamed, self.clients[:, :1], self.clients)
        self.weights = weights
        self.sparse = _DENSE_SPEED * self.most <= weights.shape[1]
        self.product = np.empty(len(weights) * width)
        # Number of rows that stay in the L2 cache while clients are added to them.
        self.step = max(1, BLOCK_ELEMENTS // (2 * width))
        self.gathered = np.empty(self.step * width if self.sparse else 0)

    def __call__(self, block: Matrix) -> Matrix:
        rows, width = len(self.weights), block.shape[1]
        first = block[:, 0]
        if (first == first[0]).all() and (block == block[0]).all():
            return block[:rows]
        mixed = reshaped(self.product, rows, width)
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
            gathered = reshaped(self.gathered, *target.shape)
            target[:] = 0
            for place in range(self.most):
                np.take(block, self.clients[rows, place], axis=0, out=gathered, mode="clip")
                gathered *= self.factors[rows, place, None]
                target += gathered


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
