"""FedEx-LoRA: the residual between the mean of low-rank products and the product of their means.

Pure functions over named arrays (*states*, see :mod:`pilot_flwr.algorithm.arrays`). A LoRA has
tensors ``<layer>.lora_A``, shape (r, inputs), and ``<layer>.lora_B``, shape (outputs, r).

Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Large Language Models", ACL 2025 (arXiv 2410.09432); p_k is 1 / K there.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pilot_flwr.algorithm.aggregation import group_weights
from pilot_flwr.algorithm.arrays import Array, NamedArrays, check_states

A, B = ".lora_A", ".lora_B"


def product_residual(
    states: Sequence[NamedArrays],
    num_examples: Sequence[float],
    mean: NamedArrays,
    previous: NamedArrays | None = None,
) -> dict[str, Array]:
    """Compute the residual of a federated average of LoRAs, as another LoRA.

    ::

        R = R_prev + Σ_k p_k B_k A_k − B̄ Ā,    p_k = n_k / Σ_j n_j

    If client k's weights are W + s R_prev + s B_k A_k, W + s R + s B̄ Ā is exactly their mean.

    Parameters
    ----------
    states : sequence of state
        One LoRA per client, with the same names, shapes and dtypes.
    num_examples : sequence of float
        n_k, positive and finite.
    mean : state
        Ā and B̄ as sent to the clients, including rounding.
    previous : state, optional
        R_prev, as the clients have it.

    Returns
    -------
    state
        Factors of R in float64 if the LoRAs are, else float32. Their rank is R's numerical rank in
        float64, at most (K + 1) r above the previous one. A layer whose R is zero has no entry, so
        one client, or identical ones, leave none.

    Raises
    ------
    UpdateError
        No client, tensors that do not match, or a wrong number of examples.

    Notes
    -----
    The factors of all terms are concatenated and decomposed by QR and SVD in float64, without
    building the layer's full matrix.
    """
    check_states(states, range(len(states)))
    shares = group_weights([""] * len(states), num_examples)[0]
    residual: dict[str, Array] = {}
    for name in mean:
        if not name.endswith(A):
            continue
        layer = name.removesuffix(A)
        terms = [
            (p * _wide(state[layer + B]), _wide(state[name]))
            for p, state in zip(shares.tolist(), states, strict=True)
        ]
        terms.append((-_wide(mean[layer + B]), _wide(mean[name])))
        if previous and name in previous:
            terms.append((_wide(previous[layer + B]), _wide(previous[name])))
        outputs, inputs = _compressed(
            torch.cat([b for b, _ in terms], dim=1), torch.cat([a for _, a in terms])
        )
        if len(inputs):
            residual[name] = _like(mean[name], inputs)
            residual[layer + B] = _like(mean[name], outputs)
    return residual


def largest_residual(
    lora: Mapping[str, tuple[int, ...]], *, terms: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the largest residual, from those of one client's LoRA.

    `terms` is the number of low-rank products in the residual: K + 1 per exchange.
    """
    largest: dict[str, tuple[int, ...]] = {}
    for name, (rank, inputs) in lora.items():
        if name.endswith(A):
            factor = name.removesuffix(A) + B
            outputs = lora[factor][0]
            rank = min(terms * rank, outputs, inputs)
            largest[name], largest[factor] = (rank, inputs), (outputs, rank)
    return largest


def joined(lora: NamedArrays, residual: NamedArrays) -> dict[str, Tensor]:
    """Concatenate the factors of two LoRAs, so that their products add up.

    `residual` may lack layers. Every layer is padded with zeros to the same rank, the LoRA's plus
    the residual's largest.
    """
    extra = max((len(tensor) for name, tensor in residual.items() if name.endswith(A)), default=0)
    whole: dict[str, Tensor] = {}
    for name, value in lora.items():
        tensor = torch.as_tensor(value)
        dim = 0 if name.endswith(A) else 1
        shape = list(tensor.shape)
        shape[dim] = extra
        part = tensor.new_zeros(shape)
        if name in residual:
            more = torch.as_tensor(residual[name]).to(tensor.dtype)
            part.narrow(dim, 0, more.shape[dim]).copy_(more)
        whole[name] = torch.cat([tensor, part], dim=dim)
    return whole


class Decomposition(NamedTuple):
    """Factors of a product, ``left @ (u * values) @ v @ right.T``.

    The columns of `left`, `u` and `right` and the rows of `v` are orthonormal.
    """

    left: Tensor
    u: Tensor
    values: Tensor
    """Singular values, largest first."""
    v: Tensor
    right: Tensor


def decompose(left: Tensor, right: Tensor) -> Decomposition:
    """Return the singular value decomposition of ``left @ right`` without building the product."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return Decomposition(q_left, u, values, v, q_right)


def _compressed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of ``left @ right``, of its numerical rank and of equal norms."""
    q_left, u, values, v, q_right = decompose(left, right)
    # Smaller singular values are indistinguishable from the rounding of the products.
    rounding = sum(left.shape) * torch.finfo(torch.float64).eps
    rank = int((values > rounding * left.norm() * right.norm()).sum())
    roots = values[:rank].sqrt()
    return q_left @ (u[:, :rank] * roots), (roots[:, None] * v[:rank]) @ q_right.T


def _wide(value: Array) -> Tensor:
    return torch.as_tensor(value).detach().to(torch.float64)


def _like(template: Array, values: Tensor) -> Array:
    """Return values in the template's container, in float64 or float32."""
    exact = torch.as_tensor(template).dtype == torch.float64
    tensor = values.contiguous() if exact else values.float().contiguous()
    return tensor.numpy() if isinstance(template, np.ndarray) else tensor
