"""Bound the norms of an exchange's updates so that a minority cannot move the bound.

An update is a state minus the state that it started from, all tensors as one vector. The bound is
taken from the exchange's own norms::

    n_k = || S_k - S_k^0 ||_2          bound = factor * median of n_1 ... n_K

Of K norms let h < K / 2 be arbitrary and the others honest. Sorted, at most h values are not
honest, so that each of the one or two in the middle has an honest value at or above it, and one
at or below it. Hence, with factor >= 1::

    factor * (smallest honest norm)  <=  bound  <=  factor * (largest honest norm)

A minority can thus neither raise the bound above factor times an honest client's norm, nor push
an honest client over it while honest norms lie within `factor` of each other. With half of the
clients or more, it can: (K - 1) // 2 arbitrary updates are the breakdown point. Of two norms
either may be the odd one, so below `FEWEST` there is no bound.

Task adapter and LoRA have separate bounds: they differ in size and learning rate, so their
common norm would hide a large change of the smaller one. All clients share these bounds,
whatever their task, stage and steps: a few clients are easily outnumbered within a group, and a
client could choose its group, as stage and steps follow from its own statements.

`check_norms` warns, clips or rejects. To add an action, add it to `ACTIONS` of
`pilot_flwr.config.schema` and its meaning to `check_norms`.

Clipping to a norm as a defence: Sun et al., "Can You Really Backdoor Federated Learning?", 2019,
arXiv 1911.07963; the bound there is a constant.
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
"""Fewest norms that define a bound."""

PARTS = {"adapter": "task adapter", "lora": "LoRA"}
"""Parts of an update: fields of `Update`, and their names in errors."""

_DONE = {"warn": "warned", "clip": "clipped", "reject": "rejected"}


@dataclass(frozen=True)
class Outlier:
    """A client above a bound.

    Attributes
    ----------
    client : int
        Its row in the matrix of norms.
    bounds : ndarray of float64, shape (P,)
        Bound of each column when the client was removed.
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
        The update's end and start, of the same names, shapes and dtypes.

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
    """Find the clients to exclude: repeatedly the farthest above its bound, with new bounds.

    Parameters
    ----------
    norms : ndarray, shape (K, P)
        Norms of K clients in P parts of an update, finite and not negative.
    factor : float
        At least 1.

    Returns
    -------
    list of Outlier
        In the order of their removal.

    Notes
    -----
    The others are judged as if the first outlier had never been there, since the bounds are
    computed anew without it. With one column this holds for every client above the first bound:
    whoever lies above a bound lies above the median, so without it no bound is higher, and those
    removed before it still are. The limits of the module's docstring hold for the remaining bounds
    while most of the remaining clients are honest; honest ones within `factor` of each other are
    never removed and so remain the majority.
    """
    rest = list(range(len(norms)))
    found: list[Outlier] = []
    while (bounds := bounds_of(norms[rest], factor)) is not None:
        excess = _excess(norms[rest], bounds)
        farthest = int(excess.argmax())
        if excess[farthest] <= 1:
            break
        found.append(Outlier(rest.pop(farthest), bounds))
    return found


def shortened(state: NamedArrays, start: NamedArrays, factor: float) -> dict[str, Array]:
    """Scale an update down, keeping its direction.

    ::

        S' = S^0 + factor * (S - S^0)

    Parameters
    ----------
    state, start : state
        The update's end and start, of the same names, shapes and dtypes.
    factor : float
        In [0, 1]: the bound over the update's norm.

    Returns
    -------
    state
        Computed in float64 and rounded to the dtype of `state` once; its norm may exceed the bound
        by that rounding.
    """
    check_states([start, state], (0, 1))
    return combine([start, state], np.array([[1 - factor, factor]]), (0, 1))[0]


def _excess(norms: Matrix, bounds: Matrix) -> Matrix:
    """Return each client's largest ratio of norm to bound; above a bound of 0 it is infinite."""
    ratios = np.where(norms > 0, np.inf, 0.0)
    with np.errstate(over="ignore"):  # overflows to infinity, as above a bound of 0
        np.divide(norms, bounds, out=ratios, where=bounds > 0)
    largest: Matrix = ratios.max(axis=1)
    return largest


