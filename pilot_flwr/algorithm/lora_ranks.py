"""LoRAs of different ranks: distances, mixtures and truncation of their products B A.

A client may train a smaller rank r_k than the federation's r. Its factors, A_k (r_k × inputs) and
B_k (outputs × r_k), cannot be averaged with another client's, but the products that they add to
the frozen weights can. With Θ_k for all layers' products of client k, and W from
:mod:`pilot_flwr.algorithm.aggregation`::

    d_kj = || Θ_k - Θ_j ||_F          M_k = Σ_j W_kj B_j A_j   in each layer
    Θ̄_k  = the rank-r_k product B A closest to M_k, in each layer

Every client scales its product by the federation's α / r, whatever its own rank, so that the scale
is a common factor of all of these equations.

No product is built. Inner products are sums over small Gram matrices, and a mixture is one product
of concatenated factors::

    <B_k A_k, B_j A_j> = Σ (B_k^T B_j) ⊙ (A_k A_j^T)
    M_k = [W_k1 B_1, W_k2 B_2, ...] [A_1; A_2; ...] = Q_B (R_B R_A^T) Q_A^T

The SVD U Σ V^T of the core R_B R_A^T gives that of M_k, and its first r_k terms are the closest
product of that rank, in the Frobenius and the spectral norm (Eckart and Young, 1936)::

    || M_k - B A ||_F^2 = Σ_{i > r_k} σ_i^2          A = V^T Q_A^T / √3,   B = √3 Q_B U Σ

The split between A and B is that of a new LoRA: whatever σ is, the rows of A have the length of
drawn ones, 1/√3, the root mean square of a row uniform in ±1/√inputs. So a direction with σ = 0 has
B = 0, as at the start, and can be trained.

Sources: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources" (FlexLoRA), NeurIPS 2024, arXiv 2402.11505; Liu et al., "HLoRA: Efficient
Federated Learning System for LLM Heterogeneous Fine-Tuning", 2025, arXiv 2503.00813. Both average
all clients; here the rows of W may differ.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pilot_flwr.algorithm.aggregation import (
    CANCELLATION,
    check_weights,
    unified,
    weighted_average,
)
from pilot_flwr.algorithm.arrays import Matrix
from pilot_flwr.algorithm.blocks import one_thread
from pilot_flwr.algorithm.fedex_lora import A, B, decompose
from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import State

ROW_LENGTH = 3**-0.5
"""Root of the mean squared length of a row of A as drawn."""


class Truncated(NamedTuple):
    """A mixture truncated to a rank, and ‖M − B A‖_F / ‖M‖_F over all layers, 0 if M is 0."""

    lora: State
    error: float


def rank_of(lora: Mapping[str, Tensor]) -> int:
    """Return the rank of a LoRA of one rank, or of one of its matrices; 0 without tensors."""
    for name, tensor in lora.items():
        sides = tensor.shape or (0,)  # an upload may have a scalar
        return int(sides[0] if name.endswith(A) else sides[-1])
    return 0


def at_rank(lora: State, rank: int) -> State:
    """Return the first `rank` rows of every A and columns of every B.

    Of a drawn LoRA, where B = 0, this is a drawn LoRA of that rank.
    """
    if rank == rank_of(lora):
        return lora
    return {
        name: (tensor[:rank] if name.endswith(A) else tensor[:, :rank]).contiguous()
        for name, tensor in lora.items()
    }


def check_rank(lora: Mapping[str, Tensor], declared: int, largest: int) -> None:
    """Raise `UpdateError` unless all matrices of an upload have the rank that its client declared.

    `largest` is the federation's rank. `check_tensors` reports tensors that are no matrices.
    """
    found: dict[int, str] = {}
    for name, tensor in lora.items():
        if tensor.ndim == 2 and name.endswith((A, B)):
            found.setdefault(rank_of({name: tensor}), name)
    if len(found) > 1:
        first, second = [f"{rank} in `{name}`" for rank, name in found.items()][:2]
        raise UpdateError(f"the rank of its LoRA is {first} but {second}; it must be the same")
    for rank in found:
        if not 1 <= rank <= largest:
            raise UpdateError(
                f"the rank of its LoRA is {rank} but must be from 1 to {largest}, `model.lora.rank`"
            )
        if rank != declared:
            raise UpdateError(
                f"the rank of its LoRA is {rank} but must be {declared}, as the client declared"
            )


@one_thread()  # so that a result does not depend on the number of cores
def product_distances(loras: Sequence[State]) -> Matrix:
    """Compute the distance between the products of every two LoRAs, all layers as one vector.

    ::

        d_kj^2 = G_kk + G_jj - 2 G_kj,   G_kj = Σ_layers Σ (B_k^T B_j) ⊙ (A_k A_j^T)

    Parameters
    ----------
    loras : sequence of state
        One per client, with the same layers, each client of one rank.

    Returns
    -------
    ndarray of float64, shape (K, K)
        Symmetric, exactly 0 on the diagonal and between identical clients.

    Raises
    ------
    UpdateError
        No client, layers that differ, NaN or Inf.

    Notes
    -----
    Costs (Σ r_k)² (inputs + outputs) products per layer, in float64. Pairs so close together that G
    cancels are computed again, from the QR decompositions of [B_k, -B_j] and [A_k; A_j].
    """
    layers = _layers(loras)
    starts = np.cumsum([0, *(rank_of(lora) for lora in loras[:-1])])
    gram = np.zeros((len(loras), len(loras)))
    for layer in layers:
        left, right = _concatenated(loras, layer, [1.0] * len(loras))
        products = ((left.T @ left) * (right @ right.T)).numpy()
        gram += np.add.reduceat(np.add.reduceat(products, starts, axis=0), starts, axis=1)
        if not np.isfinite(gram.trace()):
            raise UpdateError(f"The LoRA of layer `{layer}` holds NaN or Inf, or is too large.")
    norms = gram.diagonal()
    scale = norms[:, None] + norms[None, :]
    squared: Matrix = scale - (gram + gram.T)
    np.fill_diagonal(squared, 0)
    for k, j in zip(*np.nonzero(np.triu(squared < CANCELLATION * scale, 1)), strict=True):
        squared[k, j] = squared[j, k] = _squared_distance(loras[k], loras[j], layers)
    return unified(np.sqrt(squared))


@one_thread()
def mix_products(
    loras: Sequence[State],
    weights: Matrix,
    results: Sequence[tuple[int, int]],
    *,
    spare: State,
    allocate: Callable[[int, State], State] | None = None,
) -> list[Truncated]:
    """Mix the products of all clients; truncate each mixture to the rank of its receiver.

    ::

        Θ̄ = argmin over rank <= r of || B A - Σ_j W_kj B_j A_j ||_F   in each layer

    Parameters
    ----------
    loras : sequence of state
        One per client, with the same layers and dtypes, each client of one rank.
    weights : ndarray, shape (K, K)
        Row-stochastic.
    results : sequence of (int, int)
        Row k of `weights` and rank r of every result, at least 1.
    spare : state
        A drawn LoRA. Where a mixture has fewer directions than r, its rows of A fill the rest.
    allocate : callable, optional
        Returns a state like the second argument for a result, given by its index in `results`.
        Results of equal weights and rank share the state of the first of them. By default, states
        are allocated in memory.

    Returns
    -------
    list of Truncated
        One per result, in the dtype of the clients. A mixture of one client at its own rank is that
        client's LoRA, bit for bit.

    Raises
    ------
    UpdateError
        As in :func:`product_distances`, or weights that are not row-stochastic.
    """
    layers, matrix = _layers(loras), check_weights(weights, len(loras))
    rows = [matrix[row].tobytes() for row, _ in results]
    targets: dict[bytes, dict[int, State]] = {}
    for index, (row, (_, rank)) in enumerate(zip(rows, results, strict=True)):
        of_row = targets.setdefault(row, {})
        if rank not in of_row:
            layout = at_rank(spare, rank)
            if allocate is not None:
                of_row[rank] = allocate(index, layout)
            else:
                of_row[rank] = {
                    name: torch.empty(t.shape, dtype=t.dtype) for name, t in layout.items()
                }
    errors = {
        row: _fill(loras, np.frombuffer(row), layers, of_row, spare)
        for row, of_row in targets.items()
    }
    return [
        Truncated(targets[row][rank], errors[row][rank])
        for row, (_, rank) in zip(rows, results, strict=True)
    ]


def truncated(lora: State, rank: int, spare: State) -> State:
    """Return a LoRA at another rank.

    A smaller rank has the closest product; a larger one has the same product, and rows of A of
    `spare` for the new directions.
    """
    if not lora or rank == rank_of(lora):
        return lora
    return mix_products([lora], np.ones((1, 1)), [(0, rank)], spare=spare)[0].lora


def newcomer_lora(
    task_of: Mapping[str, str],
    load: Callable[[str], State],
    task: str,
    *,
    rank: int,
    spare: State,
) -> State:
    """Return the LoRA of a client that has none: the mean over its task's clients, else over all.

    If any client has another rank than `spare`, the mean is that of the products B A.

    Parameters
    ----------
    task_of : Mapping[str, str]
        Task of every client that has a LoRA.
    load : callable
        Maps such a client to its LoRA.
    task : str
        Task of the newcomer.
    rank : int
        Rank of the newcomer.
    spare : state
        The federation's drawn LoRA. If no client has trained, the newcomer gets its first rows of A
        and columns of B.

    Returns
    -------
    State
        Without tensors if LoRAs are not shared.
    """
    peers = sorted(c for c, other in task_of.items() if other == task) or sorted(task_of)
    if not peers:
        return at_rank(spare, rank)
    loras = [load(peer) for peer in peers]
    if not any(loras):
        return {}
    if all(one == rank_of(spare) for one in (rank, *map(rank_of, map(load, task_of)))):
        # Aggregating tensors yields tensors.
        return cast(State, weighted_average(loras, [1] * len(loras)))
    weights = np.full((len(loras), len(loras)), 1 / len(loras))
    return mix_products(loras, weights, [(0, rank)], spare=spare)[0].lora


def _layers(loras: Sequence[State]) -> list[str]:
    """Return the layers' names; raise `UpdateError` unless all clients have the same."""
    if not loras or not loras[0]:
        raise UpdateError("There is no client to aggregate.")
    for client, lora in enumerate(loras):
        if lora.keys() != loras[0].keys():
            raise UpdateError(f"client {client}: its LoRA has other layers than client 0's.")
        try:
            check_rank(lora, rank_of(lora), rank_of(lora))
        except UpdateError as error:
            raise UpdateError(f"client {client}: {error}.") from None
    return [name.removesuffix(A) for name in loras[0] if name.endswith(A)]


