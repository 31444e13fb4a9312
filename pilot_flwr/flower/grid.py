"""Flower's grid without Flower's processes: every message is answered in this one.

`InProcessGrid` stands in the place of the SuperLink, Ray and the SuperNodes: what the server
sends to a node is handed to the ClientApp when its reply is asked for, one message after the
other. Messages carry the same serialised arrays as under Flower, an exception of the ClientApp
becomes an error reply, and a client computes with as many threads as one of Ray's workers has,
so that the results are those of a simulation, bit for bit.

A Flower grid that hands replies over as they come.

Flower's own `send_and_receive` sleeps three seconds between polls and returns all replies at
the end of a phase. Here the wait grows with the time that nothing came, up to the same three
seconds, so that waiting costs at most a few per cent of a phase; and replies are yielded one by
one, so that a strategy's loop over them shows the progress of a round. A SuperLink that answers a
question with an error of its own (a database that is locked for seconds) is asked again.
Which kind of grid it is also tells whether a run is simulated, as nothing that a client says can.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import httpx  # Flower's own client; its errors come through the grid
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

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


_SHORTEST, _LONGEST, _SHARE = 0.05, 3.0, 0.05

PATIENCE_SECONDS = 300.0
"""How long a SuperLink may answer with errors of its own before the run ends."""

logger = logging.getLogger("flwr")
Answer = TypeVar("Answer")


def in_simulation(grid: Grid) -> bool:
    """Return whether the clients behind a grid are simulated here, by either engine."""
    return isinstance(grid, InMemoryGrid) or (isinstance(grid, InProcessGrid) and grid.simulated)


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Return what `ask` returns; while a SuperLink answers with an error 5xx, ask again.

    Only for questions: what is repeated must change nothing.

    Raises
    ------
    httpx.HTTPStatusError
        It still does after `PATIENCE_SECONDS`, or its error is not its own.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500 or time.monotonic() >= deadline:
                raise
            logger.warning("The SuperLink answers with an error and is asked again: %s", error)
        time.sleep(_LONGEST)


def match(
    messages: Sequence[Message], replies: Iterable[Message]
) -> Iterator[tuple[int, Message | None]]:
    """Yield which message each reply answers, then those that none has answered.

    Parameters
    ----------
    messages : sequence of Message
        As handed to the grid, which gives them their ids when it sends them.
    replies : iterable of Message
        As the grid yields them.

    Yields
    ------
    tuple of int and Message or None
        Index of a message and its reply, as it arrives; None for silence, at the end. A
        reply to something older, or a second one, is passed over.
    """
    silent = dict.fromkeys(range(len(messages)))
    for reply in replies:
        index_of = {messages[i].metadata.message_id: i for i in silent}
        index = index_of.get(reply.metadata.reply_to_message_id)
        if index is not None:
            del silent[index]
            yield index, reply
    for index in silent:
        yield index, None


class PollingGrid(Grid):
    """Delegates to another grid; only `send_and_receive` differs.

    Parameters
    ----------
    grid : Grid
        As a ServerApp gets it.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages; yield each reply when it arrives, until all are in or `timeout` (s).

        A reply that is there when the time is up is still taken.
        """
        outgoing = list(messages)
        if not outgoing:
            return
        waiting = dict.fromkeys(i for i in self._grid.push_messages(outgoing) if i)
        last = time.monotonic()
        deadline = last + timeout if timeout is not None else float("inf")
        while waiting:
            replies = list(self.pull_messages(list(waiting)))
            for reply in replies:
                waiting.pop(reply.metadata.reply_to_message_id, None)
                yield reply
            now = time.monotonic()
            if replies:  # more may be there, which no deadline takes back
                last = now
                continue
            if now >= deadline:
                return
            nap = min(max(_SHORTEST, _SHARE * (now - last)), _LONGEST)
            time.sleep(min(nap, deadline - now))

    def set_run(self, run: object) -> None:
        """See `flwr.serverapp.Grid`."""
        self._grid.set_run(run)  # type: ignore[arg-type]

    @property
    def run(self) -> object:  # type: ignore[override]
        """See `flwr.serverapp.Grid`."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `flwr.serverapp.Grid`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `flwr.serverapp.Grid`."""
        return patiently(self._grid.get_node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `flwr.serverapp.Grid`."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `flwr.serverapp.Grid`."""
        asked = list(message_ids)
        return patiently(lambda: self._grid.pull_messages(asked))
