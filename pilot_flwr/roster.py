"""Who takes part in an exchange: the nodes are asked, as the server cannot know otherwise.

Node ids are random for every run and the server does not see which client a node is, so every
exchange begins with a query. It also brings what the stage flag depends on: whether the client
holds stage-1 state.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from pilot_flwr.errors import RunError, UpdateError
from pilot_flwr.failures import reason_of
from pilot_flwr.server_state import Member
from pilot_flwr.settings import StrategyConfig
from pilot_flwr.wire import RunInfo, decode_member, encode_query


@dataclass(frozen=True)
class Present:
    """A client that answered, and the node at which it is."""

    member: Member
    node_id: int


def call_roster(
    grid: Grid,
    run: RunInfo,
    *,
    server_round: int,
    wanted: int,
    config: StrategyConfig,
    on_failure: Callable[[str, str], None],
) -> list[Present]:
    """Ask all nodes who they are; wait until `wanted` clients are there or time is up.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    run : RunInfo
        Sent along.
    server_round : int
        Exchange that begins.
    wanted : int
        Clients to wait for, at most `strategy.wait_seconds`; fewer than that are taken then.
    config : StrategyConfig
        Times and the smallest number of clients.
    on_failure : callable
        Gets node and reason of every node that cannot take part.

    Returns
    -------
    list of Present
        Ordered by client id, which also breaks ties between equal distances.

    Raises
    ------
    RunError
        Two nodes are the same client, or fewer than `strategy.min_replies` clients came.
    """
    deadline = time.monotonic() + config.wait_seconds
    asked: set[int] = set()
    present: dict[str, Present] = {}
    reasons: list[str] = []
    while True:
        new = [node for node in grid.get_node_ids() if node not in asked]
        asked.update(new)
        for node, answer in _ask(grid, run, new, server_round, deadline - time.monotonic()):
            if isinstance(answer, str):
                reasons.append(answer)
                on_failure(f"node {node}", answer)
                continue
            if answer.client in present:
                raise RunError(
                    f"Nodes {present[answer.client].node_id} and {node} are both client "
                    f"{answer.client!r}; `client-id` must be different at every node."
                )
            present[answer.client] = Present(answer, node)
        if len(present) >= wanted or time.monotonic() >= deadline:
            break
        if reasons and len(reasons) == len(asked):
            break  # every node that there is refused; more waiting would not change that
        time.sleep(1.0)
    if len(present) < config.min_replies:
        raise RunError(
            f"Exchange {server_round}: {len(present)} of {wanted} clients can take part but "
            f"`strategy.min_replies` is {config.min_replies}."
            + "".join(f"\n{reason}" for reason in dict.fromkeys(reasons))
        )
    return [present[client] for client in sorted(present)]


def _ask(
    grid: Grid, run: RunInfo, nodes: list[int], server_round: int, seconds: float
) -> Iterable[tuple[int, Member | str]]:
    """Yield node and member, or node and the reason why it cannot take part."""
    messages = [
        Message(encode_query(run), node, MessageType.QUERY, ttl=seconds, group_id=str(server_round))
        for node in nodes
        if seconds > 0
    ]
    silent = set(nodes)
    for reply in grid.send_and_receive(messages, timeout=max(seconds, 0)):
        node = reply.metadata.src_node_id
        if reply.has_error():
            sent = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
            node = sent.get(reply.metadata.reply_to_message_id, node)
            silent.discard(node)
            yield node, reason_of(reply.error)
            continue
        silent.discard(node)
        try:
            yield node, decode_member(reply.content)
        except UpdateError as error:
            yield node, f"Its answer to the roster query is unusable: {error}."
    for node in sorted(silent):
        yield node, "It did not answer the roster query in time."
