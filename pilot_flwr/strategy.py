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

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from pilot_flwr.algorithm.norm_bounds import check_norms
from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import BelowMinimum, UpdateError
from pilot_flwr.flower.codec import encode_state
from pilot_flwr.flower.grid import PollingGrid
from pilot_flwr.flower.messages import decode_result, decode_update, refuse_unusable
from pilot_flwr.protocol import Member, RunInfo, State, Update
from pilot_flwr.run.atomic import spool_tensors
from pilot_flwr.run.checkpoint import create_lora, remove_partial, save_checkpoint
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import AggregationMethod
from pilot_flwr.run.provenance import RunIdentity
from pilot_flwr.server.event_recorder import EventRecorder
from pilot_flwr.server.instructions import Instructions
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
    that clients must share (`pilot_flwr.flower.compatibility`), `check_rank` raises `ConfigError`
    for a LoRA rank that no client of the run may have, `settings` is the hash of the
    run's settings, for its checkpoints, and `upload_bits` the width of compressed uploads, 0
    without compression. If `simulated`, all clients exist from the start and Ray may send error
    replies.
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
        check_rank: Callable[[int], None],
        settings: str = "",
        simulated: bool = False,
        evaluate: bool = True,
        upload_bits: int = 0,
        seed: int = 0,
        at_once: Callable[[], int | None] = lambda: None,
        keys: Mapping[str, str] | None = None,
        operator_keys: Mapping[str, str] | None = None,
    ) -> None:
        """`seed` seeds sampling and sketches, `at_once` returns the maximum of unanswered messages.

        `keys` are the fingerprints recorded so far, `operator_keys` the operator's.
        """
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
            check_rank=check_rank,
            known=state.task_of,
            simulated=simulated,
            keys=keys or {},
            operator_keys=operator_keys or {},
        )
        self.instructions = Instructions(
            config,
            state,
            run,
            roster=self.roster,
            recorder=self.recorder,
            first_client=next(iter(expected), ""),
            evaluate=evaluate,
            simulated=simulated,
        )
        self.identity = RunIdentity(run.name, settings)
        self.upload_bits, self.seed, self.at_once = upload_bits, seed, at_once
        self._keys = dict(keys or {})
        self._available: list[Present] = []
        self._present: list[Present] = []
        self._stages: dict[str, int] = {}
        self._started = 0.0
        self._repetition = 0

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
        grid = polling = grid if isinstance(grid, PollingGrid) else PollingGrid(grid)

        def send(messages: Iterable[Message]) -> Iterator[Message]:
            return polling.send_and_receive(
                messages,
                timeout=timeout,
                at_once=self.at_once(),
                closes=self.instructions.closes,
                late=self.instructions.late,
            )

        def train(server_round: int) -> tuple[ArrayRecord | None, MetricRecord | None]:
            messages = self.configure_train(server_round, result.arrays, train_config, grid)
            return self.aggregate_train(server_round, send(messages))

        def evaluate(server_round: int) -> MetricRecord | None:
            messages = self.configure_evaluate(server_round, result.arrays, evaluate_config, grid)
            return self.aggregate_evaluate(server_round, send(messages))

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
        self._repetition = 0
        while True:
            self.recorder.begin()
            try:
                return phase(server_round)
            except BelowMinimum as error:
                if self.config.below_minimum == "stop":
                    raise
                self.recorder.repeat(server_round, str(error))
                self._repetition += 1
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
        self._record_busy(grid, server_round)
        return self.instructions.messages(server_round, self._present, self._stages, train=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the usable updates of an exchange; record events and a checkpoint.

        Raises `BelowMinimum` if fewer than `strategy.min_replies` updates are usable, `WorkerDied`
        if a Ray worker process died.
        """
        updates = []
        for member, content in self.instructions.replies(server_round, "train", replies):
            try:
                updates += self._receive(server_round, member, content)
            except UpdateError as error:
                self.instructions.fail(member, f"Rejected: {error}.", received=content)
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
                seed=self.seed,
                allocate=lambda client, layout: create_lora(
                    self.folder.checkpoints, server_round, client, layout
                ),
                keep=self._spool,
            )
            self.recorder.aggregation(server_round, done, time.perf_counter() - started)
        else:  # nobody trains
            self.state.rounds += 1
        loss = self.recorder.close(server_round, time.perf_counter() - self._started)
        self._save(server_round)
        self.roster.used({update.client: self._stages[update.client] for update in updates})
        metrics = MetricRecord({"updates": len(updates)})
        if loss is not None:
            metrics["loss"] = loss
        return self.global_arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """After the last exchange, request the closing evaluation; before, training includes it."""
        if not self.instructions.evaluate or server_round < self.num_exchanges:
            return self.instructions.messages(server_round, [], {}, train=False)
        if not self._available:  # the run was resumed after its last exchange
            self._available = self._call_roster(grid, server_round + 1, train=False)
        elif busy := self.instructions.busy(grid, server_round):
            self._available = [p for p in self._available if p.node_id not in busy]
            self._record_busy(grid, server_round)
        self._present = self._draw(server_round + 1, train=False)
        # A client evaluates the architecture that it last trained. If its reply was lost, the
        # server does not know that stage: so every client gets all task adapters.
        self._stages = {p.member.client: self.config.stages for p in self._present}
        self._started = time.perf_counter()
        return self.instructions.messages(
            server_round + 1, self._present, self._stages, train=False
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Record the closing scores; return their mean over tasks."""
        if not self.instructions.asked:
            return None
        for member, content in self.instructions.replies(server_round, "evaluate", replies):
            try:
                with refuse_unusable():
                    result = decode_result(content)
            except UpdateError as error:
                self.instructions.fail(member, f"Rejected: {error}.")
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
        present = self.roster.call(
            grid,
            server_round,
            train=train,
            busy=lambda: self.instructions.busy(grid, server_round),
        )
        if (keys := self.roster.clients.key_of) != self._keys:
            self.folder.write(
                CLIENT_KEYS, "".join(f"{client} {key}\n" for client, key in keys.items())
            )
            self._keys = dict(keys)
        return present

    def _record_busy(self, grid: Grid, server_round: int) -> None:
        """Warn of clients at work, except those whose node left: they may be at another one."""
        present = {p.member.client for p in self._available}
        busy = [late for late in self.instructions.late.values() if late.client not in present]
        connected = set(grid.get_node_ids()) if busy else set()
        for late in busy:
            if late.present.node_id not in connected:
                continue
            text = f"still works on exchange {late.exchange}, so it is not instructed."
            self.recorder.warning(server_round, late.client, text)

    def _draw(self, server_round: int, *, train: bool) -> list[Present]:
        """Return the available clients that an exchange draws, ordered by id."""
        drawn = draw(
            {p.member.client: p.member.task for p in self._available},
            self.config.num_drawn(len(self._available), train=train),
            stratified=self.config.sampling == "stratified",
            seed=self.seed,
            exchange=server_round,
            repetition=self._repetition,
        )
        return [p for p in self._available if p.member.client in drawn]

    def _receive(self, server_round: int, member: Member, content: RecordDict) -> list[Update]:
        """Decode and check all of a reply before any of it is recorded; return its update."""
        with refuse_unusable():
            result = decode_result(content)
            updates = [decode_update(content)] if self.instructions.trains(member.client) else []
            if self.upload_bits:
                updates = [self.state.restore(u, member, self.upload_bits) for u in updates]
            for update in updates:
                self.state.check(update, member, server_round)
        self.recorder.evaluation(server_round - 1, member, result.evaluation)
        if updates:
            self.recorder.training(
                server_round, member, self._stages[member.client], result, content
            )
        # On disk from here on: an exchange's memory must not grow with the number of clients.
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
                f"client {self.instructions.first_client!r}, which trains on the pooled data, "
                "delivered no usable update."
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
