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

The round's updates held against a bound on their norms: warn, clip or reject.

An update is what came minus what was sent. Its two parts have a bound each: the task adapter's
Θ_a and the LoRA's Θ_l differ in size and learning rate, so that the norm of both together would
hide a large change of the smaller one. All clients of the round share a bound, whatever their task,
stage and steps: a bound of its own for a group would be weaker, as few clients are easily
outnumbered, and a client could choose its group, because stage and steps follow from what it says
of itself. The equations and what they withstand are in :mod:`pilot_flwr.algorithm.norm_bounds`.

To act otherwise on an update, add a word to `ACTIONS` of `pilot_flwr.config.schema` and its
meaning to `check_norms`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from pilot_flwr.algorithm.arrays import (
    Array,
    Matrix,
    NamedArrays,
    centred_gram,
    check_states,
    combine,
)
from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.config.schema import UpdateNormConfig
from pilot_flwr.protocol import State, Update

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


def update_norm(state: NamedArrays, start: NamedArrays) -> float:
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


def shortened(state: NamedArrays, start: NamedArrays, factor: float) -> dict[str, Array]:
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


PARTS = ("adapter", "lora")
"""The parts of an update, as the fields of `Update` are called."""

_WORDS = {"adapter": "task adapter", "lora": "LoRA"}
_DONE = {"warn": "warned", "clip": "clipped", "reject": "rejected"}


@dataclass(frozen=True)
class Verdict:
    """What became of one client's update.

    Attributes
    ----------
    client : str
        Whose it is.
    norms : dict
        Part → its norm.
    bounds : dict
        Part → its bound; empty if the round had too few updates for one.
    action : str
        ``accepted``, ``warned``, ``clipped``, ``rejected``, or ``unchecked`` if there was no bound.
    """

    client: str
    norms: dict[str, float]
    bounds: dict[str, float]
    action: str

    @property
    def reason(self) -> str:
        """Which norm is above which bound, in words; empty if none is."""
        over = ", ".join(
            f"{_WORDS[part]} {self.norms[part]:.4g} (bound {bound:.4g})"
            for part, bound in self.bounds.items()
            if self.norms[part] > bound
        )
        return f"the norm of its update is above the round's bound: {over}" if over else ""


def check_norms(
    updates: Sequence[Update], state: ServerState, config: UpdateNormConfig
) -> tuple[list[Update], list[Verdict]]:
    """Compute the norms of a round's updates and act on those above the bound.

    Parameters
    ----------
    updates : sequence of Update
        Each accepted by `ServerState.check`.
    state : ServerState
        As it was when the orders were sent; not changed.
    config : UpdateNormConfig
        What to do, and how far above the median is too far.

    Returns
    -------
    list of Update, list of Verdict
        What goes into the aggregation, and a verdict per client, none if the action is ``off``.
        Both are sorted by client.

    Notes
    -----
    Warning and clipping take one bound, over all updates. Rejection takes one update out at a
    time and the bound anew, so that the others are judged as if that one had never come.
    """
    updates = sorted(updates, key=lambda update: update.client)
    if config.action == "off" or not updates:
        return updates, []
    starts = [_starts(update, state) for update in updates]
    norms = np.array(
        [
            [_norm(getattr(update, part), start[part]) for part in PARTS]
            for update, start in zip(updates, starts, strict=True)
        ]
    )
    limits = _bounds(norms, config)
    kept, verdicts = [], []
    for update, start, row, bound in zip(updates, starts, norms, limits, strict=True):
        values = dict(zip(PARTS, row.tolist(), strict=True))
        bounds = {} if bound is None else dict(zip(PARTS, bound.tolist(), strict=True))
        over = [part for part in bounds if values[part] > bounds[part]]
        action = _DONE[config.action] if over else "accepted" if bounds else "unchecked"
        verdicts.append(Verdict(update.client, values, bounds, action))
        if action == "clipped":
            parts = {part: bounds[part] / values[part] for part in over}
            update = _shortened(update, start, parts)
        if action != "rejected":
            kept.append(update)
    return kept, verdicts


def _shortened(update: Update, start: dict[str, State], factors: dict[str, float]) -> Update:
    """Return the update with some of its parts shortened by a factor."""
    parts = {
        part: cast(State, shortened(getattr(update, part), start[part], factor))
        for part, factor in factors.items()
    }
    adapter, lora = parts.get("adapter", update.adapter), parts.get("lora", update.lora)
    return replace(update, adapter=adapter, lora=lora)


def _bounds(norms: Matrix, config: UpdateNormConfig) -> list[Matrix | None]:
    """Return what each client is held against."""
    out = outliers(norms, config.factor) if config.action == "reject" else []
    gone = {outlier.client: outlier.bounds for outlier in out}
    left = [client for client in range(len(norms)) if client not in gone]
    common = bounds_of(norms[left], config.factor)
    return [gone.get(client, common) for client in range(len(norms))]


def _norm(state: State, start: State) -> float:
    """Return an update's norm; of a part that is not shared there is nothing, and so zero."""
    return update_norm(state, start) if state else 0.0


def _starts(update: Update, state: ServerState) -> dict[str, State]:
    """Return what the client was sent, by part."""
    lora = state.lora_for(update.client, update.task)
    return {"adapter": state.adapters[update.task], "lora": lora}


def too_few(verdicts: Sequence[Verdict]) -> str:
    """Say that a round had too few updates for a bound; empty if it had enough."""
    left = sum(verdict.action == "unchecked" for verdict in verdicts)
    return f"{left} updates are too few to bound their norms by: it takes {FEWEST}." if left else ""
