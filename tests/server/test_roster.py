"""Which node is which client, decided without Flower."""

import math
import time

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import BelowMinimum, UpdateError
from pilot_flwr.protocol import Member, RunInfo
from pilot_flwr.server.roster import NEWCOMER_SECONDS, Claim, ClientNodes, Roster


def member(client, task="vqa"):
    return Member(client, task, 8, 0)


def resolve(clients, connected=(), **nodes):
    """`resolve` with nodes as n1="a" or n1="a key": who takes part where, and who does not."""
    claimed = {int(name[1:]): (*text.split(), "")[:2] for name, text in nodes.items()}
    claims = {node: Claim(member(client), key) for node, (client, key) in claimed.items()}
    present, refused = clients.resolve(claims, {*claims, *connected})
    clients.remember(present)
    return {client: one.node_id for client, one in present.items()}, refused


def test_two_new_nodes_with_one_id_are_both_refused_and_the_others_are_not():
    present, refused = resolve(ClientNodes(), n1="a", n2="b", n3="a")
    assert present == {"b": 2}
    assert refused == dict.fromkeys(
        (1, 3), "Nodes 1 and 3 are both client 'a'; `client-id` must be different at every node."
    )
    _, refused = resolve(ClientNodes(), n1="a", n2="a", n3="a")
    assert refused[2].startswith("Nodes 1, 2 and 3 are all client 'a'")


def test_ids_that_differ_in_case_only_are_one_id():
    present, refused = resolve(ClientNodes(), n1="Site", n2="site")
    assert present == {}
    assert refused[1].startswith("Nodes 1 ('Site'), 2 ('site') have ids that differ only in case")
    clients = ClientNodes()
    resolve(clients, n1="Site")
    with pytest.raises(UpdateError, match="`client-id` is 'site', .* only in case from 'Site'"):
        clients.check(member("site"))
    clients.check(member("Site"))


def test_a_client_that_is_there_is_not_replaced():
    clients = ClientNodes()
    resolve(clients, n1="a", n2="b")
    present, refused = resolve(clients, n1="a", n2="b", n3="a")
    assert present == {"a": 1, "b": 2}
    assert refused[3].startswith("Client 'a' is at node 1, which is still connected")
    # Nor while it is silent: it may be busy.
    present, refused = resolve(clients, connected=[1], n2="b", n3="a")
    assert (present, list(refused)) == ({"b": 2}, [3])


def test_a_client_whose_node_is_gone_comes_back_at_another():
    clients = ClientNodes()
    resolve(clients, n1="a", n2="b")
    assert resolve(clients, n2="b", n3="a") == ({"a": 3, "b": 2}, {})
    present, refused = resolve(clients, n1="a", n2="b", n3="a")  # the old one is late
    assert (present, list(refused)) == ({"a": 3, "b": 2}, [1])
    present, refused = resolve(clients, n2="b", n4="a", n5="a")  # two at once: nothing tells
    assert (present, list(refused)) == ({"b": 2}, [4, 5])


def test_a_node_that_is_another_client_now_holds_its_old_id_no_more():
    clients = ClientNodes()
    resolve(clients, n1="a", n2="b")
    assert resolve(clients, n1="b", n2="a") == ({"a": 2, "b": 1}, {})


def test_a_client_keeps_its_task():
    clients = ClientNodes()
    resolve(clients, n1="a")
    with pytest.raises(UpdateError, match="`task` is 'counting' but client 'a' of the run has 'vq"):
        clients.check(member("a", "counting"))


def test_a_client_belongs_to_the_key_that_first_used_its_id():
    clients = ClientNodes()
    assert resolve(clients, n1="a K1", n2="b K2") == ({"a": 1, "b": 2}, {})
    present, refused = resolve(clients, n2="b K2", n3="a K3")  # the owner is away
    assert present == {"b": 2}
    assert refused[3].startswith("It claims to be client 'a', whose key is K1, but it has K3.")
    present, refused = resolve(clients, n2="b K2", n3="a K3", n4="a K1")  # and returns
    assert (present, list(refused)) == ({"a": 4, "b": 2}, [3])
    assert clients.key_of == {"a": "K1", "b": "K2"}


