"""Distances between clients, exact however close they lie together.

A pure function over named arrays (*states*, see :mod:`pilot_flwr.arrays`).

Source: Pilot (Xiong et al., AAAI 2025, arXiv 2501.13985), "Adaptive Text-Adapter Aggregation".
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.arrays import Matrix, State, centred_gram, check_states

# Below this share of G_kk + G_jj, G_kk + G_jj - 2 G_kj has lost too many of its 16 digits.
_CANCELLATION = 1e-6


def pairwise_distances(states: Sequence[State]) -> Matrix:
    """Compute the Euclidean distance between every two states, all tensors as one vector.

    ::

        d_kj = || S_k - S_j ||_2,   d_kj^2 = G_kk + G_jj - 2 G_kj,   G = D D^T,   D_k = S_k - S_0

    Parameters
    ----------
    states : sequence of state
        One state per client, K in all, with the same names, shapes and dtypes.

    Returns
    -------
    ndarray of float64, shape (K, K)
        Symmetric, exactly 0 on the diagonal and between identical clients.

    Raises
    ------
    UpdateError
        If there is no client, the tensors do not match, or one of them holds NaN or Inf.

    Notes
    -----
    Differences and products are float64. Pairs that lie so close together, and so far from client
    0, that G cancels are computed again relative to one of themselves: one more pass per such
    cluster. docs/design.md section 4.
    """
    check_states(states, range(len(states)))
    distances = np.sqrt(_squared_distances(states))
    # Copies of one client get one row, so that rounding cannot decide the ties between them.
    original = (distances == 0).argmax(axis=1)
    unified: Matrix = distances[np.ix_(original, original)]
    return unified


def _squared_distances(states: Sequence[State]) -> Matrix:
    """Return the squared distances, exact to about 1e-9 relative wherever they are not 0."""
    gram = centred_gram(states)
    norms = gram.diagonal()
    scale = norms[:, None] + norms[None, :]
    squared: Matrix = scale - (gram + gram.T)
    np.fill_diagonal(squared, 0)
    cancelled = squared < _CANCELLATION * scale
    np.fill_diagonal(cancelled, False)
    # Client 0 is the origin and never among the cancelled, so that the recursion ends.
    for cluster in _components(cancelled):
        squared[np.ix_(cluster, cluster)] = _squared_distances([states[k] for k in cluster])
    return squared


def _components(linked: NDArray[np.bool_]) -> list[list[int]]:
    """Return the connected components with at least two members of a symmetric relation."""
    labels = np.arange(len(linked))
    for _ in labels:  # a label crosses one link per step, and no path is longer than K
        labels = np.minimum(labels, np.where(linked, labels, len(labels)).min(axis=1))
    groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return [group for group in groups if len(group) > 1]
