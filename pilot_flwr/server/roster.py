"""Which node is which client: nodes say who they are, and two may say the same.

Pure: no Flower, no waiting. An id belongs to the node that took part under it in the exchange
before, as long as that node is connected, so that nobody replaces a client that is there. When it
is gone, whoever comes with the id is the client come back: node ids change whenever a SuperNode
restarts without authentication. Where nobody was before, two nodes with one id are both refused,
as nothing tells which is right. Ids become names of files and folders, which some disks compare
without case, so ids that differ in case only count as one.

Who takes part in an exchange: the nodes are asked, as the server cannot know otherwise.

Node ids are random for every run and the server does not see which client a node is, so every
exchange begins with a query. It also brings what the stage flag depends on: whether the client
holds stage-1 state. Answers come from outside and are checked here, once.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from pilot_flwr.config.rules import check_name
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import BelowMinimum, ConfigError, UpdateError
from pilot_flwr.flower import messages as wire
from pilot_flwr.flower.compatibility import differences
from pilot_flwr.flower.failures import reason_of
from pilot_flwr.flower.grid import match
from pilot_flwr.formatting import count, human_seconds, one_line
from pilot_flwr.protocol import Member

DIFFERENT = "`client-id` must be different at every node."


@dataclass(frozen=True)
class Present:
    """A client that answered, and the node at which it is."""

    member: Member
    node_id: int


@dataclass
class Register:
    """The clients of a run, and the node of each.

    Parameters
    ----------
    task_of : dict
        Task of every client that is known, by id. An id is known from the first time that it
        takes part, or from the start if the federation is configured.
    node_of : dict
        Node at which a client last took part.
    """

    task_of: dict[str, str] = field(default_factory=dict)
    node_of: dict[str, int] = field(default_factory=dict)

    def check(self, member: Member) -> None:
        """Say whether a member fits what is known of its id.

        Raises
        ------
        UpdateError
            The id is one that is known in other letters, or has another task.
        """
        for client, task in self.task_of.items():
            if client.casefold() == member.client.casefold() and client != member.client:
                raise UpdateError(
                    f"`client-id` is {member.client!r}, which differs in case only from "
                    f"{client!r}, a client of the run"
                )
            if client == member.client and task != member.task:
                raise UpdateError(
                    f"`task` is {member.task!r} but client {client!r} of the run has {task!r}"
                )

    def settle(
        self, claims: Mapping[int, Member], connected: Collection[int]
    ) -> tuple[dict[str, Present], dict[int, str]]:
        """Decide who is who, in one exchange.

        Parameters
        ----------
        claims : mapping
            Node → who it says it is; all of them passed `check`.
        connected : collection of int
            The nodes that are there now.

        Returns
        -------
        present : dict
            Client → it and its node.
        refused : dict
            Node → why it cannot take part.
        """
        present: dict[str, Present] = {}
        refused: dict[int, str] = {}
        by_id: dict[str, list[int]] = {}
        for node in sorted(claims):
            by_id.setdefault(claims[node].client.casefold(), []).append(node)
        for nodes in by_id.values():
            client = claims[nodes[0]].client
            holder = self._holder(client, claims, connected)
            if holder is not None:
                refused |= {node: _taken(client, holder) for node in nodes if node != holder}
                nodes = [node for node in nodes if node == holder]
            elif len(nodes) > 1:
                refused |= dict.fromkeys(nodes, _same(nodes, [claims[n].client for n in nodes]))
                continue
            for node in nodes:
                present[client] = Present(claims[node], node)
        return present, refused

    def _holder(
        self, client: str, claims: Mapping[int, Member], connected: Collection[int]
    ) -> int | None:
        """Return the node that took part as `client` before, unless it is gone or another now."""
        node = self.node_of.get(client)
        if node is None:
            return None
        if node in claims:
            return node if claims[node].client == client else None
        return node if node in connected else None

    def note(self, present: Mapping[str, Present]) -> None:
        """Remember who takes part in an exchange."""
        for client, one in present.items():
            self.task_of[client] = one.member.task
            self.node_of[client] = one.node_id


def _taken(client: str, old: int) -> str:
    return (
        f"Client {client!r} is at node {old}, which is still connected; {DIFFERENT} If this node "
        "replaces that one, it can take part once that one is gone."
    )


def _same(nodes: list[int], ids: list[str]) -> str:
    listed = ", ".join(map(str, nodes[:-1])) + f" and {nodes[-1]}"
    if len(set(ids)) == 1:
        word = "both" if len(nodes) == 2 else "all"
        return f"Nodes {listed} are {word} client {ids[0]!r}; {DIFFERENT}"
    which = ", ".join(f"{node} ({name!r})" for node, name in zip(nodes, ids, strict=True))
    return f"Nodes {which} have ids that differ in case only; {DIFFERENT}"


RETRY_SECONDS = 30.0
"""After which a refused node of a real site is asked again: its owner may have mended it."""


class Roster:
    """Asks all nodes who they are.

    Parameters
    ----------
    run : wire.RunInfo
        Sent along.
    tasks : tuple of str
        The run's.
    expected : Mapping[str, str]
        Task of every client of the federation, by client id; not looked at if it is open
        (`strategy.clients` above 0).
    config : StrategyConfig
        Times, the number of clients and the smallest one.
    identity : Mapping[str, str]
        What `pilot_flwr.flower.compatibility.identity_of` says of the server.
    on_failure : callable
        Gets exchange, client (or node) and reason of everyone that cannot take part.
    known : Mapping[str, str]
        Task of every client that took part before, by client id, if the run was resumed.
    simulated : bool
        Whether all nodes are there from the start, so that none is to come instead of one that
        is refused.
    """

    def __init__(
        self,
        run: wire.RunInfo,
        tasks: tuple[str, ...],
        expected: Mapping[str, str],
        config: StrategyConfig,
        on_failure: Callable[[int, str, str], None],
        *,
        identity: Mapping[str, str],
        known: Mapping[str, str],
        simulated: bool,
    ) -> None:
        self.run, self.tasks, self.config = run, tasks, config
        self.open = config.clients > 0
        self.expected = {} if self.open else dict(expected)
        self.register = Register({**self.expected, **known})
        self.on_failure, self.identity, self.simulated = on_failure, identity, simulated
        self._called = False

    @property
    def size(self) -> int:
        """Number of clients that the first exchange of a new run waits for."""
        return self.config.clients or len(self.expected)

    def call(self, grid: Grid, server_round: int, *, train: bool = True) -> list[Present]:
        """Return who takes part in an exchange, ordered by client id.

        The first call, in a resumed run as well, waits for all clients of the federation, later
        ones for `strategy.min_replies`, both at most `strategy.wait_seconds`. A client that is not
        there is a failure of the exchange, not of the run, and so is a node that is refused. With
        `train` false the clients are to evaluate only.

        Raises
        ------
        BelowMinimum
            Fewer than `strategy.min_replies` clients came.
        RunError
            A Ray worker died.
        """
        everyone = max(self.size, len(self.register.task_of))
        wanted = self.config.min_replies if self._called else everyone
        query = wire.encode_query(self.run, server_round, train=train)
        deadline = time.monotonic() + self.config.wait_seconds
        sweep = _Sweep(lambda node, why: self.on_failure(server_round, f"node {node}", why))
        while True:
            connected = set(grid.get_node_ids())
            new = sweep.to_ask(connected, retry=not self.simulated)
            seconds = deadline - time.monotonic()
            for node, answer in self._ask(grid, new, query, server_round, seconds):
                sweep.note(node, answer)
            present, doubtful = self.register.settle(sweep.claims, set(grid.get_node_ids()))
            out = len(sweep.refused) + len(doubtful)
            # In a simulation all nodes are there from the start: nobody else is to come. At real
            # sites someone may start, or mend, a node; a wrong one stands for nobody.
            settled = len(present) + (out if self.simulated else 0)
            if settled >= wanted or time.monotonic() >= deadline:
                break
            if self.simulated and out and out == len(sweep.asked):
                break
            time.sleep(max(0.0, min(1.0, deadline - time.monotonic())))
        for node, why in doubtful.items():
            self.on_failure(server_round, f"node {node}", why)
        self._check_enough(present, [*sweep.refused.values(), *doubtful.values()], server_round)
        self.register.note(present)
        self._called = True
        return [present[client] for client in sorted(present)]

    def _check_enough(
        self, present: Mapping[str, Present], refused: list[str], server_round: int
    ) -> None:
        if len(present) < self.config.min_replies:
            raise BelowMinimum(
                f"Exchange {server_round}: {len(present)} of {self.size} clients can "
                f"take part but `strategy.min_replies` is {self.config.min_replies}."
                + "".join(f"\n{reason}" for reason in dict.fromkeys(refused))
            )
        if self.open and server_round == 1 and len(present) < self.size:
            self.on_failure(
                server_round,
                count(self.size - len(present), "client"),
                f"{len(present)} of {self.size} clients came within "
                f"{human_seconds(self.config.wait_seconds)}; others can join later.",
            )
        for client in sorted(self.register.task_of.keys() - present.keys()):
            self.on_failure(server_round, client, "No node said that it is this client.")

    def _ask(
        self, grid: Grid, nodes: list[int], query: RecordDict, server_round: int, seconds: float
    ) -> Iterator[tuple[int, Member | str]]:
        """Yield node and member, or node and the reason why it cannot take part."""
        silence = "It did not answer the roster query in time."
        if seconds <= 0:
            yield from ((node, silence) for node in nodes)
            return
        group = str(server_round)
        messages = [
            Message(query, node, MessageType.QUERY, ttl=seconds, group_id=group) for node in nodes
        ]
        for index, reply in match(messages, grid.send_and_receive(messages, timeout=seconds)):
            if reply is None:
                yield nodes[index], silence
            elif reply.has_error():
                yield nodes[index], reason_of(reply.error, simulated=self.simulated)
            else:
                yield nodes[index], self._read(reply)

    def _read(self, reply: Message) -> Member | str:
        try:
            with wire.refuse_unusable():
                self._check_version(wire.decode_identity(reply.content))
                member = wire.decode_member(reply.content)
                self._check(member)
        except UpdateError as error:
            return one_line(f"Its answer to the roster query is refused: {error}.")
        return member

    def _check(self, member: Member) -> None:
        if self.open:
            self._check_names(member)
            self.register.check(member)
        elif self.expected.get(member.client) != member.task:
            raise UpdateError(
                f"client {member.client!r} with task {member.task!r} is not one of "
                + ", ".join(f"{client} ({task})" for client, task in self.expected.items())
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

    def _check_version(self, identity: Mapping[str, str]) -> None:
        if found := differences(identity, self.identity):
            raise UpdateError("it is of another version than the server: " + "; ".join(found))

    def _check_names(self, member: Member) -> None:
        try:
            check_name("client-id", member.client)
        except ConfigError as error:
            raise UpdateError(str(error).removesuffix(".")) from None
        if member.task not in self.tasks:
            raise UpdateError(
                f"`task` is {member.task!r} but must be one of {', '.join(self.tasks)}"
            )


class _Sweep:
    """The answers to one exchange's query, as nodes come, go and are asked again."""

    def __init__(self, on_refusal: Callable[[int, str], None]) -> None:
        self.on_refusal = on_refusal
        self.asked: dict[int, float] = {}
        self.claims: dict[int, Member] = {}
        self.refused: dict[int, str] = {}
        self._told: dict[int, str] = {}

    def to_ask(self, connected: Collection[int], *, retry: bool) -> list[int]:
        """Return which nodes to ask now; with `retry` also, at times, those that were refused."""
        now = time.monotonic()
        for node in [node for node in self.asked if node not in connected]:
            del self.asked[node]  # if it comes back, it may say something else
            self.claims.pop(node, None)
            self.refused.pop(node, None)
        again = {n for n in self.refused if retry and now - self.asked[n] >= RETRY_SECONDS}
        chosen = [node for node in connected if node not in self.asked or node in again]
        self.asked |= dict.fromkeys(chosen, now)
        return sorted(chosen)

    def note(self, node: int, answer: Member | str) -> None:
        """Keep an answer; a refusal is told once."""
        self.claims.pop(node, None)
        self.refused.pop(node, None)
        if isinstance(answer, Member):
            self.claims[node] = answer
        else:
            self.refused[node] = answer
            if self._told.get(node) != answer:
                self._told[node] = answer
                self.on_refusal(node, answer)
