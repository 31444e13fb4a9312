"""How far updates go: the norm of an update, and a bound that a minority cannot move.

An update is a state minus the state that it started from, all tensors as one vector. The bound is
taken from the round's own norms::

    n_k = || S_k - S_k^0 ||_2          bound = factor * median of n_1 ... n_K

Of K norms let h < K / 2 be arbitrary and the others honest. Sorted, at most h values are not
honest, so that each of the one or two in the middle has an honest value at or above it, and one at
or below it. Hence, with factor >= 1::

    factor * (smallest honest norm)  <=  bound  <=  factor * (largest honest norm)

A minority can thus neither raise the bound above factor times what an honest client does, nor get
an honest client over it while honest norms lie within `factor` of each other. With half of the
clients or more, it can: (K - 1) // 2 arbitrary updates are the breakdown point. Of two norms
either may be the odd one, so that below `FEWEST` there is no bound.

Clipping to a norm as a defence: Sun et al., "Can You Really Backdoor Federated Learning?", 2019,
arXiv 1911.07963; the bound there is a constant.
"""

from dataclasses import dataclass

import numpy as np

from pilot_flwr.arrays import Array, Matrix, State, centred_gram, check_states, combine

FEWEST = 3
"""Norms that it takes for a bound."""


@dataclass(frozen=True)
class Outlier:
    """A client that is out, and the bounds that held when it was taken out.

    Attributes
    ----------
    client : int
        Its row in the matrix of norms.
    bounds : ndarray of float64, shape (P,)
        One bound per column.
    """

    client: int
    bounds: Matrix


def update_norm(state: State, start: State) -> float:
    """Compute the Euclidean norm of an update, all tensors as one vector.

    ::

        n = || S - S^0 ||_2

    Parameters
    ----------
    state, start : state
        What came back and what it started from, of the same names, shapes and dtypes.

    Returns
    -------
    float
        From differences and squares in float64.

    Raises
    ------
    UpdateError
        The tensors do not match, or one of them holds NaN or Inf.
    """
    check_states([start, state], (0, 1))
    return float(np.sqrt(centred_gram([start, state])[1, 1]))


def bounds_of(norms: Matrix, factor: float) -> Matrix | None:
    """Compute the bound of every column of norms.

    ::

        b_p = factor * median over k of n_kp

    Parameters
    ----------
    norms : ndarray, shape (K, P)
        Norms of K clients in P parts of an update, finite and not negative.
    factor : float
        At least 1.

    Returns
    -------
    ndarray of float64, shape (P,), or None
        None if there are fewer than `FEWEST` clients.
    """
    if len(norms) < FEWEST:
        return None
    bounds: Matrix = factor * np.median(norms, axis=0)
    return bounds


def outliers(norms: Matrix, factor: float) -> list[Outlier]:
    """Find who to leave out: the farthest above its bound first, the bounds taken anew each time.

    Parameters
    ----------
    norms : ndarray, shape (K, P)
        Norms of K clients in P parts of an update, finite and not negative.
    factor : float
        At least 1.

    Returns
    -------
    list of Outlier
        In the order in which they were taken out.

    Notes
    -----
    What is decided of the others is what would have been decided had the first one not been there,
    because that is literally how it goes on. With one column this holds for everyone above the
    first bound, that of all clients: whoever lies above a bound lies above the median, so that
    without it no bound is higher, and those that went out before it still do. The limits of
    the module's docstring hold for the bounds that are left while most of the clients left are
    honest; within `factor` of each other, honest ones stay and so remain the majority.
    """
    left = list(range(len(norms)))
    found: list[Outlier] = []
    while (bounds := bounds_of(norms[left], factor)) is not None:
        excess = _excess(norms[left], bounds)
        farthest = int(excess.argmax())
        if excess[farthest] <= 1:
            break
        found.append(Outlier(left.pop(farthest), bounds))
    return found


def shortened(state: State, start: State, factor: float) -> dict[str, Array]:
    """Shorten an update without turning it.

    ::

        S' = S^0 + factor * (S - S^0)

    Parameters
    ----------
    state, start : state
        What came back and what it started from, of the same names, shapes and dtypes.
    factor : float
        In [0, 1]: the bound over the update's norm.

    Returns
    -------
    state
        Computed in float64 and rounded to the dtype of `state` once, which may leave its norm
        above the bound by that rounding.
    """
    check_states([start, state], (0, 1))
    return combine([start, state], np.array([[1 - factor, factor]]), (0, 1))[0]


def _excess(norms: Matrix, bounds: Matrix) -> Matrix:
    """Return each client's largest ratio of norm to bound; above a bound of 0 it is infinite."""
    ratios = np.where(norms > 0, np.inf, 0.0)
    with np.errstate(over="ignore"):  # infinite, then, as above a bound of 0
        np.divide(norms, bounds, out=ratios, where=bounds > 0)
    largest: Matrix = ratios.max(axis=1)
    return largest
