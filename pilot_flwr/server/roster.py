"""Find out which clients take part in an exchange, and at which node each of them is.

Node ids are random in every run and say nothing about the client, so a node is queried before it
takes part. Its reply also says whether the client holds stage-1 state, which its stage depends on.
Replies are foreign input; they are checked here, once. A node that stays connected is queried again
only after a failure: the state of a client follows from a successful session. No exchange waits
twice for a silent node; its query stays open, and a later exchange collects the reply.

A real site proves in its reply that it holds the client's key (`pilot_flwr.flower.client_key`). A
client id is bound to the first key that took part under it in the run, or to the one in the
operator's file: a node with another key is refused and gets no message of the client.

If several nodes hold the right key, the site runs twice or has returned under a new node id. The
client keeps the node where it last took part while that node is connected; otherwise all are
refused. Ids become names of files and folders, and some file systems ignore case, so ids that
differ only in case count as one.
"""

import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from pilot_flwr.config.rules import check_name
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import BelowMinimum, ConfigError, UpdateError
from pilot_flwr.flower.client_key import statement, verify
from pilot_flwr.flower.compatibility import differences
from pilot_flwr.flower.grid import pull
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

NEWCOMER_SECONDS = 60.0
"""How long an exchange with enough clients waits for the reply to a node's first query."""

_SHORTEST, _LONGEST, _SHARE = 0.05, 1.0, 0.05
"""Pause between polls: a share of the time since the call, within these seconds."""

_SILENCE = "No reply to the roster query in time."
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


