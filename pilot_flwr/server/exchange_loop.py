"""The loop over exchanges: begun where a run stopped, and patient if it is told to be.

Flower's own loop counts from 1 and goes on whatever came back. This one begins behind the
exchanges that are done, and lets a strategy repeat one that closed with too few clients.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from pilot_flwr.errors import BelowMinimum

logger = logging.getLogger("flwr")

LONGEST_PAUSE_SECONDS = 30.0
"""Before an exchange is repeated that had too few clients."""

Answer = TypeVar("Answer")


class ExchangeLoop(Strategy):
    """A Flower strategy with a loop of its own; the handlers are Flower's."""

    @property
    @abstractmethod
    def rounds_done(self) -> int:
        """Exchanges that are aggregated already, when `start` is called and afterwards."""

    @abstractmethod
    def begin(self, server_round: int) -> None:
        """Take note that an attempt at an exchange begins."""

    @abstractmethod
    def below_minimum(self, server_round: int, error: BelowMinimum) -> None:
        """Raise the error, or return after a pause: then the exchange is repeated."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the exchanges that are not done yet, then the last one's evaluation.

        Parameters and result are those of `flwr.serverapp.strategy.Strategy.start`. If all
        `num_rounds` are done, the evaluate phase of the last one is all that is run.

        Raises
        ------
        RunError
            The run cannot go on.
        """
        logger.info("Starting %s strategy:", type(self).__name__)
        self.summary()
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        result = Result(arrays=initial_arrays)
        for server_round in range(min(self.rounds_done + 1, num_rounds), num_rounds + 1):
            logger.info("[ROUND %s/%s]", server_round, num_rounds)

            def train(server_round: int = server_round) -> MetricRecord | None:
                messages = self.configure_train(server_round, result.arrays, train_config, grid)
                replies = grid.send_and_receive(messages, timeout=timeout)
                arrays, metrics = self.aggregate_train(server_round, replies)
                result.arrays = result.arrays if arrays is None else arrays
                return metrics

            def evaluate(server_round: int = server_round) -> MetricRecord | None:
                messages = self.configure_evaluate(
                    server_round, result.arrays, evaluate_config, grid
                )
                replies = grid.send_and_receive(messages, timeout=timeout)
                return self.aggregate_evaluate(server_round, replies)

            if server_round > self.rounds_done:
                if (metrics := self._until_enough(server_round, train)) is not None:
                    result.train_metrics_clientapp[server_round] = metrics
            if (metrics := self._until_enough(server_round, evaluate)) is not None:
                result.evaluate_metrics_clientapp[server_round] = metrics
            if evaluate_fn and (metrics := evaluate_fn(server_round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics
        return result

    def _until_enough(self, server_round: int, phase: Callable[[], Answer]) -> Answer:
        while True:
            self.begin(server_round)
            try:
                return phase()
            except BelowMinimum as error:
                self.below_minimum(server_round, error)