def test_a_key_that_is_known_beforehand_counts_from_the_first_exchange():
    clients = ClientNodes(key_of={"a": "K1"})
    present, refused = resolve(clients, n1="a K3", n2="a K1")
    assert (present, list(refused)) == ({"a": 2}, [1])
    with pytest.raises(UpdateError, match="`client-id` is 'A', .* only in case from 'a'"):
        ClientNodes(key_of={"a": "K1"}).check(member("A"))


def test_a_new_key_of_the_operator_replaces_the_old_one():
    clients = ClientNodes(key_of={"a": "K1"})
    resolve(clients, n1="a K1")
    clients.key_of["a"] = "K2"
    present, refused = resolve(clients, n1="a K1", n2="a K2")
    assert (present, list(refused)) == ({"a": 2}, [1])


def test_two_new_nodes_with_different_keys_are_told_what_decides():
    _, refused = resolve(ClientNodes(), n1="a K1", n2="a K2")
    assert all(
        "list the client's in the file of `strategy.client_keys`" in r for r in refused.values()
    )


@given(
    st.lists(st.dictionaries(st.integers(1, 5), st.sampled_from(["K1", "K2", "K3"]), max_size=5))
)
def test_no_other_key_takes_part_as_a_client_once_it_has_taken_part(exchanges):
    clients, first = ClientNodes(), None
    for nodes in exchanges:
        claims = {node: Claim(member("a"), key) for node, key in nodes.items()}
        present, refused = clients.resolve(claims, set(nodes))
        clients.remember(present)
        assert {p.node_id for p in present.values()} | refused.keys() == nodes.keys()
        for found in present.values():
            first = first or found.key
            assert found.key == first
        # The one node with the client's key is never kept out by the others.
        right = [node for node, key in nodes.items() if key == first]
        assert first is None or len(right) != 1 or present["a"].node_id == right[0]


class Nodes(Grid):
    """Nodes that answer a query after `delays[node]` seconds, of a time that passes by sleeping."""

    run = create_message = send_and_receive = set_run = None

    def __init__(self, monkeypatch, delays):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
        self.now, self.delays, self.nodes, self.asked, self.waiting = 0.0, delays, [1], [], {}
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds

    def get_node_ids(self):
        return self.nodes

    def push_messages(self, messages):
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append((int(message.metadata.group_id), node))
            name = message.metadata.__dict__["_message_id"] = f"m{len(self.asked)}"
            self.waiting[name] = message, self.now + self.delays[node]
            yield name

    def pull_messages(self, message_ids):
        for name in message_ids:
            if self.now >= self.waiting[name][1]:
                yield Message(RecordDict(), reply_to=self.waiting[name][0])


def roster_of(clients=1, **config):
    """A roster of an open federation whose node n is client "cn", of any key."""
    roster = Roster(
        RunInfo("r", "/r", "t"), ("vqa",), {}, StrategyConfig(clients=clients, **config),
        lambda *failure: roster.failures.append(failure),
        identity={}, check_rank=lambda rank: None, known={}, simulated=False, keys={},
        operator_keys={},
    )  # fmt: skip
    roster.failures = []
    roster._read = lambda reply, query: Claim(member(f"c{query.node}"), f"K{query.node}")
    return roster


