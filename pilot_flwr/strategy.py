"""The server's strategy: task-aware adapter averaging and adaptive LoRA aggregation.

The handlers here decode, call `pilot_flwr.server.state` and encode. One exchange is one
train phase: every client evaluates the personalised model that it is sent and trains it; after
the last exchange one evaluate phase closes the run.
"""

import logging
import time
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from pilot_flwr.client.turn import Order
from pilot_flwr.errors import BelowMinimum, RunError, UpdateError
from pilot_flwr.flower import wire
from pilot_flwr.flower.codec import encode_state
from pilot_flwr.flower.failures import reason_of
from pilot_flwr.flower.grid import match
from pilot_flwr.flower.replies import decode_report, decode_update
from pilot_flwr.model.parameters import State
from pilot_flwr.server.claims import Present
from pilot_flwr.server.exchange_loop import LONGEST_PAUSE_SECONDS, ExchangeLoop
from pilot_flwr.server.journal import Journal
from pilot_flwr.server.norm_check import check_norms
from pilot_flwr.server.roster import Roster
from pilot_flwr.server.state import Member, ServerState, Update
from pilot_flwr.server.trainers import Trainers
from pilot_flwr.settings.strategy import StrategyConfig
from pilot_flwr.storage.checkpoint import save_checkpoint
from pilot_flwr.storage.run_folder import RunFolder
from pilot_flwr.storage.run_identity import RunIdentity

logger = logging.getLogger("flwr")


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
        What clients must have in common with the server, see `pilot_flwr.flower.identity`.
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
        self.journal = Journal(folder, num_exchanges=self.num_exchanges, tasks=state.tasks)
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
            order = Order(
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
                wire.encode_order(order, self.run, member.client, adapters=packed),
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
