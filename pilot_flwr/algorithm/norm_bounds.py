"""Bound the norms of an exchange's updates; a minority of clients cannot move the bound.

An update is a state minus the state that it started from, all tensors as one vector. The bound
comes from the exchange's own norms::

    n_k = || S_k - S_k^0 ||_2          bound = factor * median of n_1 ... n_K

Let h < K / 2 of the K norms be arbitrary and the others honest. Then each of the one or two norms
in the middle has an honest norm at or above it, and one at or below it, so that for factor >= 1::

    factor * (smallest honest norm)  <=  bound  <=  factor * (largest honest norm)

A minority can thus neither raise the bound above factor times an honest norm, nor push an honest
client over it while honest norms lie within `factor` of each other. (K - 1) // 2 arbitrary updates
are the breakdown point: half of the clients can move the bound. Of two norms either may be the
outlier, so below `FEWEST` there is no bound.

Task adapter and LoRA have separate bounds: they differ in size and learning rate, so a common norm
would hide a large change of the smaller one. All clients share these bounds, whatever their task,
stage and steps: within a group, a few clients are easily outnumbered, and a client could choose its
group by its reports.

To add an action, add it to `ACTIONS` of `pilot_flwr.config.schema` and implement it in
`check_norms`.

Clipping to a constant norm as a defence: Sun et al., "Can You Really Backdoor Federated
Learning?", 2019, arXiv 1911.07963.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from pilot_flwr.algorithm.arrays import (
    Array,
    Matrix,
    NamedArrays,
    centred_gram,
    check_states,
    combine,
)
from pilot_flwr.algorithm.lora_ranks import rank_of
from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.config.schema import UpdateNormConfig
from pilot_flwr.protocol import State, Update

FEWEST = 3
"""Fewest norms that define a bound."""

PARTS = {"adapter": "task adapter", "lora": "LoRA"}
"""Parts of an update: fields of `Update`, and their names in errors."""

_ACTIONS_TAKEN = {"warn": "warned", "clip": "clipped", "reject": "rejected"}


def update_norm(state: NamedArrays, start: NamedArrays) -> float:
    """Compute the Euclidean norm of an update in float64, all tensors as one vector.

    ::

        n = || S - S^0 ||_2

    Parameters
    ----------
    state, start : state
        End and start of the update, of the same names, shapes and dtypes.

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
        None for fewer than `FEWEST` clients.
    """
    if len(norms) < FEWEST:
        return None
    bounds: Matrix = factor * np.median(norms, axis=0)
    return bounds


def outliers(norms: Matrix, factor: float) -> dict[int, Matrix]:
    """Remove clients one at a time, always the farthest above the bounds of those left.

    Parameters
    ----------
    norms : ndarray, shape (K, P)
        As in :func:`bounds_of`.
    factor : float
        At least 1.

    Returns
    -------
    dict
        Row of each outlier → the bounds when it was removed, in the order of removal.

    Notes
    -----
    New bounds judge the others as if the first outlier had never been there. Removing an outlier
    of a single column cannot raise the bound, since the outlier lies above the median, so every
    client above the first bound is removed. The module's guarantees hold for the remaining bounds
    while most remaining clients are honest; honest clients within `factor` of each other are never
    removed and so stay the majority.
    """
    rest = list(range(len(norms)))
    found: dict[int, Matrix] = {}
    while (bounds := bounds_of(norms[rest], factor)) is not None:
        excess = _excess(norms[rest], bounds)
        farthest = int(excess.argmax())
        if excess[farthest] <= 1:
            break
        found[rest.pop(farthest)] = bounds
    return found


def shortened(state: NamedArrays, start: NamedArrays, factor: float) -> dict[str, Array]:
    """Scale an update down, keeping its direction.

    ::

        S' = S^0 + factor * (S - S^0)

    Computed in float64 and rounded to the dtype once, by which the norm may exceed the bound.

    Parameters
    ----------
    state, start : state
        End and start of the update, of the same names, shapes and dtypes.
    factor : float
        In [0, 1]: the bound over the update's norm.
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
    """Norms and bounds of one client's update by part, and the action taken."""

    client: str
    norms: dict[str, float]
    bounds: dict[str, float]
    """Empty if the exchange had too few updates."""
    action: str
    """``accepted``, ``warned``, ``clipped``, ``rejected``, or ``unchecked`` without bounds."""

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
    updates: Sequence[Update],
    state: ServerState,
    config: UpdateNormConfig,
    *,
    keep: Callable[[State], State] = lambda state: state,
) -> tuple[list[Update], list[NormCheck]]:
    """Compute the norms of an exchange's updates and act on those above the bound.

    Warning and clipping use one bound over all updates; rejection uses `outliers`.

    Parameters
    ----------
    updates : sequence of Update
        Each accepted by `ServerState.check`.
    state : ServerState
        As when the instructions were sent; not changed.
    config : UpdateNormConfig
        Action and factor.
    keep : callable
        Stores a clipped part and returns the stored copy. By default, it stays in memory.

    Returns
    -------
    list of Update, list of NormCheck
        The updates to aggregate, and a check per client unless the action is ``off``; sorted by
        client.
    """
    updates = sorted(updates, key=lambda update: update.client)
    if config.action == "off" or not updates:
        return updates, []
    starts = [
        {
            "adapter": state.adapters[u.task],
            "lora": state.lora_for(u.client, u.task, rank_of(u.lora)),
        }
        for u in updates
    ]
    norms = np.array(
        [
            # A part that is not shared is empty.
            [update_norm(s, start[p]) if (s := getattr(u, p)) else 0.0 for p in PARTS]
            for u, start in zip(updates, starts, strict=True)
        ]
    )
    removed = outliers(norms, config.factor) if config.action == "reject" else {}
    common = bounds_of(np.delete(norms, list(removed), axis=0), config.factor)
    kept, checks = [], []
    for row, (update, start) in enumerate(zip(updates, starts, strict=True)):
        values = dict(zip(PARTS, norms[row].tolist(), strict=True))
        limits = removed.get(row, common)
        bounds = {} if limits is None else dict(zip(PARTS, limits.tolist(), strict=True))
        over = [part for part in bounds if values[part] > bounds[part]]
        action = _ACTIONS_TAKEN[config.action] if over else "accepted" if bounds else "unchecked"
        checks.append(NormCheck(update.client, values, bounds, action))
        if action == "clipped":
            parts: dict[str, Any] = {}
            for part in over:
                clipped = shortened(getattr(update, part), start[part], bounds[part] / values[part])
                parts[part] = keep(cast(State, clipped))
            update = replace(update, **parts)
        if action != "rejected":
            kept.append(update)
    return kept, checks


def too_few(checks: Sequence[NormCheck]) -> str:
    """Report that an exchange had too few updates for a bound; empty if it had enough."""
    unchecked = sum(check.action == "unchecked" for check in checks)
    if not unchecked:
        return ""
    return f"{unchecked} updates are too few to bound their norms; at least {FEWEST} are needed."