def test_a_silent_node_costs_one_wait_and_known_clients_are_not_asked(monkeypatch):
    grid, roster = Nodes(monkeypatch, {1: 2.0, 2: math.inf}), roster_of()
    assert [p.member.client for p in roster.call(grid, 1)] == ["c1"]
    grid.nodes = [1, 2]
    seconds = []
    for number in range(2, 20):
        before = grid.now
        (present,) = roster.call(grid, number)
        seconds.append(grid.now - before)
        roster.instructed(present)
        roster.used({"c1": 2})
        assert roster.call(grid, number)[0].member.stage_trained == 2  # and nobody is asked
    assert NEWCOMER_SECONDS <= seconds[0] < NEWCOMER_SECONDS + 1
    assert set(seconds[1:]) == {0.0}
    assert [number for number, node in grid.asked if node == 1] == [1]
    exchanges = [number for number, node in grid.asked if node == 2]
    assert exchanges == [2, 4, 7, 12]  # left alone for 1, 2, 4, 8 exchanges
    grid.nodes = [2]  # the known one leaves, and must be asked when it returns
    with pytest.raises(BelowMinimum):
        roster.config = StrategyConfig(clients=1, wait_seconds=0.01)
        roster.call(grid, 20)
    grid.nodes, grid.delays[1] = [1], 0.0
    roster.call(grid, 21)
    assert (21, 1) in grid.asked


def test_the_reply_of_a_silent_node_is_collected_at_the_next_exchange(monkeypatch):
    """It comes 100 s after the query, while an exchange of an hour is running."""
    grid, roster = Nodes(monkeypatch, {1: 2.0, 2: 100.0, 3: 12.0}), roster_of()
    roster.call(grid, 1)
    grid.nodes = [1, 2, 3]
    assert [p.member.client for p in roster.call(grid, 2)] == ["c1", "c3"]  # 3 is new, and in time
    silence = ("node 2", "No reply to the roster query in time.")
    assert [failure[1:] for failure in roster.failures] == [silence]
    grid.now += 3600
    before = grid.now
    assert [p.member.client for p in roster.call(grid, 3)] == ["c1", "c2", "c3"]
    assert grid.now == before and len(grid.asked) == 3


def test_of_several_queries_of_a_node_the_first_reply_counts(monkeypatch):
    """A second reply would say what the client held before it took part."""
    grid, roster = Nodes(monkeypatch, {1: 2.0, 2: math.inf}), roster_of()
    roster.call(grid, 1)
    grid.nodes = [1, 2]
    for number in (2, 3, 4):
        roster.call(grid, number)
    queries = [name for name, (message, _) in grid.waiting.items()
               if message.metadata.dst_node_id == 2]  # fmt: skip
    assert len(queries) == 2
    grid.waiting[queries[1]] = grid.waiting[queries[1]][0], grid.now
    for present in roster.call(grid, 5):
        roster.instructed(present)
    roster.used({"c1": 1, "c2": 1})
    grid.waiting[queries[0]] = grid.waiting[queries[0]][0], grid.now
    assert {p.member.client: p.member.stage_trained for p in roster.call(grid, 6)} == {
        "c1": 1,
        "c2": 1,
    }


def test_enough_replies_end_the_wait_for_a_silent_node(monkeypatch):
    """No client is known any more, as all failed: one answers, the other is not waited for."""
    grid, roster = Nodes(monkeypatch, {1: 2.0, 2: 2.0}), roster_of(wait_seconds=300)
    grid.nodes = [1, 2]
    for present in roster.call(grid, 1):
        roster.instructed(present)
    grid.delays, before = {1: 5.0, 2: math.inf}, grid.now
    assert [p.member.client for p in roster.call(grid, 2)] == ["c1"]
    assert grid.now - before < 5 + NEWCOMER_SECONDS + 1


@pytest.mark.parametrize("setting", ["min_replies", "min_train_nodes", "min_available_nodes"])
def test_fewer_nodes_than_a_minimum_are_an_error_that_names_it(monkeypatch, setting):
    grid = Nodes(monkeypatch, {1: 2.0})
    roster = roster_of(clients=4, wait_seconds=20, **{setting: 3})
    with pytest.raises(BelowMinimum, match=f"1 of 4 clients .* `strategy.{setting}` is 3"):
        roster.call(grid, 1)
    assert 20 <= grid.now < 21
