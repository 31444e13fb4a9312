"""A Flower grid that hands replies over as they come.

Flower's own `send_and_receive` sleeps three seconds between polls and returns all replies at
the end of a phase. Here the wait grows with the time that nothing came, up to the same three
seconds, so that waiting costs at most a few per cent of a phase; and replies are yielded one by
one, so that a strategy's loop over them shows the progress of a round. A SuperLink that answers a
question with an error of its own (a database that is locked for seconds) is asked again.
Which kind of grid it is also tells whether a run is simulated, as nothing that a client says can.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import httpx  # Flower's own client; its errors come through the grid
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from pilot_flwr.flower.in_process import InProcessGrid

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
