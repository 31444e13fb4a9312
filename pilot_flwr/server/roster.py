"""Find out which clients take part in an exchange, and at which node each of them is.

Node ids are random in every run and say nothing about the client, so every exchange begins with a
query. Its replies also say whether a client holds stage-1 state, which its stage depends on.
Replies are foreign input; they are checked here, once.

A real site proves in its reply that it holds the client's key (`pilot_flwr.flower.client_key`). A
client id is bound to the first key that took part under it in the run, or to the one in the
operator's file: a node with another key is refused and gets no message of the client.

If several nodes hold the right key, the site runs twice or has returned under a new node id. The
client keeps the node where it last took part while that node is connected; otherwise all are
refused. Ids become names of files and folders, and some file systems ignore case, so ids that
differ only in case count as one.
"""

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from pilot_flwr.config.rules import check_name
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import BelowMinimum, ConfigError, UpdateError
from pilot_flwr.flower.client_key import statement, verify
from pilot_flwr.flower.compatibility import differences
from pilot_flwr.flower.grid import match
from pilot_flwr.flower.messages import (
    decode_error,
    decode_identity,
    decode_member,
    decode_proof,
    encode_query,
    refuse_unusable,
)
from pilot_flwr.formatting import count, human_seconds, one_line
from pilot_flwr.protocol import Member, RunInfo

logger = logging.getLogger("flwr")
RETRY_SECONDS = 30.0
"""Pause before a refused node of a real site is queried again, as its owner may fix it."""

_UNIQUE = "`client-id` must be different at every node."


class Claim(NamedTuple):
    """A node's claim to be a client, with its key's fingerprint, empty in a simulation."""

    member: Member
    key: str = ""


class Present(NamedTuple):
    """A client that takes part, and its node."""

    member: Member
    key: str
    node_id: int


@dataclass
class ClientNodes:
    """The known clients of a run: their tasks, their keys, and where they last took part."""

    task_of: dict[str, str] = field(default_factory=dict)
    key_of: dict[str, str] = field(default_factory=dict)
    node_of: dict[str, int] = field(default_factory=dict)

    def check(self, member: Member) -> None:
        """Raise `UpdateError` if the id is known with another task, or in another case."""
        for client in {**self.task_of, **self.key_of}:
            if client.casefold() == member.client.casefold() and client != member.client:
                raise UpdateError(
                    f"`client-id` is {member.client!r}, which differs only in case from "
                    f"{client!r}, a client of the run"
                )
        if (task := self.task_of.get(member.client, member.task)) != member.task:
            raise UpdateError(
                f"`task` is {member.task!r} but client {member.client!r} of the run has {task!r}"
            )

    def resolve(
        self, claims: Mapping[int, Claim], connected: Collection[int]
    ) -> tuple[dict[str, Present], dict[int, str]]:
        """Resolve conflicting claims, which map nodes to checked members with their keys.

        Returns the present clients by id, and the other nodes with the reason of their refusal.
        """
        present: dict[str, Present] = {}
        refused: dict[int, str] = {}
        nodes_of: dict[str, list[int]] = {}
        for node in sorted(claims):
            client, key = claims[node].member.client, claims[node].key
            if (wanted := self.key_of.get(client, key)) == key:
                nodes_of.setdefault(client.casefold(), []).append(node)
            else:
                refused[node] = (
                    f"It claims to be client {client!r}, whose key is {wanted}, but it has {key}. "
                    "If the client has a new key, list it in the file of `strategy.client_keys`."
                )
        for nodes in nodes_of.values():
            client = claims[nodes[0]].member.client
            holder = self._holder(client, claims, connected)
            if holder is not None:
                held = (
                    f"Client {client!r} is at node {holder}, which is still connected; {_UNIQUE} "
                    "If this node replaces that one, it can take part once that one is gone."
                )
                refused |= {node: held for node in nodes if node != holder}
                nodes = [node for node in nodes if node == holder]
            elif len(nodes) > 1:
                refused |= dict.fromkeys(nodes, _ambiguous({n: claims[n] for n in nodes}))
                continue
            for node in nodes:  # one, or none if its holder is silent
                present[client] = Present(*claims[node], node)
        return present, refused

    def _holder(
        self, client: str, claims: Mapping[int, Claim], connected: Collection[int]
    ) -> int | None:
        """Return the node that last took part as `client`, unless it left or claims otherwise."""
        node = self.node_of.get(client)
        if node is None:
            return None
        if node in claims:
            member, key = claims[node]
            same = member.client == client and self.key_of.get(client, key) == key
            return node if same else None
        return node if node in connected else None

    def remember(self, present: Mapping[str, Present]) -> None:
        """Store task, key and node of the clients in an exchange."""
        for client, found in present.items():
            self.task_of[client] = found.member.task
            self.node_of[client] = found.node_id
            if found.key and client not in self.key_of:
                logger.info("Client %s has the key %s", client, found.key)
                self.key_of[client] = found.key


