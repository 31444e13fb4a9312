"""The round's updates held against a bound on their norms: warn, clip or reject.

An update is what came minus what was sent. Its two parts have a bound each: the task adapter's
Θ_a and the LoRA's Θ_l differ in size and learning rate, so that the norm of both together would
hide a large change of the smaller one. All clients of the round share a bound, whatever their task,
stage and steps: a bound of its own for a group would be weaker, as few clients are easily
outnumbered, and a client could choose its group, because stage and steps follow from what it says
of itself. The equations and what they withstand are in :mod:`pilot_flwr.norms`.

To act otherwise on an update, add a word to `ACTIONS` of `pilot_flwr.settings.strategy` and its
meaning to `check_norms`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from pilot_flwr.arrays import Matrix
from pilot_flwr.model.parameters import State
from pilot_flwr.norms import FEWEST, bounds_of, outliers, shortened, update_norm
from pilot_flwr.server.state import ServerState, Update
from pilot_flwr.settings.strategy import UpdateNormConfig

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
