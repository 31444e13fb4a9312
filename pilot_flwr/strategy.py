"""Pilot as a Flower strategy: task-aware adapter averaging and adaptive LoRA aggregation.

The handlers decode, call `pilot_flwr.algorithm.server_state`, record and encode. One exchange is
one train phase: every client evaluates the incoming personalised model, then trains it. After the
last exchange, one evaluate phase scores the final models. `strategy.trained_by` sets who trains
(`StrategyConfig.trains`); all others only evaluate.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from pilot_flwr.algorithm.norm_bounds import check_norms
from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import BelowMinimum, RunError, UpdateError
from pilot_flwr.flower.codec import encode_state
from pilot_flwr.flower.grid import match
from pilot_flwr.flower.messages import (
    decode_error,
    decode_result,
    decode_update,
    encode_instruction,
    refuse_unusable,
)
from pilot_flwr.protocol import Instruction, Member, RunInfo, State, Update
from pilot_flwr.run.atomic import spool_tensors
from pilot_flwr.run.checkpoint import create_lora, remove_partial, save_checkpoint
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import AggregationMethod
from pilot_flwr.run.provenance import RunIdentity
from pilot_flwr.server.event_recorder import EventRecorder
from pilot_flwr.server.roster import Present, Roster
from pilot_flwr.server.sampling import draw

logger = logging.getLogger("flwr")

CLIENT_KEYS = "client_keys.txt"
"""File of a run folder: the clients of real sites with the fingerprints of their keys."""

LONGEST_PAUSE_SECONDS = 30.0
"""Longest pause before an exchange with too few clients is repeated."""

Aggregated = TypeVar("Aggregated")


class PilotStrategy(Strategy):
    """Pilot as a Flower strategy; `server_round` counts exchanges, R + 1 in all.

    `state` has the task adapters and LoRAs; the `arrays` of Flower's loop are a copy for its
    `Result`. `expected` maps the federation's clients to their tasks, `identity` has the hashes
    that clients must share (`pilot_flwr.flower.compatibility`), `settings` is the hash of the
    run's settings, for its checkpoints, and `upload_bits` the width of compressed uploads, 0 if
    they are not. If `simulated`, all clients exist from the start and error
    replies may come from Ray.
    """

    def __init__(
        self,
        config: StrategyConfig,
        state: ServerState,
        *,
        run: RunInfo,
        folder: RunFolder,
        expected: Mapping[str, str],
        identity: Mapping[str, str],
        settings: str = "",
        simulated: bool = False,
        evaluate: bool = True,
        upload_bits: int = 0,
        seed: int = 0,
        keys: Mapping[str, str] | None = None,
        operator_keys: Mapping[str, str] | None = None,
    ) -> None:
        """`seed` draws clients; `keys` are the fingerprints recorded so far or the operator's."""
        self.config, self.state, self.run, self.folder = config, state, run, folder
        self.num_exchanges = config.rounds + 1
        self.recorder = EventRecorder(
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
            lambda number, who, why: self.recorder.failure(number, "roster", who, why),
            identity=identity,
            known=state.task_of,
            simulated=simulated,
            keys=keys or {},
            operator_keys=operator_keys or {},
        )
        self.first_client = next(iter(expected), "")
        self.identity = RunIdentity(run.name, settings)
        self.simulated, self.evaluate = simulated, evaluate
        self.upload_bits, self.seed = upload_bits, seed
        self._keys = dict(keys or {})
        self._available: list[Present] = []
        self._present: list[Present] = []
        self._stages: dict[str, int] = {}
        self._sent: list[tuple[Message, Present]] = []
        self._started = 0.0

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
        """Run the remaining exchanges, then the closing evaluation; see Flower's `Strategy.start`.

        Flower's own loop counts from 1 and ignores failures. This one begins after the last
        exchange of the checkpoint, repeats an exchange with too few clients if
        `strategy.below_minimum` says so, and raises `RunError` if the run cannot continue.
        """
        logger.info("Starting %s strategy:", type(self).__name__)
        self.summary()
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        result = Result(arrays=initial_arrays)

        def train(server_round: int) -> tuple[ArrayRecord | None, MetricRecord | None]:
            messages = self.configure_train(server_round, result.arrays, train_config, grid)
            replies = grid.send_and_receive(messages, timeout=timeout)
            return self.aggregate_train(server_round, replies)

        def evaluate(server_round: int) -> MetricRecord | None:
            messages = self.configure_evaluate(server_round, result.arrays, evaluate_config, grid)
            replies = grid.send_and_receive(messages, timeout=timeout)
            return self.aggregate_evaluate(server_round, replies)

        for server_round in range(min(self.state.rounds + 1, num_rounds), num_rounds + 1):
            logger.info("[ROUND %s/%s]", server_round, num_rounds)
            if server_round > self.state.rounds:
                arrays, metrics = self._with_enough(train, server_round)
                if arrays is not None:
                    result.arrays = arrays
                if metrics is not None:
                    result.train_metrics_clientapp[server_round] = metrics
            if (metrics := self._with_enough(evaluate, server_round)) is not None:
                result.evaluate_metrics_clientapp[server_round] = metrics
            if evaluate_fn and (metrics := evaluate_fn(server_round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics
        return result

    def _with_enough(self, phase: Callable[[int], Aggregated], server_round: int) -> Aggregated:
        """Run a phase; below the minimum, stop or repeat it (`strategy.below_minimum`)."""
        while True:
            self.recorder.begin()
            try:
                return phase(server_round)
            except BelowMinimum as error:
                if self.config.below_minimum == "stop":
                    raise
                self.recorder.repeat(server_round, str(error))
            time.sleep(min(LONGEST_PAUSE_SECONDS, self.config.wait_seconds))

    def summary(self) -> None:
        """Log the strategy's configuration."""
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
        """Call the roster, draw clients and instruct them: stage, Θ̄_l and task adapters."""
        self._started = time.perf_counter()
        self._available = self._call_roster(grid, server_round)
        self._present = self._draw(server_round, train=True)
        self._stages = {
            p.member.client: self.state.stage_for(p.member, self.config.stages)
            for p in self._present
        }
        available = Counter(p.member.task for p in self._available)
        sampled = len(self._present) < len(self._available)
        self.recorder.roster(
            server_round,
            [p.member for p in self._present],
            self._stages,
            available if sampled else None,
        )
        return self._instruct(server_round, train=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the usable updates of an exchange; record events and a checkpoint.

        Raises `BelowMinimum` if fewer than `strategy.min_replies` updates are usable, `WorkerDied`
        if a Ray worker process died.
        """
        updates = []
        for member, content in self._successful(server_round, "train", replies):
            try:
                updates += self._receive(server_round, member, content)
            except UpdateError as error:
                reason = f"Rejected: {error}."
                self.recorder.failure(
                    server_round, "train", member.client, reason, received=content
                )
        updates, checks = check_norms(
            updates, self.state, self.config.update_norm, keep=self._spool
        )
        self.recorder.update_norms(server_round, checks)
        self._check_enough(server_round, len(updates))
        started = time.perf_counter()
        if updates:
            remove_partial(self.folder.checkpoints)
            done = self.state.aggregate(
                updates,
                self.config,
                allocate=lambda client: create_lora(
                    self.folder.checkpoints, server_round, client, self.state.initial.lora
                ),
                keep=self._spool,
            )
            self.recorder.aggregation(server_round, done, time.perf_counter() - started)
        else:  # nobody trains
            self.state.rounds += 1
        loss = self.recorder.close(server_round, time.perf_counter() - self._started)
        self._save(server_round)
        metrics = MetricRecord({"updates": len(updates)})
        if loss is not None:
            metrics["loss"] = loss
        return self.global_arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """After the last exchange, request the closing evaluation; before, training includes it."""
        self._sent = []
        if not self.evaluate or server_round < self.num_exchanges:
            return []
        if not self._available:  # the run was resumed after its last exchange
            self._available = self._call_roster(grid, server_round + 1, train=False)
        self._present = self._draw(server_round + 1, train=False)
        # A client evaluates the architecture that it last trained. If its reply was lost, the
        # server does not know that stage: so every client gets all task adapters.
        self._stages = {p.member.client: self.config.stages for p in self._present}
        self._started = time.perf_counter()
        return self._instruct(server_round + 1, train=False)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Record the closing scores; return their mean over tasks."""
        if not self._sent:
            return None
        for member, content in self._successful(server_round, "evaluate", replies):
            try:
                with refuse_unusable():
                    result = decode_result(content)
            except UpdateError as error:
                reason = f"Rejected: {error}."
                self.recorder.failure(server_round, "evaluate", member.client, reason)
                continue
            self.recorder.evaluation(server_round, member, result.evaluation)
        score = self.recorder.close_evaluation(server_round, time.perf_counter() - self._started)
        return None if score is None else MetricRecord({"score": score})

    def global_arrays(self) -> ArrayRecord:
        """Return all task adapters as one record, ``<task>/<tensor>``."""
        flat: State = {
            f"{task}/{name}": tensor
            for task, state in self.state.adapters.items()
            for name, tensor in state.items()
        }
        return encode_state(flat)

    def _call_roster(self, grid: Grid, server_round: int, *, train: bool = True) -> list[Present]:
        """Call the roster; the keys that it binds are on disk before anything is sent."""
        present = self.roster.call(grid, server_round, train=train)
        if (keys := self.roster.clients.key_of) != self._keys:
            self.folder.write(
                CLIENT_KEYS, "".join(f"{client} {key}\n" for client, key in keys.items())
            )
            self._keys = dict(keys)
        return present

    def _draw(self, server_round: int, *, train: bool) -> list[Present]:
        """Return the available clients that an exchange draws, ordered by id."""
        drawn = draw(
            {p.member.client: p.member.task for p in self._available},
            self.config.num_drawn(len(self._available), train=train),
            stratified=self.config.sampling == "stratified",
            seed=self.seed,
            exchange=server_round,
        )
        return [p for p in self._available if p.member.client in drawn]

    def _trains(self, client: str) -> bool:
        return self.config.trains(first=client == self.first_client)

    def _instruct(self, server_round: int, *, train: bool) -> list[Message]:
        """Return one message per client that has something to do."""
        encoded = {task: encode_state(state) for task, state in self.state.adapters.items()}
        self._sent = []
        for present in self._present:
            member = present.member
            stage = self._stages[member.client]
            trains = train and self._trains(member.client)
            if not (trains or self.evaluate):
                continue
            tasks = self.state.tasks if stage == 2 else (member.task,)
            instruction = Instruction(
                server_round=server_round,
                stage=stage,
                tasks=self.state.tasks,
                adapters={task: self.state.adapters[task] for task in tasks},
                lora=self.state.lora_for(member.client, member.task),
                train=trains,
                evaluate=self.evaluate,
                residual=self.state.residual,
            )
            phase = MessageType.TRAIN if trains else MessageType.EVALUATE
            message = Message(
                encode_instruction(instruction, self.run, member.client, adapters=encoded),
                present.node_id,
                phase,
                ttl=self.config.round_timeout_seconds,
                group_id=str(server_round),
            )
            self.recorder.instruction(server_round, phase, member, stage, message.content)
            self._sent.append((message, present))
        return [message for message, _ in self._sent]

    def _successful(
        self, server_round: int, phase: str, replies: Iterable[Message]
    ) -> Iterator[tuple[Member, RecordDict]]:
        """Yield client and content as replies arrive; record errors and silence as failures."""
        for index, reply in match([message for message, _ in self._sent], replies):
            member = self._sent[index][1].member
            if reply is not None and not reply.has_error():
                yield member, reply.content
                continue
            try:
                if reply is None:
                    reason = f"No reply within {self.config.round_timeout_seconds:g} s."
                else:
                    reason = decode_error(reply.error, simulated=self.simulated)
            except RunError as error:
                self.recorder.failure(server_round, phase, member.client, str(error))
                raise
            self.recorder.failure(server_round, phase, member.client, reason)

    def _receive(self, server_round: int, member: Member, content: RecordDict) -> list[Update]:
        """Decode and check all of a reply before any of it is recorded; return its update."""
        with refuse_unusable():
            result = decode_result(content)
            updates = [decode_update(content)] if self._trains(member.client) else []
            if self.upload_bits:
                updates = [self.state.restore(u, member, self.upload_bits) for u in updates]
            for update in updates:
                self.state.check(update, member, server_round)
        self.recorder.evaluation(server_round - 1, member, result.evaluation)
        if updates:
            self.recorder.training(
                server_round, member, self._stages[member.client], result, content
            )
        # On disk from here on: the memory of an exchange must not grow with its clients.
        return [
            replace(update, adapter=self._spool(update.adapter), lora=self._spool(update.lora))
            for update in updates
        ]

    def _spool(self, state: State) -> State:
        return spool_tensors(state, self.folder.checkpoints)

    def _check_enough(self, server_round: int, updates: int) -> None:
        problem = ""
        if self.config.trained_by == "pooled" and not updates:
            problem = (
                f"client {self.first_client!r}, which trains on the pooled data, delivered no "
                "usable update."
            )
        elif self.config.trained_by == "clients" and updates < self.config.min_replies:
            problem = (
                f"{updates} of {len(self._present)} clients delivered a usable update but "
                f"`strategy.min_replies` is {self.config.min_replies}."
            )
        if problem:
            first = self.recorder.first_reason(server_round)
            raise BelowMinimum(f"Exchange {server_round}: {problem} First reason: {first}")

    def _save(self, server_round: int) -> None:
        """Write the checkpoint; the events that it counts are on disk before it."""
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
