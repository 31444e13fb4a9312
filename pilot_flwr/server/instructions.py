"""Send the instructions of an exchange, and match the replies with the clients that were asked.

`Instructions.messages` encodes one message per client when it is sent; `Instructions.replies`
yields the content of each successful reply as it arrives, and records all other clients as failed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import ArrayRecord, Message, MessageType, Metadata, RecordDict

from pilot_flwr.algorithm.server_state import ServerState
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import RunError
from pilot_flwr.flower.codec import encode_state
from pilot_flwr.flower.grid import match
from pilot_flwr.flower.messages import decode_error, encode_instruction
from pilot_flwr.protocol import Instruction, Member, RunInfo
from pilot_flwr.server.event_recorder import EventRecorder
from pilot_flwr.server.roster import Present, Roster


class Instructions:
    """The instructions of one exchange after the other, and the replies to them.

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
        self._sent: list[Metadata] = []

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
        """Return one message per client that has something to do, encoded when it is sent."""
        self._sent = []
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
        """Encode and record one client's instruction; keep its metadata alone."""
        member = present.member
        trains = train and self.trains(member.client)
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
        self.recorder.instruction(
            server_round, phase, member, stage, message.content, asked=len(self.asked)
        )
        self._sent.append(message.metadata)
        if trains:
            self.roster.instructed(present)
        return message

    def replies(
        self, server_round: int, phase: str, replies: Iterable[Message]
    ) -> Iterator[tuple[Member, RecordDict]]:
        """Yield client and content as replies arrive; record errors and silence as failures."""
        for index, reply in match(self._sent, replies):
            member = self.asked[index].member
            if reply is not None and not reply.has_error():
                content = reply.content
                del reply  # the next one must not be pulled while this one is in memory
                yield member, content
                del content
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
        for present in self.asked[len(self._sent) :]:
            reason = f"Not reached within {self.config.round_timeout_seconds:g} s."
            self.recorder.failure(server_round, phase, present.member.client, reason)