def _ambiguous(claims: Mapping[int, Claim]) -> str:
    """Return why all nodes that claim one id are refused."""
    nodes, claimed = list(claims), {node: claim.member.client for node, claim in claims.items()}
    listed = ", ".join(map(str, nodes[:-1])) + f" and {nodes[-1]}"
    if len(set(claimed.values())) == 1:
        word = "both" if len(nodes) == 2 else "all"
        keys = " They have different keys: list the client's in the file of `strategy.client_keys`."
        several = len({claim.key for claim in claims.values()}) > 1
        return f"Nodes {listed} are {word} client {claimed[nodes[0]]!r}; {_UNIQUE}{keys * several}"
    which = ", ".join(f"{node} ({name!r})" for node, name in claimed.items())
    return f"Nodes {which} have ids that differ only in case; {_UNIQUE}"


class Roster:
    """Asks all nodes which clients they are."""

    def __init__(
        self,
        run: RunInfo,
        tasks: tuple[str, ...],
        expected: Mapping[str, str],
        config: StrategyConfig,
        on_failure: Callable[[int, str, str], None],
        *,
        identity: Mapping[str, str],
        known: Mapping[str, str],
        simulated: bool,
        keys: Mapping[str, str],
        operator_keys: Mapping[str, str],
    ) -> None:
        """Keys map clients to fingerprints: those known so far, and the operator's, if any."""
        self.run, self.tasks, self.config = run, tasks, config
        self.open = config.clients > 0
        self.expected = {} if self.open else dict(expected)
        self.clients = ClientNodes({**self.expected, **known}, {**keys, **operator_keys})
        self.operator_keys = operator_keys
        self.on_failure, self.identity, self.simulated = on_failure, identity, simulated
        self._called = False

    @property
    def size(self) -> int:
        """Number of clients for which the first exchange of a new run waits."""
        return self.config.clients or len(self.expected)

    def call(self, grid: Grid, server_round: int, *, train: bool = True) -> list[Present]:
        """Return the clients that take part in an exchange, ordered by id.

        The first call, also in a resumed run, waits for all clients of the federation, later calls
        for `StrategyConfig.min_available`; both at most `strategy.wait_seconds`. A missing client
        and a refused node are failures of the exchange, not of the run. Without `train`, clients
        only evaluate.
        """
        everyone = max(self.size, len(self.clients.task_of))
        wanted = self.config.min_available if self._called else everyone
        deadline = time.monotonic() + self.config.wait_seconds
        answers = _Answers(lambda node, why: self.on_failure(server_round, f"node {node}", why))
        while True:
            connected = set(grid.get_node_ids())
            unasked = answers.to_query(connected, retry=not self.simulated)
            seconds = deadline - time.monotonic()
            for node, answer in self._query(grid, unasked, server_round, train, seconds):
                answers.add(node, answer)
            present, conflicts = self.clients.resolve(answers.claims, set(grid.get_node_ids()))
            out = len(answers.refused) + len(conflicts)
            # A simulation has all its nodes from the start, so a refused one is a missing client.
            # At real sites, nodes may still start or be fixed, and a refused one may be a stranger.
            decided = len(present) + (out if self.simulated else 0)
            if decided >= wanted or time.monotonic() >= deadline:
                break
            if self.simulated and out and out == len(answers.queried):
                break
            time.sleep(max(0.0, min(1.0, deadline - time.monotonic())))
        for node, why in conflicts.items():
            self.on_failure(server_round, f"node {node}", why)
        self._check_enough(present, [*answers.refused.values(), *conflicts.values()], server_round)
        self.clients.remember(present)
        self._called = True
        return [present[client] for client in sorted(present)]

    def _check_enough(
        self, present: Mapping[str, Present], refused: list[str], server_round: int
    ) -> None:
        least = self.config.min_available
        if len(present) < least:
            names = ("min_replies", "min_train_nodes", "min_available_nodes")
            setting = next(name for name in names if getattr(self.config, name) == least)
            raise BelowMinimum(
                f"Exchange {server_round}: {len(present)} of {self.size} clients can "
                f"take part but `strategy.{setting}` is {least}."
                + "".join(f"\n{reason}" for reason in dict.fromkeys(refused))
            )
        if self.open and server_round == 1 and len(present) < self.size:
            self.on_failure(
                server_round,
                count(self.size - len(present), "client"),
                f"{len(present)} of {self.size} clients connected within "
                f"{human_seconds(self.config.wait_seconds)}; others can join later.",
            )
        for client in sorted(self.clients.task_of.keys() - present.keys()):
            reason = "No connected node identified itself as this client."
            self.on_failure(server_round, client, reason)

    def _query(
        self, grid: Grid, nodes: list[int], server_round: int, train: bool, seconds: float
    ) -> Iterator[tuple[int, Claim | str]]:
        """Yield each node with its claim, or with the reason why it cannot take part."""
        silence = "No reply to the roster query in time."
        if seconds <= 0:
            yield from ((node, silence) for node in nodes)
            return
        nonce = secrets.token_hex(32)
        query = encode_query(self.run, server_round, train=train, nonce=nonce)
        kind, group = MessageType.QUERY, str(server_round)
        messages = [Message(query, node, kind, ttl=seconds, group_id=group) for node in nodes]
        for index, reply in match(messages, grid.send_and_receive(messages, timeout=seconds)):
            if reply is None:
                yield nodes[index], silence
            elif reply.has_error():
                yield nodes[index], decode_error(reply.error, simulated=self.simulated)
            else:
                yield nodes[index], self._read(reply, nodes[index], server_round, nonce)

    def _read(self, reply: Message, node: int, server_round: int, nonce: str) -> Claim | str:
        try:
            with refuse_unusable():
                if found := differences(decode_identity(reply.content), self.identity):
                    raise UpdateError("version mismatch with the server: " + "; ".join(found))
                member = decode_member(reply.content)
                self._check(member)
                if self.simulated:
                    return Claim(member)
                signed = statement(self.run, server_round, nonce, node, member)
                return Claim(member, verify(decode_proof(reply.content), signed))
        except UpdateError as error:
            return one_line(f"Its reply to the roster query is refused: {error}.")

    def _check(self, member: Member) -> None:
        if self.open:
            try:
                check_name("client-id", member.client)
            except ConfigError as error:
                raise UpdateError(str(error).removesuffix(".")) from None
            if member.task not in self.tasks:
                raise UpdateError(
                    f"`task` is {member.task!r} but must be one of {', '.join(self.tasks)}"
                )
            self.clients.check(member)
        elif self.expected.get(member.client) != member.task:
            raise UpdateError(
                f"client {member.client!r} with task {member.task!r} is not one of "
                + ", ".join(f"{client} ({task})" for client, task in self.expected.items())
            )
        if self.operator_keys and member.client not in self.operator_keys:
            raise UpdateError(
                f"the file of `strategy.client_keys` does not list client {member.client!r}"
            )
        if member.examples < 1:
            raise UpdateError(f"`examples` is {member.examples} but must be at least 1")
        if 0 < self.config.max_examples < member.examples:
            raise UpdateError(
                f"`examples` is {member.examples} but `strategy.max_examples` is "
                f"{self.config.max_examples}"
            )
        if member.stage_trained not in (0, 1, 2):
            raise UpdateError(f"`stage-trained` is {member.stage_trained} but must be 0, 1 or 2")


