"""The server's strategy: task-aware adapter averaging and adaptive LoRA aggregation.

The handlers here decode, call `pilot_flwr.server_state` and encode. One exchange is one
train phase: every client evaluates the personalised model that it is sent and trains it; after
the last exchange one evaluate phase closes the run.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from pilot_flwr import wire
from pilot_flwr.checkpoint import save_checkpoint
from pilot_flwr.errors import RunError, UpdateError
from pilot_flwr.failures import reason_of
from pilot_flwr.parameters import State
from pilot_flwr.roster import Present, call_roster
from pilot_flwr.run_folder import RunFolder
from pilot_flwr.server_state import Aggregation, ServerState, Update
from pilot_flwr.settings import StrategyConfig
from pilot_flwr.tables import summary, timeline
from pilot_flwr.turn import Order

logger = logging.getLogger("flwr")


class PilotStrategy(Strategy):
    """Pilot as a Flower strategy; `server_round` counts exchanges, R + 1 in all.

    Parameters
    ----------
    config : StrategyConfig
        Rounds, neighbours, times.
    state : ServerState
        Task adapters and LoRAs; the `arrays` that Flower's loop passes around are a copy for
        its `Result` only.
    run : wire.RunInfo
        Sent to the clients.
    folder : RunFolder
        Gets events, timeline, summary and checkpoints.
    num_clients : int
        Clients that the first exchange waits for.
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
        num_clients: int,
        evaluate: bool = True,
    ) -> None:
        self.config, self.state, self.run, self.folder = config, state, run, folder
        self.num_clients, self.evaluate = num_clients, evaluate
        self._present: list[Present] = []
        self._stages: dict[str, int] = {}
        self._sent: list[tuple[Message, str]] = []
        self._started = 0.0

    @property
    def num_exchanges(self) -> int:
        """R + 1."""
        return self.config.rounds + 1

    def summary(self) -> None:
        """Log what this strategy will do."""
        logger.info(
            "\t├──> %d exchanges, tasks %s, %d clients, %d neighbours",
            self.num_exchanges,
            ", ".join(self.state.tasks),
            self.num_clients,
            self.config.num_neighbors,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Call the roster and send every client its order: stage, Θ̄_l and task adapters."""
        self._started = time.perf_counter()
        self._present = call_roster(
            grid,
            self.run,
            server_round=server_round,
            wanted=self.num_clients if server_round == 1 else self.config.min_replies,
            config=self.config,
            on_failure=lambda client, reason: self._fail(server_round, "roster", client, reason),
        )
        self._stages = {p.member.client: self.state.stage_for(p.member) for p in self._present}
        self.folder.record(
            "roster",
            round=server_round,
            clients=[
                {
                    "client": p.member.client,
                    "task": p.member.task,
                    "examples": p.member.examples,
                    "stage": self._stages[p.member.client],
                }
                for p in self._present
            ],
        )
        return self._orders(server_round, train=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the usable updates of a round into the aggregation, and write everything down.

        Raises
        ------
        RunError
            Fewer than `strategy.min_replies` updates are usable, or a Ray worker died.
        """
        updates = []
        for present, reply in self._answers(server_round, "train", replies):
            try:
                update = self._receive_update(server_round, present, reply)
            except UpdateError as error:
                self._fail(server_round, "train", present.member.client, f"Rejected: {error}.")
                continue
            updates.append(update)
        if len(updates) < self.config.min_replies:
            reasons = [e["reason"] for e in self.folder.select("failure")]
            raise RunError(
                f"Exchange {server_round}: {len(updates)} of {len(self._present)} clients "
                f"delivered a usable update but `strategy.min_replies` is "
                f"{self.config.min_replies}. First reason: {reasons[0] if reasons else 'none'}"
            )
        started = time.perf_counter()
        done = self.state.aggregate(updates, num_neighbors=self.config.num_neighbors)
        self._record_aggregation(server_round, done, time.perf_counter() - started)
        self._save(server_round)
        self._close(server_round)
        mean = sum(e["loss"] for e in self._events("train", server_round)) / len(updates)
        return self.global_arrays(), MetricRecord({"loss": mean, "updates": len(updates)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """After the last exchange, ask for one more evaluation; before, training does it."""
        self._sent = []
        if not self.evaluate or server_round < self.num_exchanges:
            return []
        # A client whose reply was lost may be further than the server knows, and it evaluates
        # the architecture that it last trained: so all of them get all task adapters.
        self._stages = dict.fromkeys(self._stages, 2)
        return self._orders(server_round + 1, train=False)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Write the last scores down; return the mean over tasks."""
        if not self._sent:
            return None
        for present, reply in self._answers(server_round + 1, "evaluate", replies):
            try:
                self._record_evaluation(server_round + 1, present, reply)
            except UpdateError as error:
                self._fail(server_round + 1, "evaluate", present.member.client, f"{error}.")
        self._write_tables()
        scores = [e["score"] for e in self.folder.select("evaluate") if e["round"] == server_round]
        return MetricRecord({"score": sum(scores) / len(scores)}) if scores else None

    def global_arrays(self) -> ArrayRecord:
        """Return all task adapters as one record, ``<task>/<tensor>``."""
        flat: State = {
            f"{task}/{name}": tensor
            for task, state in self.state.adapters.items()
            for name, tensor in state.items()
        }
        return wire.encode_state(flat)

    def _orders(self, server_round: int, *, train: bool) -> list[Message]:
        packed = {task: wire.encode_state(s) for task, s in self.state.adapters.items()}
        self._sent = []
        for present in self._present:
            member = present.member
            stage = self._stages[member.client]
            tasks = self.state.tasks if stage == 2 else (member.task,)
            order = Order(
                server_round=server_round,
                stage=stage,
                tasks=self.state.tasks,
                adapters={task: self.state.adapters[task] for task in tasks},
                lora=self.state.lora_for(member.client, member.task),
                train=train,
                evaluate=self.evaluate,
            )
            message = Message(
                wire.encode_order(order, self.run, member.client, adapters=packed),
                present.node_id,
                MessageType.TRAIN if train else MessageType.EVALUATE,
                ttl=self.config.round_timeout_seconds,
                group_id=str(server_round),
            )
            self._sent.append((message, member.client))
        return [message for message, _ in self._sent]

    def _answers(
        self, server_round: int, phase: str, replies: Iterable[Message]
    ) -> Iterable[tuple[Present, Message]]:
        """Yield client and reply as they arrive; errors and silence become failures."""
        present = {p.member.client: p for p in self._present}
        silent = dict.fromkeys(client for _, client in self._sent)
        for reply in replies:
            sent = {message.metadata.message_id: client for message, client in self._sent}
            client = sent.get(reply.metadata.reply_to_message_id)
            if client is None or client not in silent:
                continue  # a reply to something older, or a second one
            del silent[client]
            if reply.has_error():
                try:
                    reason = reason_of(reply.error)
                except RunError as error:
                    self._fail(server_round, phase, client, str(error))
                    raise
                self._fail(server_round, phase, client, reason)
            else:
                yield present[client], reply
        for client in silent:
            seconds = self.config.round_timeout_seconds
            self._fail(server_round, phase, client, f"No reply within {seconds:g} s.")

    def _receive_update(self, server_round: int, present: Present, reply: Message) -> Update:
        content, member = reply.content, present.member
        update = wire.decode_update(content)
        if update.client != member.client:
            raise UpdateError(f"it says that it is from {update.client!r}")
        self.state.check(update, member, server_round)
        self._record_evaluation(server_round, present, reply)
        numbers = wire.training_metrics(content)
        self.folder.record(
            "train",
            round=server_round,
            stage=self._stages[member.client],
            client=member.client,
            task=member.task,
            loss=numbers["loss.total"],
            **{f"loss_{n}": numbers[f"loss.{n}"] for n in ("ce", "difference", "balance", "z")},
            examples=update.num_examples,
            steps=numbers["steps"],
            seconds=numbers["seconds"],
            gradients=_part(numbers, "gradients."),
            **self._traffic(member.client, reply),
        )
        return update

    def _record_evaluation(self, server_round: int, present: Present, reply: Message) -> None:
        """Write down the score of the model that went out, the result of the exchange before."""
        found = wire.evaluation_metrics(reply.content)
        if found is None:
            return
        numbers, metric = found
        self.folder.record(
            "evaluate",
            round=server_round - 1,
            client=present.member.client,
            task=present.member.task,
            score=numbers["score"],
            metric=metric,
            examples=int(numbers["examples"]),
            seconds=numbers["seconds"],
        )

    def _traffic(self, client: str, reply: Message) -> dict[str, Any]:
        down = next(wire.num_bytes(m.content) for m, c in self._sent if c == client)
        up = wire.num_bytes(reply.content)
        turn = wire.turn_times(reply.content)
        return {
            "bytes_down": sum(down.values()),
            "bytes_up": sum(up.values()),
            "down": down,
            "up": up,
            **turn,
        }

    def _record_aggregation(self, server_round: int, done: Aggregation, seconds: float) -> None:
        self.folder.record(
            "aggregate",
            round=server_round,
            seconds=seconds,
            clients=sum(map(len, done.tasks.values())),
            tasks=done.tasks,
            neighbors=done.neighbors,
            distances=done.distances,
        )

    def _save(self, server_round: int) -> None:
        save_checkpoint(
            self.folder.checkpoints,
            server_round=server_round,
            adapters=self.state.adapters,
            loras=self.state.loras,
            info={"tasks": list(self.state.tasks), "task_of": self.state.task_of},
        )

    def _close(self, server_round: int) -> None:
        self.folder.record(
            "round",
            round=server_round,
            exchanges=self.num_exchanges,
            seconds=time.perf_counter() - self._started,
        )
        self._write_tables()

    def _write_tables(self) -> None:
        self.folder.write("timeline.md", timeline(self.folder.events))
        self.folder.write("summary.md", summary(self.folder.events))

    def _events(self, event: str, server_round: int) -> list[dict[str, Any]]:
        return [e for e in self.folder.select(event) if e["round"] == server_round]

    def _fail(self, server_round: int, phase: str, client: str, reason: str) -> None:
        logger.warning("Exchange %d, %s, %s: %s", server_round, phase, client, reason)
        self.folder.record("failure", round=server_round, phase=phase, client=client, reason=reason)


def _part(numbers: dict[str, float], prefix: str) -> dict[str, int]:
    return {k.removeprefix(prefix): int(v) for k, v in numbers.items() if k.startswith(prefix)}
