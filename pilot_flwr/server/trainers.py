"""Who trains in an exchange, by `strategy.trained_by`; all others only evaluate.

``clients``: everyone, which is federated learning. ``pooled``: the first client of a simulation,
on the training data of all (`pilot_flwr.data.pooled`), which is what a federation is measured
against. ``nobody``: the base model stays as it is.
"""

from collections.abc import Mapping, Sequence

from pilot_flwr.errors import BelowMinimum
from pilot_flwr.settings.strategy import StrategyConfig


class Trainers:
    """The clients that train.

    Parameters
    ----------
    config : StrategyConfig
        `trained_by` and `min_replies`.
    expected : Mapping[str, str]
        Task of every configured client, by client id, in the federation's order.
    """

    def __init__(self, config: StrategyConfig, expected: Mapping[str, str]) -> None:
        self.by, self.min_replies = config.trained_by, config.min_replies
        self.pooled = next(iter(expected), "")

    def __contains__(self, client: str) -> bool:
        """Whether a client trains."""
        return self.by == "clients" or (self.by == "pooled" and client == self.pooled)

    def check_enough(
        self, server_round: int, updates: int, present: int, reasons: Sequence[str]
    ) -> None:
        """Raise unless an exchange has as many usable updates as it needs.

        Parameters
        ----------
        server_round : int
            Exchange.
        updates, present : int
            Usable updates, and clients that were asked for one.
        reasons : sequence of str
            Why others are missing.

        Raises
        ------
        BelowMinimum
            Fewer than `strategy.min_replies`; or the one that trains delivered none.
        """
        first = f"First reason: {[*reasons, 'none'][0]}"
        if self.by == "pooled" and not updates:
            raise BelowMinimum(
                f"Exchange {server_round}: client {self.pooled!r}, which trains on the data of "
                f"all, delivered no usable update. {first}"
            )
        if self.by == "clients" and updates < self.min_replies:
            raise BelowMinimum(
                f"Exchange {server_round}: {updates} of {present} clients delivered a usable "
                f"update but `strategy.min_replies` is {self.min_replies}. {first}"
            )