def _concatenated(
    loras: Sequence[State], layer: str, shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the factors of the weighted sum of a layer's products, in float64."""
    left = [share * lora[layer + B].double() for lora, share in zip(loras, shares, strict=True)]
    return torch.cat(left, dim=1), torch.cat([lora[layer + A].double() for lora in loras])


def _squared_distance(one: State, other: State, layers: Sequence[str]) -> float:
    """Return the squared distance of two products, to the rounding of the products themselves."""
    if all(torch.equal(tensor, other[name]) for name, tensor in one.items()):
        return 0.0
    total = 0.0
    for layer in layers:
        left, right = _concatenated([one, other], layer, (1.0, -1.0))
        core = torch.linalg.qr(left, "r").R @ torch.linalg.qr(right.T, "r").R.T
        total += float(core.square().sum())
    return total


def _fill(
    loras: Sequence[State],
    shares: Matrix,
    layers: Sequence[str],
    targets: Mapping[int, State],
    spare: State,
) -> dict[int, float]:
    """Write one mixture into states of different ranks; return the relative error of each."""
    used = np.flatnonzero(shares)
    mixed = [loras[client] for client in used.tolist()]
    whole, lost, most = 0.0, dict.fromkeys(targets, 0.0), max(targets)
    for layer in layers:
        left, right = _concatenated(mixed, layer, shares[used].tolist())
        if (missing := most - len(right)) > 0:
            right = torch.cat([right, spare[layer + A][:missing].double()])
            left = torch.cat([left, left.new_zeros(len(left), len(right) - left.shape[1])], dim=1)
        if not bool(torch.isfinite(left.sum() + right.sum())):
            raise UpdateError(f"The LoRA of layer `{layer}` holds NaN or Inf.")
        svd = decompose(left, right)
        outputs = (svd.left @ (svd.u[:, :most] * svd.values[:most])) / ROW_LENGTH
        inputs = (svd.v[:most] @ svd.right.T) * ROW_LENGTH
        squares = svd.values.square()
        whole += float(squares.sum())
        for rank, target in targets.items():
            if len(mixed) == 1 and rank == rank_of(mixed[0]):
                target[layer + A].copy_(mixed[0][layer + A])
                target[layer + B].copy_(mixed[0][layer + B])
                continue
            lost[rank] += float(squares[rank:].sum())
            for name, dim, values in ((A, 0, inputs), (B, 1, outputs)):
                given = min(rank, values.shape[dim])  # a layer may be smaller than the rank
                tensor = target[layer + name].zero_()
                tensor.narrow(dim, 0, given).copy_(values.narrow(dim, 0, given))
    return {rank: (tail / whole) ** 0.5 if whole else 0.0 for rank, tail in lost.items()}