@dataclass(frozen=True)
class NormCheck:
    """Norms and bounds of one client's update, and the action taken.

    Attributes
    ----------
    client : str
        Its id.
    norms : dict
        Part → its norm.
    bounds : dict
        Part → its bound; empty if the exchange had too few updates for one.
    action : str
        ``accepted``, ``warned``, ``clipped``, ``rejected``, or ``unchecked`` if there was no bound.
    """

    client: str
    norms: dict[str, float]
    bounds: dict[str, float]
    action: str

    @property
    def reason(self) -> str:
        """Describe the norms above their bounds; empty if there are none."""
        over = ", ".join(
            f"{PARTS[part]} {self.norms[part]:.4g} (bound {bound:.4g})"
            for part, bound in self.bounds.items()
            if self.norms[part] > bound
        )
        return f"the norm of its update is above the exchange's bound: {over}" if over else ""


def check_norms(
    updates: Sequence[Update], state: ServerState, config: UpdateNormConfig
) -> tuple[list[Update], list[NormCheck]]:
    """Compute the norms of an exchange's updates and act on those above the bound.

    Parameters
    ----------
    updates : sequence of Update
        Each accepted by `ServerState.check`.
    state : ServerState
        As it was when the instructions were sent; not changed.
    config : UpdateNormConfig
        Action and factor.

    Returns
    -------
    list of Update, list of NormCheck
        The updates to aggregate, and a check per client, none if the action is ``off``. Both are
        sorted by client.

    Notes
    -----
    Warning and clipping use one bound, over all updates. Rejection removes one update at a time
    and computes the bound anew, see `outliers`.
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
    kept, checks = [], []
    for update, start, row, bound in zip(updates, starts, norms, limits, strict=True):
        values = dict(zip(PARTS, row.tolist(), strict=True))
        bounds = {} if bound is None else dict(zip(PARTS, bound.tolist(), strict=True))
        over = [part for part in bounds if values[part] > bounds[part]]
        action = _DONE[config.action] if over else "accepted" if bounds else "unchecked"
        checks.append(NormCheck(update.client, values, bounds, action))
        if action == "clipped":
            parts = {part: bounds[part] / values[part] for part in over}
            update = _shortened(update, start, parts)
        if action != "rejected":
            kept.append(update)
    return kept, checks


def _shortened(update: Update, start: dict[str, State], factors: dict[str, float]) -> Update:
    """Return the update with some of its parts scaled by a factor."""
    parts = {
        part: cast(State, shortened(getattr(update, part), start[part], factor))
        for part, factor in factors.items()
    }
    adapter, lora = parts.get("adapter", update.adapter), parts.get("lora", update.lora)
    return replace(update, adapter=adapter, lora=lora)


def _bounds(norms: Matrix, config: UpdateNormConfig) -> list[Matrix | None]:
    """Return the bounds that apply to each client."""
    out = outliers(norms, config.factor) if config.action == "reject" else []
    gone = {outlier.client: outlier.bounds for outlier in out}
    left = [client for client in range(len(norms)) if client not in gone]
    common = bounds_of(norms[left], config.factor)
    return [gone.get(client, common) for client in range(len(norms))]


def _norm(state: State, start: State) -> float:
    """Return an update's norm; zero for a part that is not shared."""
    return update_norm(state, start) if state else 0.0


def _starts(update: Update, state: ServerState) -> dict[str, State]:
    """Return the state that the client was sent, by part."""
    lora = state.lora_for(update.client, update.task)
    return {"adapter": state.adapters[update.task], "lora": lora}


def too_few(checks: Sequence[NormCheck]) -> str:
    """Report that an exchange had too few updates for a bound; empty if it had enough."""
    unchecked = sum(check.action == "unchecked" for check in checks)
    if not unchecked:
        return ""
    return f"{unchecked} updates are too few to bound their norms; at least {FEWEST} are needed."
