"""Flower's grid without Flower's processes: every message is answered in this one.

`InProcessGrid` stands in the place of the SuperLink, Ray and the SuperNodes: what the server
sends to a node is handed to the ClientApp when its reply is asked for, one message after the
other. Messages carry the same serialised arrays as under Flower, an exception of the ClientApp
becomes an error reply, and a client computes with as many threads as one of Ray's workers has,
so that the results are those of a simulation, bit for bit.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

CLIENT_APP_RAISED = 0
"""Error code of a reply for an exception that the ClientApp did not answer itself."""

NodeConfig = Mapping[str, bool | int | float | str]


class InProcessGrid(Grid):
    """Nodes 1 … n, which answer when their replies are pulled.

    Parameters
    ----------
    client_app : ClientApp
        Answers the messages.
    node_configs : sequence of mapping
        One per node, as its ``--node-config`` would be.
    overrides : str
        The app's run config value `overrides`.
    run_id : int
        Flower's id of the run.
    threads : int, optional
        CPU threads of torch while a client computes; None leaves them as they are.

    Attributes
    ----------
    nodes : list of int
        The nodes that are connected.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        node_configs: Sequence[NodeConfig],
        overrides: str,
        run_id: int = 1,
        threads: int | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 0, 0
        self.client_app = client_app
        self.node_configs = list(node_configs)
        self.nodes = list(range(1, len(self.node_configs) + 1))
        self.overrides, self.run_id, self.threads = overrides, run_id, threads
        self._waiting: dict[str, Message] = {}
        self._run: object = None

    @property
    def simulated(self) -> bool:
        """Whether every node is a simulated client, and none a real site's."""
        return all("partition-id" in config for config in self.node_configs)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages, give them their ids, and return these."""
        taken = {uuid.uuid4().hex: message for message in messages}
        for identity, message in taken.items():
            message.metadata.__dict__["_message_id"] = identity
        self._waiting |= taken
        return list(taken)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the reply to the first of the messages that has none yet, if there is any.

        One at a time, so that a strategy sees a reply before the next client begins.
        """
        for identity in message_ids:
            if identity in self._waiting:
                reply = self.answer(self._waiting.pop(identity))
                if reply is not None:
                    return [reply]
        return []

    def answer(self, message: Message) -> Message | None:
        """Hand a message to its node and return the reply; None would be a node's silence."""
        node = message.metadata.dst_node_id
        context = Context(
            run_id=self.run_id,
            node_id=node,
            node_config=dict(self.node_configs[node - 1]),
            state=RecordDict(),
            run_config={"overrides": self.overrides},
        )
        try:
            with torch_threads(self.threads):
                return self.client_app(message=message, context=context)
        except Exception as error:  # as Flower does
            return Message(
                Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message
            )

    def get_node_ids(self) -> list[int]:
        """Return the connected nodes."""
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return all replies; `timeout` is for who waits, and nobody does."""
        waiting = self.push_messages(messages)
        replies: list[Message] = []
        while found := self.pull_messages(waiting):
            replies += found
        return replies

    def set_run(self, run: object) -> None:
        """See `flwr.serverapp.Grid`."""
        self._run = run

    @property
    def run(self) -> object:  # type: ignore[override]
        """See `flwr.serverapp.Grid`: what `set_run` was given."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `flwr.serverapp.Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Let torch use `number` CPU threads inside, as many as before afterwards."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)