class _Answers:
    """Replies to one exchange's query, while nodes connect, leave and are queried again."""

    def __init__(self, on_refusal: Callable[[int, str], None]) -> None:
        self.on_refusal = on_refusal
        self.queried: dict[int, float] = {}
        self.claims: dict[int, Claim] = {}
        self.refused: dict[int, str] = {}
        self._reported: dict[int, str] = {}

    def to_query(self, connected: Collection[int], *, retry: bool) -> list[int]:
        """Return the nodes to query now; with `retry`, also refused ones after a pause."""
        now = time.monotonic()
        for node in self.queried.keys() - set(connected):
            del self.queried[node]  # if it returns, it may give another answer
            self.claims.pop(node, None)
            self.refused.pop(node, None)
        again = {n for n in self.refused if retry and now - self.queried[n] >= RETRY_SECONDS}
        chosen = [node for node in connected if node not in self.queried or node in again]
        self.queried |= dict.fromkeys(chosen, now)
        return sorted(chosen)

    def add(self, node: int, answer: Claim | str) -> None:
        """Store a node's answer; report each refusal once."""
        if isinstance(answer, Claim):
            self.claims[node] = answer
            self.refused.pop(node, None)
            return
        self.claims.pop(node, None)
        self.refused[node] = answer
        if self._reported.get(node) != answer:
            self._reported[node] = answer
            self.on_refusal(node, answer)
