"""Who takes part in an exchange: the nodes are asked, as the server cannot know otherwise.

Node ids are random for every run and the server does not see which client a node is, so every
exchange begins with a query. It also brings what the stage flag depends on: whether the client
holds stage-1 state. Answers come from outside and are checked here, once.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from pilot_flwr.checks import check_name
from pilot_flwr.errors import BelowMinimum, ConfigError, UpdateError
from pilot_flwr.flower import wire
from pilot_flwr.flower.failures import reason_of
from pilot_flwr.flower.grid import match
from pilot_flwr.flower.identity import differences
from pilot_flwr.server.claims import Present, Register
from pilot_flwr.server.state import Member
from pilot_flwr.settings.strategy import StrategyConfig
from pilot_flwr.wording import count, human_seconds, one_line

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
        What `pilot_flwr.flower.identity.identity_of` says of the server.
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
