"""Rank the neighbours of every client by distance, and choose them by grouping the clients.

:func:`pilot_flwr.algorithm.aggregation.adaptive_weights` takes the number of neighbours M from the
configuration (the paper), or every client's neighbours from :func:`grouped_neighbors`.

Source: docs/explanation/method.md, section 4.
"""

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.algorithm.arrays import Matrix
from pilot_flwr.errors import UpdateError

Indices = NDArray[np.intp]


def grouped_neighbors(distances: Matrix) -> NDArray[np.bool_]:
    """Group the clients so that the mean of the others of its group is close to each client.

    ::

        minimise  sum_C e(C),   e(C) = sum_{k in C} || S_k - mean_{j in C, j != k} S_j ||^2
                                     = |C| / (|C| - 1)^2  sum_{i < j in C} d_ij^2

    over the groupings C that the tree of average linkage of the d_ij^2 contains: from the leaves
    up, a node is one group if its e is not above the sum of the best of its two parts. A client
    alone has its nearest client as its only neighbour, and e = d^2 of it.

    The mean is without the client's own LoRA, so e is an error of prediction, as in leave-one-out
    cross-validation. With S_j = T_j + noise of length s, independent between clients, it is
    ``s^2 (1 + 1 / (|C| - 1)) + || T_k - mean T_j ||^2`` for each client on average: a larger group
    of the same kind reduces the variance, clients of another kind add bias.

    Parameters
    ----------
    distances : ndarray, shape (K, K)
        Euclidean, finite and not negative; the diagonal is ignored.

    Returns
    -------
    ndarray of bool, shape (K, K)
        Whether client j is a neighbour of client k; at least one of each row, for K > 1. Does not
        depend on the unit of the distances.

    Raises
    ------
    UpdateError
        `distances` are not as above.
    """
    others = check_distances(distances)
    neighbors = np.zeros(others.shape, dtype=bool)
    if len(others) < 2:
        return neighbors
    from scipy.cluster.hierarchy import linkage  # slow to import, and seldom needed

    nearest = rank_others(others)[:, 0]
    squares = (others / (others.max() or 1)) ** 2  # scaled: they neither overflow nor vanish
    clients = range(len(others))
    members = [[k] for k in clients]
    groups = [[[k]] for k in clients]
    pairs = [0.0 for k in clients]
    errors = [float(squares[k, nearest[k]]) for k in clients]
    tree = linkage(squares[np.triu_indices(len(others), 1)], "average")
    for left, right in tree[:, :2].astype(int):
        joined = members[left] + members[right]
        between = float(squares[np.ix_(members[left], members[right])].sum())
        pairs.append(pairs[left] + pairs[right] + between)
        together = len(joined) / (len(joined) - 1) ** 2 * pairs[-1]
        apart = errors[left] + errors[right]
        members.append(joined)
        groups.append([joined] if together <= apart else groups[left] + groups[right])
        errors.append(min(together, apart))
    for group in groups[-1]:
        neighbors[np.ix_(group, group)] = True
    np.fill_diagonal(neighbors, False)
    alone = np.flatnonzero(~neighbors.any(axis=1))
    neighbors[alone, nearest[alone]] = True
    return neighbors


def rank_others(distances: Matrix) -> Indices:
    """Return the other clients by distance, (K, K - 1); ties go to the lower index."""
    keyed = distances.copy()
    # The diagonal is infinite, so it sorts last.
    np.fill_diagonal(keyed, np.inf)
    return np.argsort(keyed, axis=1, kind="stable")[:, : len(keyed) - 1]


def inverse_distances(near: Matrix) -> Matrix:
    """Return 1 / d, scaled to at most 1 in each row of ascending distances; 0 / 0 is 1."""
    closest = near.min(axis=1, keepdims=True, initial=np.inf)
    # closest / d instead of 1 / d: the same ratios, and no overflow. Its limit at 0 is (d == 0).
    inverse: Matrix = (near == 0).astype(np.float64)
    np.divide(closest, near, out=inverse, where=closest > 0)
    return inverse


def check_distances(distances: Matrix) -> Matrix:
    """Return a copy of distances with a diagonal of 0; raise `UpdateError` if they cannot be."""
    checked = np.array(distances, dtype=np.float64)
    if checked.ndim != 2 or checked.shape[0] != checked.shape[1]:
        raise UpdateError(f"The distances have shape {checked.shape} but must be square.")
    np.fill_diagonal(checked, 0)
    if not np.all(np.isfinite(checked) & (checked >= 0)):
        raise UpdateError("The distances must be finite and not negative.")
    return checked
