"""Send the instructions of an exchange, and match the replies with the clients that were asked.

`Instructions.messages` encodes one message per client when it is sent; `Instructions.replies`
yields the content of each successful reply as it arrives, and records all other clients as failed.

With `strategy.close_after`, an exchange may close before all clients have answered. The others stay
busy: no new instruction is sent to their nodes until they have replied, or the time limit of their
instruction is over. A late reply is recorded and discarded, as it belongs to a model that the
server has already replaced (docs/explanation/faults.md).
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flwr.app import ArrayRecord, Message, MessageType, Metadata, RecordDict
from flwr.serverapp import Grid

from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import RunError
from pilot_flwr.flower.codec import encode_state
from pilot_flwr.flower.grid import match, pull
from pilot_flwr.flower.messages import decode_error, encode_instruction
from pilot_flwr.formatting import human_seconds
from pilot_flwr.protocol import Instruction, Member, RunInfo
from pilot_flwr.server.event_recorder import EventRecorder
from pilot_flwr.server.roster import Present, Roster


class Unanswered(NamedTuple):
    """An instruction whose exchange closed before the client had replied."""

    present: Present
    exchange: int
    sent: float
    limit: float
    """Seconds until the instruction expires, after which the node is queried again."""

    @property
    def client(self) -> str:
        """The id of the client."""
        return self.present.member.client

    @property
    def seconds(self) -> float:
        """Seconds since the instruction was sent."""
        return time.monotonic() - self.sent

    @property
    def expired(self) -> bool:
        """Whether the time limit of the instruction is over."""
        return self.seconds >= self.limit


class Instructions:
    """The instructions of the current exchange, and the replies to them.

    `first_client` is the one that trains with ``strategy.trained_by=pooled``; `evaluate` asks for
    the score of the incoming model; in a simulation, error replies may come from Ray.
    """

    def __init__(
        self,
        config: StrategyConfig,
        state: ServerState,
        run: RunInfo,
        *,
        roster: Roster,
        recorder: EventRecorder,
        first_client: str,
        evaluate: bool,
        simulated: bool,
    ) -> None:
        self.config, self.state, self.run = config, state, run
        self.roster, self.recorder = roster, recorder
        self.first_client, self.evaluate, self.simulated = first_client, evaluate, simulated
        self.asked: list[Present] = []
        self.late: dict[str, Unanswered] = {}
        """Message id → instruction of an earlier exchange."""
        self._sent: list[Metadata] = []
        self._times: list[float] = []
        self._train = True
        self._answered: set[str] = set()
        self._failed: set[str] = set()
        self._enough_since = math.inf
        self._place = 0, ""

    def trains(self, client: str) -> bool:
        """Return whether a client trains; all others only evaluate."""
        return self.config.trains(first=client == self.first_client)

    def messages(
        self,
        server_round: int,
        clients: Sequence[Present],
        stages: Mapping[str, int],
        *,
        train: bool,
    ) -> Iterator[Message]:
        """Return one message per client that trains or evaluates, encoded when it is sent."""
        self._sent, self._times, self._train = [], [], train
        self._answered, self._failed, self._enough_since = set(), set(), math.inf
        self.asked = [
            present
            for present in clients
            if self.evaluate or (train and self.trains(present.member.client))
        ]
        adapters = self.state.adapters.items() if self.asked else ()
        encoded = {task: encode_state(state) for task, state in adapters}
        return (
            self._message(p, server_round, stages[p.member.client], train, encoded)
            for p in self.asked
        )

    def _message(
        self,
        present: Present,
        server_round: int,
        stage: int,
        train: bool,
        encoded: Mapping[str, ArrayRecord],
    ) -> Message:
        """Encode and record one client's instruction; keep only its metadata."""
        member = present.member
        trains = train and self.trains(member.client)
        tasks = self.state.tasks if stage == 2 else (member.task,)
        instruction = Instruction(
            server_round=server_round,
            stage=stage,
            tasks=self.state.tasks,
            adapters={task: self.state.adapters[task] for task in tasks},
            lora=self.state.lora_for(member.client, member.task, member.lora_rank),
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
        self.recorder.instruction(
            server_round, phase, member, stage, message.content, asked=len(self.asked)
        )
        self._sent.append(message.metadata)
        self._times.append(time.monotonic())
        if trains:
            self.roster.instructed(present)
        return message

    def replies(
        self, server_round: int, phase: str, replies: Iterable[Message]
    ) -> Iterator[tuple[Member, RecordDict]]:
        """Yield client and content as replies arrive; record errors and silence as failures.

        Call `fail` for a reply that cannot be used, before the next one is taken.
        """
        self._place = server_round, phase
        for index, reply in match(self._sent, self._without_late(replies)):
            present = self.asked[index]
            if reply is None:
                self._give_up(index)
            elif reply.has_error():
                self.fail(present.member, self._reason(present.member, reply))
            else:
                self._answered.add(present.member.client)
                content = reply.content
                del reply  # the next one must not be pulled while this one is in memory
                yield present.member, content
                del content
            self._enough_since = min(self._enough_since, self._now_if_enough())
        for present in self.asked[len(self._sent) :]:
            self.fail(present.member, "Not asked before the exchange closed.")

    def fail(self, member: Member, reason: str, *, received: RecordDict | None = None) -> None:
        """Record that a client failed in this exchange, with the bytes of a rejected reply."""
        self._failed.add(member.client)
        self._answered.discard(member.client)
        self.recorder.failure(*self._place, member.client, reason, received=received)

    def _reason(self, member: Member, reply: Message) -> str:
        try:
            return decode_error(reply.error, simulated=self.simulated)
        except RunError as error:
            self.recorder.failure(*self._place, member.client, str(error))
            raise

    # Stragglers.

    def closes(self) -> float:
        """Return the `time.monotonic` at which the exchange closes without further replies."""
        return self._enough_since + self.config.close_after.grace_seconds

    def _now_if_enough(self) -> float:
        """Return the time if the share of `strategy.close_after` has answered, else infinity."""
        share = self.config.close_after.fraction
        if share == 1:
            return math.inf
        needed = math.ceil(round(share * (len(self.asked) - len(self._failed)), 9))
        least = self.config.min_replies if self._train else 1
        return time.monotonic() if len(self._answered) >= max(needed, least) else math.inf

    def _give_up(self, index: int) -> None:
        """Record a client without a reply as failed; it stays busy until its time limit is over."""
        present, limit = self.asked[index], self.config.round_timeout_seconds
        unanswered = Unanswered(present, self._place[0], self._times[index], limit)
        if math.isinf(self._enough_since) or unanswered.expired:
            self.fail(present.member, f"No reply within {limit:g} s.")
            return
        self.late[self._sent[index].message_id] = unanswered
        self.roster.instructed(present)  # the client's stage is unknown from now on
        waited = human_seconds(self.config.close_after.grace_seconds)
        self.fail(
            present.member,
            f"No reply {waited} after {len(self._answered)} of {len(self.asked)} clients had "
            "answered; the exchange closed (`strategy.close_after`).",
        )

    def busy(self, grid: Grid, server_round: int) -> set[int]:
        """Record the replies to earlier exchanges that have come; return the nodes still busy."""
        self._place = server_round, "train"
        for message_id in [key for key, unanswered in self.late.items() if unanswered.expired]:
            del self.late[message_id]
        for _ in self._without_late(pull(grid, list(self.late))):
            pass
        return {unanswered.present.node_id for unanswered in self.late.values()}

    def _without_late(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Record and drop the replies to instructions of earlier exchanges; yield the others."""
        for reply in replies:
            late = self.late.pop(reply.metadata.reply_to_message_id, None)
            if late is None:
                yield reply
            elif not late.expired:
                self._record_late(late, reply)
            del reply

    def _record_late(self, late: Unanswered, reply: Message) -> None:
        member, number = late.present.member, late.exchange
        if reply.has_error():
            text = f"failed in exchange {number}, which had closed: {self._reason(member, reply)}"
            self.recorder.warning(self._place[0], member.client, text)
            return
        after = human_seconds(late.seconds)
        text = f"answered exchange {number} after {after}, when it had closed; discarded."
        self.recorder.warning(self._place[0], member.client, text, received=reply.content)
