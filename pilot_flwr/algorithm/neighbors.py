"""Rank the neighbours of every client by distance, and choose how many of them ATA mixes.

:func:`pilot_flwr.algorithm.aggregation.adaptive_weights` takes the number of neighbours M from the
configuration (the paper) or, client by client, from :func:`closest_mean_neighbors`.

Source: docs/explanation/method.md, section 4.
"""

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.algorithm.arrays import Matrix
from pilot_flwr.errors import UpdateError

Indices = NDArray[np.intp]


def closest_mean_neighbors(distances: Matrix) -> Indices:
    """Choose each client's number of neighbours, so that their mean is closest to its own LoRA.

    ::

        M_k = argmin_M || S_k - 1/M sum_{j in N_M(k)} S_j ||^2,   N_M(k): the M nearest clients
            = argmin_M  1/M sum_j d_kj^2 - 1/M^2 sum_{i < j} d_ij^2

    The client's own LoRA is no part of the mean, so this is an error of prediction, as in
    leave-one-out cross-validation. With S_j = T_j + e_j and noise e_j that is independent between
    clients, it is on average::

        | e_k |^2 + 1/M^2 sum_j | e_j |^2 + || T_k - 1/M sum_j T_j ||^2

    The first term does not depend on M. More neighbours of the same kind reduce the second,
    neighbours of another kind increase the third.

    Clients at the same distance are neighbours together, and of equal errors the first counts.

    Parameters
    ----------
    distances : ndarray, shape (K, K)
        Euclidean, finite and not negative; the diagonal is ignored.

    Returns
    -------
    ndarray of int, shape (K,)
        From 1 to K - 1, and 1 for K = 1. Does not depend on the unit of the distances.

    Raises
    ------
    UpdateError
        `distances` are not as above.

    Notes
    -----
    Costs K^3 additions, and the memory of 5 K^2 float64.
    """
    others = check_distances(distances)
    chosen = np.ones(len(others), dtype=np.intp)
    if len(others) < 2:
        return chosen
    squares = (others / (others.max() or 1)) ** 2  # scaled: they neither overflow nor vanish
    numbers = np.arange(1, len(others))
    place = np.empty(len(others), dtype=np.intp)
    for k, nearest in enumerate(rank_others(others)):
        place[k], place[nearest] = len(others), numbers
        # For every client, the squared distances to those that are closer to k.
        closer = (squares * (place < place[:, None])).sum(axis=1)
        errors = np.cumsum(squares[k, nearest]) / numbers - np.cumsum(closer[nearest]) / numbers**2
        errors[:-1][np.diff(others[k, nearest]) == 0] = np.inf
        chosen[k] = numbers[np.argmin(errors)]
    return chosen


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
    """Return a copy with a diagonal of 0; raise `UpdateError` for values that no distance has."""
    checked = np.array(distances, dtype=np.float64)
    if checked.ndim != 2 or checked.shape[0] != checked.shape[1]:
        raise UpdateError(f"The distances have shape {checked.shape} but must be square.")
    np.fill_diagonal(checked, 0)
    if not np.all(np.isfinite(checked) & (checked >= 0)):
        raise UpdateError("The distances must be finite and not negative.")
    return checked
