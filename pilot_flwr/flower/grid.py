"""The two grids: one polls Flower's for replies, one answers every message in this process.

`PollingGrid` wraps the grid that Flower hands to the ServerApp. Flower's own `send_and_receive`
polls every three seconds and returns all replies at the end of a phase; this one polls more often
at first and yields each reply as it arrives. It retries while a SuperLink answers with a server
error (a database locked for seconds).

`InProcessGrid` replaces SuperLink, Ray and SuperNodes: it calls the ClientApp when a reply is
pulled, one message after the other. Messages carry the same serialised arrays as under Flower, an
exception becomes an error reply, and a client computes with as many threads as in a Ray worker, so
results equal those of a simulation bit for bit.
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

PATIENCE_SECONDS = 300.0
"""How long a SuperLink may answer with server errors before the run ends."""

NodeConfig = Mapping[str, bool | int | float | str]
Answer = TypeVar("Answer")
logger = logging.getLogger("flwr")

_SHORTEST, _LONGEST, _SHARE = 0.05, 3.0, 0.05
"""Pause between polls: a share of the time without a reply, within these seconds."""


class _YieldingGrid(Grid):
    """Yields replies one by one; a subclass pushes and pulls the messages."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages; yield each reply as it arrives, until all are in or `timeout` (s) is over.

        A reply that is there when the time is over is still yielded.
        """
        outgoing = list(messages)
        if not outgoing:
            return
        waiting = dict.fromkeys(i for i in self.push_messages(outgoing) if i)
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


class PollingGrid(_YieldingGrid):
    """Delegates to another grid; retries its idempotent requests."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: object) -> None:
        """See `flwr.serverapp.Grid`."""
        self._grid.set_run(run)  # type: ignore[arg-type]

    @property
    def run(self) -> object:  # type: ignore[override]
        """See `flwr.serverapp.Grid`."""
        return self._grid.run

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
    """Yield each message's index with its reply as it arrives, then with None if there is none.

    Replies to other messages, and second replies, are ignored.
    """
    silent = dict.fromkeys(range(len(messages)))
    for reply in replies:
        # The grid assigns the ids when it sends, so look them up only now.
        index_of = {messages[i].metadata.message_id: i for i in silent}
        index = index_of.get(reply.metadata.reply_to_message_id)
        if index is not None:
            del silent[index]
            yield index, reply
    for index in silent:
        yield index, None


class InProcessGrid(_YieldingGrid):
    """Runs the ClientApp of nodes 1 … n in this process, when a reply is pulled.

    `node_configs` has one mapping per node, like ``--node-config``; `threads` is the number of CPU
    threads for torch while a client computes, None for torch's own. `nodes` are the connected
    nodes.
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
        """Queue messages; return their new ids."""
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
        """Run the ClientApp of a message's node; None means that it stays silent."""
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
        except Exception as error:  # as Flower does, with the code 0
            return Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)

    def get_node_ids(self) -> list[int]:
        """Return the connected nodes."""
        return list(self.nodes)

    def set_run(self, run: object) -> None:
        """See `flwr.serverapp.Grid`."""
        self._run = run

    @property
    def run(self) -> object:  # type: ignore[override]
        """See `flwr.serverapp.Grid`."""
        return self._run


def in_simulation(grid: Grid) -> bool:
    """Return whether a grid's clients are simulated: a fact of the grid, not a client's claim."""
    return isinstance(grid, InMemoryGrid) or (isinstance(grid, InProcessGrid) and grid.simulated)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Let torch use `number` CPU threads inside the block; None leaves the number unchanged."""
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
