"""The loop over exchanges: begun where a run stopped, and patient if it is told to be.

Flower's own loop counts from 1 and goes on whatever came back. This one begins behind the
exchanges that are done, and lets a strategy repeat one that closed with too few clients.

Who trains in an exchange, by `strategy.trained_by`; all others only evaluate.

``clients``: everyone, which is federated learning. ``pooled``: the first client of a simulation,
on the training data of all (`pilot_flwr.data.federation`), which is what a federation is measured
against. ``nobody``: the base model stays as it is.

The server's strategy: task-aware adapter averaging and adaptive LoRA aggregation.

The handlers here decode, call `pilot_flwr.algorithm.server_state` and encode. One exchange is one
train phase: every client evaluates the personalised model that it is sent and trains it; after
the last exchange one evaluate phase closes the run.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from pilot_flwr.algorithm.norm_bounds import check_norms
from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import BelowMinimum, RunError, UpdateError
from pilot_flwr.flower import messages as wire
from pilot_flwr.flower.codec import encode_state
from pilot_flwr.flower.failures import reason_of
from pilot_flwr.flower.grid import match
from pilot_flwr.flower.messages import decode_report, decode_update
from pilot_flwr.protocol import Instruction, Member, State, Update
from pilot_flwr.run.checkpoint import save_checkpoint
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import AggregationMethod
from pilot_flwr.run.provenance import RunIdentity
from pilot_flwr.server.event_recorder import EventRecorder
from pilot_flwr.server.roster import Present, Roster

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


class PilotStrategy(ExchangeLoop):
    """Pilot as a Flower strategy; `server_round` counts exchanges, R + 1 in all.

    Parameters
    ----------
    config : StrategyConfig
        Rounds, neighbours, times.
    state : ServerState
        Task adapters and LoRAs; the `arrays` of Flower's loop are a copy for its `Result` only.
    run : wire.RunInfo
        Sent to the clients.
    folder : RunFolder
        Gets events, timeline, summary and checkpoints.
    expected : Mapping[str, str]
        Task of every client of the federation, by client id.
    identity : Mapping[str, str]
        What clients must have in common with the server, see `pilot_flwr.flower.compatibility`.
    settings : str
        Hash of the run's settings, for its checkpoints.
    simulated : bool
        Whether all clients are there from the start, and an error may tell of a dead Ray worker.
    evaluate : bool
        Whether clients evaluate the incoming models.
    """

    def __init__(
        self,
        config: StrategyConfig,
        state: ServerState,
        *,
        run: wire.RunInfo,
        folder: RunFolder,
        expected: Mapping[str, str],
        identity: Mapping[str, str],
        settings: str = "",
        simulated: bool = False,
        evaluate: bool = True,
    ) -> None:
        self.config, self.state, self.run, self.folder = config, state, run, folder
        self.journal = EventRecorder(
            folder,
            num_exchanges=self.num_exchanges,
            tasks=state.tasks,
            method=AggregationMethod.of(config),
        )
        self.roster = Roster(
            run,
            state.tasks,
            expected,
            config,
            lambda number, who, why: self.journal.failure(number, "roster", who, why),
            identity=identity,
            known=state.task_of,
            simulated=simulated,
        )
        self.trainers = Trainers(config, expected)
        self.identity = RunIdentity(run.name, settings)
        self.simulated, self.evaluate = simulated, evaluate
        self._present: list[Present] = []
        self._stages: dict[str, int] = {}
        self._sent: list[tuple[Message, Present]] = []
        self._started = 0.0

    @property
    def num_exchanges(self) -> int:
        """R + 1."""
        return self.config.rounds + 1

    @property
    def rounds_done(self) -> int:
        """Exchanges that are aggregated already."""
        return self.state.rounds

    def begin(self, server_round: int) -> None:
        """Take note that an attempt at an exchange begins."""
        self.journal.begin()

    def below_minimum(self, server_round: int, error: BelowMinimum) -> None:
        """Stop, or after a pause repeat the exchange, as `strategy.below_minimum` says."""
        if self.config.below_minimum == "stop":
            raise error
        self.journal.repeat(server_round, str(error))
        time.sleep(min(LONGEST_PAUSE_SECONDS, self.config.wait_seconds))

    def summary(self) -> None:
        """Log what this strategy will do."""
        logger.info(
            "\t├──> %s: %d exchanges, tasks %s, %d clients",
            self.config.name,
            self.num_exchanges,
            ", ".join(self.state.tasks),
            self.roster.size,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Call the roster and send every client its order: stage, Θ̄_l and task adapters.

        A client that does not train (`strategy.trained_by`) is asked to evaluate alone.
        """
        self._started = time.perf_counter()
        self._present = self.roster.call(grid, server_round)
        stages = self.config.stages
        self._stages = {
            p.member.client: self.state.stage_for(p.member, stages) for p in self._present
        }
        self.journal.roster(server_round, [p.member for p in self._present], self._stages)
        return self._orders(server_round, train=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the usable updates of a round into the aggregation, and write everything down.

        Raises
        ------
        BelowMinimum
            Fewer than `strategy.min_replies` updates are usable.
        RunError
            A Ray worker died.
        """
        updates = []
        for present, reply in self._answers(server_round, "train", replies):
            try:
                updates += self._receive(server_round, present.member, reply.content)
            except UpdateError as error:
                client, reason = present.member.client, f"Rejected: {error}."
                self.journal.failure(server_round, "train", client, reason, received=reply.content)
        updates, verdicts = check_norms(updates, self.state, self.config.update_norm)
        self.journal.update_norms(server_round, verdicts)
        reasons = self.journal.reasons(server_round)
        self.trainers.check_enough(server_round, len(updates), len(self._present), reasons)
        started = time.perf_counter()
        if updates:
            done = self.state.aggregate(updates, self.config)
            self.journal.aggregation(server_round, done, time.perf_counter() - started)
        else:  # nobody trains
            self.state.rounds += 1
        loss = self.journal.close(server_round, time.perf_counter() - self._started)
        self._save(server_round)
        metrics = MetricRecord({"updates": len(updates)})
        if loss is not None:
            metrics["loss"] = loss
        return self.global_arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """After the last exchange, ask for one more evaluation; before, training does it."""
        self._sent = []
        if not self.evaluate or server_round < self.num_exchanges:
            return []
        if not self._present:  # the run was resumed behind its last exchange
            self._present = self.roster.call(grid, server_round + 1, train=False)
        # A client whose reply was lost may be further than the server knows, and it evaluates
        # the architecture that it last trained: so all of them get all task adapters.
        self._stages = {p.member.client: self.config.stages for p in self._present}
        self._started = time.perf_counter()
        return self._orders(server_round + 1, train=False)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Write the last scores down; return the mean over tasks."""
        if not self._sent:
            return None
        for present, reply in self._answers(server_round, "evaluate", replies):
            try:
                with wire.refuse_unusable():
                    report = decode_report(reply.content)
            except UpdateError as error:
                client, reason = present.member.client, f"Rejected: {error}."
                self.journal.failure(server_round, "evaluate", client, reason)
                continue
            self.journal.evaluation(server_round, present.member, report)
        score = self.journal.close_evaluation(server_round, time.perf_counter() - self._started)
        return None if score is None else MetricRecord({"score": score})

    def global_arrays(self) -> ArrayRecord:
        """Return all task adapters as one record, ``<task>/<tensor>``."""
        flat: State = {
            f"{task}/{name}": tensor
            for task, state in self.state.adapters.items()
            for name, tensor in state.items()
        }
        return encode_state(flat)

    def _orders(self, server_round: int, *, train: bool) -> list[Message]:
        packed = {task: encode_state(s) for task, s in self.state.adapters.items()}
        self._sent = []
        for present in self._present:
            member = present.member
            stage = self._stages[member.client]
            trains = train and member.client in self.trainers
            if not (trains or self.evaluate):
                continue
            phase = MessageType.TRAIN if trains else MessageType.EVALUATE
            tasks = self.state.tasks if stage == 2 else (member.task,)
            order = Instruction(
                server_round=server_round,
                stage=stage,
                tasks=self.state.tasks,
                adapters={task: self.state.adapters[task] for task in tasks},
                lora=self.state.lora_for(member.client, member.task),
                train=trains,
                evaluate=self.evaluate,
                residual=self.state.residual,
            )
            message = Message(
                wire.encode_instruction(order, self.run, member.client, adapters=packed),
                present.node_id,
                phase,
                ttl=self.config.round_timeout_seconds,
                group_id=str(server_round),
            )
            self.journal.order(order.server_round, phase, member, stage, message.content)
            self._sent.append((message, present))
        return [message for message, _ in self._sent]

    def _answers(
        self, server_round: int, phase: str, replies: Iterable[Message]
    ) -> Iterable[tuple[Present, Message]]:
        """Yield client and reply as they arrive; errors and silence become failures."""
        for index, reply in match([message for message, _ in self._sent], replies):
            present = self._sent[index][1]
            client = present.member.client
            if reply is None:
                silence = f"No reply within {self.config.round_timeout_seconds:g} s."
                self.journal.failure(server_round, phase, client, silence)
            elif reply.has_error():
                try:
                    reason = reason_of(reply.error, simulated=self.simulated)
                except RunError as error:
                    self.journal.failure(server_round, phase, client, str(error))
                    raise
                self.journal.failure(server_round, phase, client, reason)
            else:
                yield present, reply

    def _receive(self, server_round: int, member: Member, content: RecordDict) -> list[Update]:
        """Read and check all of a reply, its update if it has to have one; then write it down."""
        with wire.refuse_unusable():
            report = decode_report(content)
            updates = [decode_update(content)] if member.client in self.trainers else []
            for update in updates:
                self.state.check(update, member, server_round)
        self.journal.evaluation(server_round - 1, member, report)
        for update in updates:
            self.journal.update(server_round, self._stages[member.client], update, report)
        return updates

    def _save(self, server_round: int) -> None:
        """Write the checkpoint; it counts on the events that are on disk by then."""
        self.folder.flush()
        save_checkpoint(
            self.folder.checkpoints,
            server_round=server_round,
            adapters=self.state.adapters,
            loras=self.state.loras,
            tasks=self.state.tasks,
            task_of=self.state.task_of,
            run=self.identity,
            events=self.folder.lines,
            moments={target: m.pack() for target, m in self.state.moments.items()},
            residual=self.state.residual,
        )
