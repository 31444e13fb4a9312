"""Which node is which client, decided without Flower."""

import pytest

from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import Member
from pilot_flwr.server.roster import ClientNodes


def member(client, task="vqa"):
    return Member(client, task, 8, 0)


def resolve(clients, connected=(), **nodes):
    """`resolve` with nodes as n1="a": who takes part at which node, and who does not."""
    claims = {int(name[1:]): member(client) for name, client in nodes.items()}
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
