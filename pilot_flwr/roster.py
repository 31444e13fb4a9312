"""Who takes part in an exchange: the nodes are asked, as the server cannot know otherwise.

Node ids are random for every run and the server does not see which client a node is, so every
exchange begins with a query. It also brings what the stage flag depends on: whether the client
holds stage-1 state. Answers come from outside and are checked here, once.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from pilot_flwr import wire
from pilot_flwr.errors import RunError, UpdateError
from pilot_flwr.failures import reason_of
from pilot_flwr.grid import match
from pilot_flwr.server_state import Member
from pilot_flwr.strategy_settings import StrategyConfig


@dataclass(frozen=True)
class Present:
    """A client that answered, and the node at which it is."""

    member: Member
    node_id: int


class Roster:
    """Asks all nodes who they are.

    Parameters
    ----------
    run : wire.RunInfo
        Sent along.
    expected : Mapping[str, str]
        Task of every client of the federation, by client id.
    config : StrategyConfig
        Times and the smallest number of clients.
    on_failure : callable
        Gets exchange, client (or node) and reason of everyone that cannot take part.
    """

    def __init__(
        self,
        run: wire.RunInfo,
        expected: Mapping[str, str],
        config: StrategyConfig,
        on_failure: Callable[[int, str, str], None],
    ) -> None:
        self.run, self.expected, self.config = run, expected, config
        self.on_failure = on_failure

    def call(self, grid: Grid, server_round: int) -> list[Present]:
        """Return who takes part in an exchange, ordered by client id.

        The first exchange waits for all clients of the federation, later ones for
        `strategy.min_replies`, both at most `strategy.wait_seconds`. A client that is not there
        is a failure of the exchange, not of the run.

        Raises
        ------
        RunError
            Two nodes are the same client, fewer than `strategy.min_replies` clients came, or a
            Ray worker died.
        """
        wanted = len(self.expected) if server_round == 1 else self.config.min_replies
        deadline = time.monotonic() + self.config.wait_seconds
        asked: set[int] = set()
        present: dict[str, Present] = {}
        refused: list[str] = []
        while True:
            new = [node for node in grid.get_node_ids() if node not in asked]
            asked.update(new)
            for node, answer in self._ask(grid, new, server_round, deadline - time.monotonic()):
                if isinstance(answer, str):
                    refused.append(answer)
                    self.on_failure(server_round, f"node {node}", answer)
                else:
                    _add(present, Present(answer, node))
            if len(present) + len(refused) >= wanted or time.monotonic() >= deadline:
                break
            if refused and len(refused) == len(asked):
                break  # every node that there is refused; waiting would not change that
            time.sleep(1.0)
        self._check_enough(present, refused, server_round)
        return [present[client] for client in sorted(present)]

    def _check_enough(
        self, present: Mapping[str, Present], refused: list[str], server_round: int
    ) -> None:
        if len(present) < self.config.min_replies:
            raise RunError(
                f"Exchange {server_round}: {len(present)} of {len(self.expected)} clients can "
                f"take part but `strategy.min_replies` is {self.config.min_replies}."
                + "".join(f"\n{reason}" for reason in dict.fromkeys(refused))
            )
        for client in sorted(self.expected.keys() - present.keys()):
            self.on_failure(server_round, client, "No node said that it is this client.")

    def _ask(
        self, grid: Grid, nodes: list[int], server_round: int, seconds: float
    ) -> Iterator[tuple[int, Member | str]]:
        """Yield node and member, or node and the reason why it cannot take part."""
        silence = "It did not answer the roster query in time."
        if seconds <= 0:
            yield from ((node, silence) for node in nodes)
            return
        content, group = wire.encode_query(self.run), str(server_round)
        messages = [
            Message(content, node, MessageType.QUERY, ttl=seconds, group_id=group) for node in nodes
        ]
        for index, reply in match(messages, grid.send_and_receive(messages, timeout=seconds)):
            if reply is None:
                yield nodes[index], silence
            elif reply.has_error():
                yield nodes[index], reason_of(reply.error)
            else:
                yield nodes[index], self._read(reply)

    def _read(self, reply: Message) -> Member | str:
        try:
            with wire.refuse_unusable():
                member = wire.decode_member(reply.content)
                self._check(member)
        except UpdateError as error:
            return f"Its answer to the roster query is refused: {error}."
        return member

    def _check(self, member: Member) -> None:
        if self.expected.get(member.client) != member.task:
            raise UpdateError(
                f"client {member.client!r} with task {member.task!r} is not one of "
                + ", ".join(f"{client} ({task})" for client, task in self.expected.items())
            )
        if member.examples < 1:
            raise UpdateError(f"`examples` is {member.examples} but must be at least 1")
        if member.stage_trained not in (0, 1, 2):
            raise UpdateError(f"`stage-trained` is {member.stage_trained} but must be 0, 1 or 2")


def _add(present: dict[str, Present], one: Present) -> None:
    client = one.member.client
    if client in present:
        raise RunError(
            f"Nodes {present[client].node_id} and {one.node_id} are both client {client!r}; "
            "`client-id` must be different at every node."
        )
    present[client] = one
