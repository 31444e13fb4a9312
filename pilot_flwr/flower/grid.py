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
import math
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import httpx  # Flower's HTTP client; its errors propagate through the grid
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

from pilot_flwr.config.overrides import gpus_per_client
from pilot_flwr.config.schema import SimulationConfig

PATIENCE_SECONDS = 300.0
"""How long a SuperLink may answer with server errors before the run ends."""

NodeConfig = Mapping[str, bool | int | float | str]
Answer = TypeVar("Answer")
logger = logging.getLogger("flwr")

_SHORTEST, _LONGEST, _SHARE = 0.05, 3.0, 0.02
"""Pause between polls: a share of the time without a reply, within these seconds."""

_PULLED = 4
"""Maximum number of replies pulled in one request: each may have hundreds of megabytes."""

_QUEUED = 4
"""Unanswered messages per client that a simulation runs at a time, so that no worker is idle."""


class _YieldingGrid(Grid):
    """Yields replies one by one; a subclass pushes and pulls the messages."""

    pulled = _PULLED

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        at_once: int | None = None,
        closes: Callable[[], float] = lambda: math.inf,
        late: Collection[str] = (),
    ) -> Iterator[Message]:
        """Send messages; yield each reply as it arrives, until all are in or `timeout` (s) is over.

        Each message is taken from `messages` when it is sent, then released; at most `at_once` are
        unanswered, None for any number. Receiving also ends at `closes()`, a time of
        `time.monotonic` that may change with every reply. Replies that have arrived by then are
        still yielded. Replies to the earlier messages `late` are yielded but not waited for.
        """
        outgoing: Iterator[Message] | None = iter(messages)
        waiting: dict[str, None] = {}
        last = time.monotonic()
        latest = last + timeout if timeout is not None else math.inf
        while True:
            while outgoing is not None and (at_once is None or len(waiting) < at_once):
                if (message := next(outgoing, None)) is None:
                    outgoing = None
                    break
                waiting |= dict.fromkeys(i for i in self.push_messages([message]) if i)
                del message
            if not waiting:
                return
            answered = False
            for reply in pull(self, [*waiting, *late]):
                answered = True
                waiting.pop(reply.metadata.reply_to_message_id, None)
                yield reply
                del reply
            now, deadline = time.monotonic(), min(latest, closes())
            if answered:  # others may have arrived by now: poll again before checking the deadline
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
        self.pulled = getattr(grid, "pulled", self.pulled)

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


def pull(grid: Grid, message_ids: Sequence[str]) -> Iterator[Message]:
    """Yield the replies that have arrived, pulled a few at a time and released one by one."""
    most = getattr(grid, "pulled", _PULLED)
    for at in range(0, len(message_ids), most):
        replies = list(grid.pull_messages(message_ids[at : at + most]))
        while replies:
            yield replies.pop(0)


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
    sent: Sequence[Metadata], replies: Iterable[Message]
) -> Iterator[tuple[int, Message | None]]:
    """Yield each message's index with its reply as it arrives, then with None if there is none.

    `sent` has the metadata of the messages and grows while they are sent. Replies to other
    messages, and second replies, are ignored.
    """
    index_of: dict[str, int] = {}
    seen = 0
    for reply in replies:
        while seen < len(sent):  # the grid has assigned the ids by now
            index_of[sent[seen].message_id] = seen
            seen += 1
        index = index_of.pop(reply.metadata.reply_to_message_id, None)
        if index is not None:
            yield index, reply
        del reply
    for index in sorted([*index_of.values(), *range(seen, len(sent))]):
        yield index, None


class InProcessGrid(_YieldingGrid):
    """Runs the ClientApp of nodes 1 … n in this process, when a reply is pulled.

    `node_configs` has one mapping per node, like ``--node-config``; `threads` is the number of CPU
    threads for torch while a client computes, None for torch's own. `nodes` are the connected
    nodes.
    """

    pulled = sys.maxsize  # one reply in any case, of the oldest message

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


def clients_at_once(grid: Grid, simulation: SimulationConfig) -> int | None:
    """Return the maximum of unanswered messages in a simulation; None at real sites."""
    if isinstance(grid, InProcessGrid):
        return _QUEUED
    if not isinstance(grid, InMemoryGrid):
        return None
    import ray  # runs in this process, on one machine or on a cluster

    resources = ray.cluster_resources() if ray.is_initialized() else {}
    gpus = gpus_per_client(simulation, resources.get("GPU", 0))
    fit = int(resources.get("CPU", 0) / simulation.client_cpus)
    fit = min(fit, int(resources.get("GPU", 0) / gpus)) if gpus else fit
    return _QUEUED * fit if fit else None


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
