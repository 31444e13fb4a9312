"""The two grids: one polls Flower's for replies, one answers every message in this process.

`PollingGrid` wraps the grid that Flower hands to the ServerApp. Flower's own `send_and_receive`
sleeps three seconds between polls and returns all replies at the end of a phase. This one polls
more often at first, and yields each reply as it arrives, so that progress is visible within an
exchange. It also retries while a SuperLink answers with a server error (a database locked for
seconds).

`InProcessGrid` replaces SuperLink, Ray and SuperNodes: a message is handed to the ClientApp when
its reply is pulled, one after the other. Messages carry the same serialised arrays as under
Flower, an exception in the ClientApp becomes an error reply, and a client computes with as many
threads as in one of Ray's workers, so that results equal those of a simulation, bit for bit.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import httpx  # Flower's HTTP client; its errors propagate through the grid
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

CLIENT_APP_RAISED = 0
"""Code of an error reply for an exception that the ClientApp did not handle."""

PATIENCE_SECONDS = 300.0
"""How long a SuperLink may answer with server errors before the run ends."""

NodeConfig = Mapping[str, bool | int | float | str]
Answer = TypeVar("Answer")
logger = logging.getLogger("flwr")

_SHORTEST, _LONGEST, _SHARE = 0.05, 3.0, 0.05
"""Pause between polls: a share of the time without a reply, within these seconds."""


class PollingGrid(Grid):
    """Delegates to another grid, polls for replies and yields them one by one."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages; yield each reply as it arrives, until all are in or `timeout` (s) is over.

        A reply that is there when the time is over is still yielded.
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
            if replies:  # others may be there by now: poll again before looking at the deadline
                last = now
                continue
            if now >= deadline:
                return
            pause = min(max(_SHORTEST, _SHARE * (now - last)), _LONGEST)
            time.sleep(min(pause, deadline - now))

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
        return _retry(self._grid.get_node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `flwr.serverapp.Grid`; never retried, as the messages may have arrived."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `flwr.serverapp.Grid`."""
        wanted = list(message_ids)
        return _retry(lambda: self._grid.pull_messages(wanted))


def _retry(request: Callable[[], Answer]) -> Answer:
    """Repeat an idempotent request while the SuperLink answers 5xx, for `PATIENCE_SECONDS`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return request()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500 or time.monotonic() >= deadline:
                raise
            logger.warning("The SuperLink reports a server error; retrying: %s", error)
        time.sleep(_LONGEST)


def match(
    messages: Sequence[Message], replies: Iterable[Message]
) -> Iterator[tuple[int, Message | None]]:
    """Yield the index of each message with its reply as it arrives, then with None for silence.

    Replies to other messages, and second replies, are ignored.
    """
    silent = dict.fromkeys(range(len(messages)))
    for reply in replies:
        # The grid assigns the ids when it sends, so they are looked up late.
        index_of = {messages[i].metadata.message_id: i for i in silent}
        index = index_of.get(reply.metadata.reply_to_message_id)
        if index is not None:
            del silent[index]
            yield index, reply
    for index in silent:
        yield index, None


class InProcessGrid(Grid):
    """Nodes 1 … n, whose ClientApp runs in this process when a reply is pulled.

    `node_configs` has one mapping per node, like ``--node-config``; `threads` is the number of CPU
    threads that torch may use while a client computes, None to leave it as it is. `nodes` are the
    connected nodes.
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
        """Whether every node is a simulated client."""
        return all("partition-id" in config for config in self.node_configs)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages; return the ids that they are given."""
        queued = {uuid.uuid4().hex: message for message in messages}
        for message_id, message in queued.items():
            message.metadata.__dict__["_message_id"] = message_id
        self._waiting |= queued
        return list(queued)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the next reply, if any: one at a time, so that the strategy sees it at once."""
        for message_id in message_ids:
            if message_id in self._waiting:
                reply = self.answer(self._waiting.pop(message_id))
                if reply is not None:
                    return [reply]
        return []

    def answer(self, message: Message) -> Message | None:
        """Run the ClientApp of a message's node; None would be its silence."""
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
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(CLIENT_APP_RAISED, reason), reply_to=message)

    def get_node_ids(self) -> list[int]:
        """Return the connected nodes."""
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return all replies; `timeout` is ignored: calls are synchronous."""
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
        """See `flwr.serverapp.Grid`."""
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


def in_simulation(grid: Grid) -> bool:
    """Return whether a grid's clients are simulated; no client can claim it."""
    return isinstance(grid, InMemoryGrid) or (isinstance(grid, InProcessGrid) and grid.simulated)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Let torch use `number` CPU threads inside the block, None for as many as before."""
    if number is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