class _Query(NamedTuple):
    """A query without a reply."""

    node: int
    exchange: int
    nonce: str
    expires: float


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
        check_rank: Callable[[int], None],
        known: Mapping[str, str],
        simulated: bool,
        keys: Mapping[str, str],
        operator_keys: Mapping[str, str],
    ) -> None:
        """Keys map clients to fingerprints: those known so far, and the operator's, if any.

        `check_rank` raises `ConfigError` for a LoRA rank that no client may have.
        """
        self.run, self.tasks, self.config = run, tasks, config
        self.open = config.clients > 0
        self.expected = {} if self.open else dict(expected)
        self.clients = ClientNodes({**self.expected, **known}, {**keys, **operator_keys})
        self.operator_keys = operator_keys
        self.on_failure, self.identity, self.simulated = on_failure, identity, simulated
        self.check_rank = check_rank
        self._called = False
        self._claims: dict[int, Claim] = {}
        self._instructed: dict[str, Present] = {}
        self._open: dict[str, _Query] = {}
        self._silences: dict[int, int] = {}
        self._asked_from: dict[int, int] = {}

    @property
    def size(self) -> int:
        """Number of clients for which the first exchange of a new run waits."""
        return self.config.clients or len(self.expected)

    def instructed(self, present: Present) -> None:
        """Record that a client is asked to train; its stage is unknown until it succeeds."""
        self._instructed[present.member.client] = present
        self._claims.pop(present.node_id, None)

    def used(self, stages: Mapping[str, int]) -> None:
        """Record the clients of a closed exchange's updates, with the stage that each now holds."""
        for client, stage in stages.items():
            node, found = self._instructed[client].node_id, self._instructed[client]
            self._claims[node] = Claim(replace(found.member, stage_trained=stage), found.key)

    def call(
        self,
        grid: Grid,
        server_round: int,
        *,
        train: bool = True,
        busy: Callable[[], set[int]] = set,
    ) -> list[Present]:
        """Return the clients that take part in an exchange, ordered by id.

        The first call, also in a resumed run, waits for all clients of the federation, later calls
        for `StrategyConfig.min_available`; both at most `strategy.wait_seconds`. Once there are
        enough clients at real sites, a node has `NEWCOMER_SECONDS` for its first query; one that
        stays silent is not waited for again, and is queried again after 1, 2, 4, … exchanges. A
        missing client and a refused node are failures of the exchange, not of the run. Without
        `train`, clients only evaluate. Nodes that are still `busy` with an earlier instruction are
        neither queried nor reported missing.
        """
        everyone = max(self.size, len(self.clients.task_of))
        wanted = self.config.min_available if self._called else everyone
        began = time.monotonic()
        deadline, enough_since = began + self.config.wait_seconds, math.inf
        answers = _Answers(
            lambda node, why: self.on_failure(server_round, f"node {node}", why), self._claims
        )
        asked: set[int] = set()
        while True:
            away = busy()
            connected = set(grid.get_node_ids()) - away
            unasked = answers.to_query(connected, retry=not self.simulated)
            if len(answers.claims) >= wanted and not self.simulated:
                unasked = [n for n in unasked if self._asked_from.get(n, 0) <= server_round]
            self._send(grid, unasked, server_round, train)
            asked.update(unasked)
            heard = self._collect(grid, answers, connected)
            present, conflicts = self.clients.resolve(answers.claims, set(grid.get_node_ids()))
            out = len(answers.refused) + len(conflicts)
            # A simulation has all its nodes from the start, so a refused one is a missing client.
            # At real sites, nodes may still start or be fixed, and a refused one may be a stranger.
            decided = len(present) + (out if self.simulated else 0)
            now, new = time.monotonic(), self._silent(asked) - self._silences.keys()
            if decided >= wanted:
                enough_since = min(enough_since, now)
                if not new or (not self.simulated and now >= enough_since + NEWCOMER_SECONDS):
                    break
            if now >= deadline or (self.simulated and out and out == len(answers.queried)):
                break
            if not heard:
                pause = min(max(_SHORTEST, _SHARE * (now - began)), _LONGEST)
                time.sleep(min(pause, deadline - now))
        for node, why in conflicts.items():
            self.on_failure(server_round, f"node {node}", why)
        self._keep(present, answers, self._silent(asked), server_round)
        reasons = [*answers.refused.values(), *conflicts.values()]
        if away:
            reasons.append(f"{count(len(away), 'client')} still at work on an earlier exchange.")
        self._check_enough(present, reasons, server_round, away)
        self.clients.remember(present)
        self._called = True
        return [present[client] for client in sorted(present)]

    def _silent(self, nodes: Collection[int]) -> set[int]:
        """Return those of the nodes that have not answered their query."""
        return {query.node for query in self._open.values()} & set(nodes)

    def _keep(
        self,
        present: Mapping[str, Present],
        answers: "_Answers",
        silent: Collection[int],
        server_round: int,
    ) -> None:
        """Keep the claims of the present clients, and when each silent node is queried again."""
        self._claims = {p.node_id: Claim(p.member, p.key) for p in present.values()}
        for node in silent:
            self._silences[node] = self._silences.get(node, 0) + 1
            self._asked_from[node] = server_round + 1 + 2 ** (self._silences[node] - 1)
            answers.add(node, _SILENCE)

    def _check_enough(
        self,
        present: Mapping[str, Present],
        refused: list[str],
        server_round: int,
        away: Collection[int],
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
            if self.clients.node_of.get(client) in away:
                continue
            reason = "No connected node identified itself as this client."
            self.on_failure(server_round, client, reason)

    def _send(self, grid: Grid, nodes: Iterable[int], server_round: int, train: bool) -> None:
        """Query nodes; a reply is valid until the next exchange, however long this one takes."""
        ttl = self.config.wait_seconds + self.config.round_timeout_seconds
        for node in nodes:
            nonce, expires = secrets.token_hex(32), time.monotonic() + ttl
            content = encode_query(self.run, server_round, train=train, nonce=nonce)
            message = Message(content, node, MessageType.QUERY, ttl=ttl, group_id=str(server_round))
            for message_id in filter(None, grid.push_messages([message])):
                self._open[message_id] = _Query(node, server_round, nonce, expires)

    def _collect(self, grid: Grid, answers: "_Answers", connected: Collection[int]) -> bool:
        """Add the replies that have come; return whether there were any."""
        now = time.monotonic()
        self._open = {
            key: q for key, q in self._open.items() if q.node in connected and now < q.expires
        }
        heard: set[int] = set()
        while replies := list(pull(grid, list(self._open))):
            for reply in replies:
                query = self._open.get(reply.metadata.reply_to_message_id)
                if query is None or query.node in heard:  # the node has answered another query
                    continue
                heard.add(query.node)
                self._silences.pop(query.node, None)
                if reply.has_error():
                    answers.add(query.node, decode_error(reply.error, simulated=self.simulated))
                else:
                    answers.add(query.node, self._read(reply, query))
            self._open = {key: q for key, q in self._open.items() if q.node not in heard}
        return bool(heard)

    def _read(self, reply: Message, query: _Query) -> Claim | str:
        try:
            with refuse_unusable():
                if found := differences(decode_identity(reply.content), self.identity):
                    raise UpdateError("version mismatch with the server: " + "; ".join(found))
                member = decode_member(reply.content)
                self._check(member)
                if self.simulated:
                    return Claim(member)
                signed = statement(self.run, query.exchange, query.nonce, query.node, member)
                return Claim(member, verify(decode_proof(reply.content), signed))
        except UpdateError as error:
            return one_line(f"Its reply to the roster query is refused: {error}.")

    def _check(self, member: Member) -> None:
        try:
            if self.open:
                check_name("client-id", member.client)
            if member.lora_rank:
                self.check_rank(member.lora_rank)
        except ConfigError as error:
            raise UpdateError(str(error).removesuffix(".")) from None
        if self.open:
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

    def __init__(self, on_refusal: Callable[[int, str], None], known: Mapping[int, Claim]) -> None:
        """`known` has the claims of nodes that need no query while they stay connected."""
        self.on_refusal = on_refusal
        self.queried: dict[int, float] = dict.fromkeys(known, time.monotonic())
        self.claims: dict[int, Claim] = dict(known)
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
