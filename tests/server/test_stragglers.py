"""Exchanges that close before all sites have answered, late replies, and nodes that are busy."""

import re
import time

import pytest
from flwr.app import Error, Message, MessageType
from inprocess import TWO_TASKS, Federation, assert_same_state
from quick_training import quick_training

from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import BelowMinimum, ConfigError
from pilot_flwr.launch.prepare import check_settings
from pilot_flwr.run.history import bytes_up

CLIENTS = ["counting-0", "counting-1", "vqa-0", "vqa-1"]
QUICK = f"{TWO_TASKS} evaluation.enabled=false strategy.rounds=2"
HALF = f"{QUICK} strategy.close_after.fraction=0.5 strategy.close_after.grace_seconds=10"
MOST = HALF.replace("fraction=0.5", "fraction=0.75")


class Sites(Federation):
    """Four real sites whose replies come `delay(client, exchange)` seconds after the order."""

    def __init__(self, folder, overrides, clock, delay=lambda client, exchange: 0.0):
        nodes = [{"client-id": c, "state-folder": str(folder / "sites" / c)} for c in CLIENTS]
        super().__init__(folder, overrides, num_nodes=len(nodes), node_configs=nodes)
        self.clock, self.delay, self.sent = clock, delay, {}
        push, answer = self.grid.push_messages, self.grid.pull_messages

        def pushed(messages):
            ids = push(messages)
            self.sent |= dict.fromkeys(ids, clock.now)
            return ids

        def pulled(ids):
            return answer([i for i in ids if i in self.grid._waiting and self.due(i)])

        self.grid.push_messages, self.grid.pull_messages = pushed, pulled

    def due(self, message_id):
        message = self.grid._waiting[message_id]
        if message.metadata.message_type == MessageType.QUERY:
            return True
        client = self.grid.node_configs[message.metadata.dst_node_id - 1]["client-id"]
        number = int(message.metadata.group_id)
        return self.clock.now >= self.sent[message_id] + self.delay(client, number)

    def trained(self, exchange):
        return {e["client"]: e["stage"] for e in self.events("train", round=exchange)}

    def asked(self, exchange):
        return sorted(e["client"] for e in self.events("order", round=exchange))

    def failures(self):
        return [(e["round"], e["client"], e["reason"]) for e in self.events("failure")]

    def warnings(self):
        return [(e["round"], e["client"], e["text"]) for e in self.events("warning")]


class Clock:
    """Time that passes only by sleeping."""

    now = 1000.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    with quick_training():
        yield clock


def slow(*slow_ones):
    """Return delays: (client, exchange, seconds) for the slow ones, none for all others."""
    seconds = {(client, exchange): delay for client, exchange, delay in slow_ones}
    return lambda client, exchange: seconds.get((client, exchange), 0.0)


@pytest.mark.parametrize(
    "more",
    [
        "model.sent_dtype=int8",
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("strategy.lora=exact", marks=pytest.mark.slow),
    ],
)
def test_a_straggler_equals_a_client_whose_reply_is_lost_and_that_is_away(tmp_path, clock, more):
    """The reference has no stragglers: an error reply in exchange 1, no node in exchange 2.

    Of a first participation: the client holds stage 1, the server nothing of it.
    """
    delays = slow(("vqa-1", 1, 18.0), ("vqa-0", 2, 9.0))  # it comes while exchange 2 waits
    run = Sites(tmp_path / "one", f"{MOST} {more}", clock, delays).run()
    reference = Sites(tmp_path / "two", f"{QUICK} {more}", clock)
    everyone = reference.grid.nodes

    def lose(message, reply):
        if message.metadata.message_type != MessageType.TRAIN:
            return reply
        first = message.metadata.group_id == "1"
        reference.grid.nodes = everyone[:3] if first else everyone
        lost = first and message.metadata.dst_node_id == 4
        return Message(Error(0, "lost"), reply_to=message) if lost else reply

    reference.grid.on_reply = lose
    reference.run()
    assert "vqa-1" not in run.trained(1) and run.asked(2) == CLIENTS[:3]
    assert run.trained(3)["vqa-1"] == reference.trained(3)["vqa-1"] == 2
    for number in (1, 2, 3):
        assert run.trained(number) == reference.trained(number)
    assert_same_state(run.strategy.state, reference.strategy.state)
    (failure,) = run.failures()
    assert failure == (1, "vqa-1", "No reply 10.0 s after 3 of 4 clients had answered; the "
                       "exchange closed (`strategy.close_after`).")  # fmt: skip
    busy, late = run.warnings()
    assert busy == (2, "vqa-1", "still works on exchange 1, so it is not instructed.")
    assert late[:2] == (2, "vqa-1")
    assert re.fullmatch("answered exchange 1 after 18.. s, when it had closed; discarded.", late[2])
    up = run.events("warning")[1]["up"]
    assert sum(up.values()) > 0  # of the late reply
    trained = sum(sum(e["up"].values()) for e in run.events("train", round=2))
    assert sum(bytes_up(run.folder.events, 2).values()) == trained + sum(up.values())


@pytest.mark.parametrize(
    ("delay", "grace", "in_time"), [(0.0, 0, True), (9.99, 10, True), (10.01, 10, False),
                                    (0.3, 0, False)]
)  # fmt: skip
def test_a_reply_within_the_grace_time_is_used(tmp_path, clock, delay, grace, in_time):
    overrides = MOST.replace("grace_seconds=10", f"grace_seconds={grace}")
    overrides = f"{overrides} strategy.rounds=1"
    run = Sites(tmp_path, overrides, clock, slow(("vqa-0", 1, delay))).run()
    assert ("vqa-0" in run.trained(1)) == in_time
    assert [f[:2] for f in run.failures()] == [(1, "vqa-0")] * (not in_time)
    before = 1000.0 + grace * (not in_time)
    assert clock.now <= max(before, 1000.0 + delay) + 0.2  # no longer than needed


def test_a_run_whose_sites_are_in_time_is_the_run_without_the_setting(tmp_path, clock):
    runs = [
        Sites(tmp_path / name, overrides, clock, lambda client, n: 0.5 * CLIENTS.index(client))
        for name, overrides in (("one", QUICK), ("two", HALF))
    ]
    events = [
        [e.to_dict() | {"elapsed": 0, "seconds": 0, "turn_seconds": 0, "started": 0}
         for e in run.run().folder.events]
        for run in runs
    ]  # fmt: skip
    assert events[0] == events[1]
    assert_same_state(*(run.strategy.state for run in runs))


def test_failed_clients_are_no_answers_and_the_minimum_comes_first(tmp_path, clock):
    """Two fail at once; one answers after 5 s, one after 100 s."""
    delays = slow(("vqa-0", 1, 5.0), ("vqa-1", 1, 100.0))
    overrides = f"{HALF} strategy.rounds=1"

    def run(folder, more):
        federation = Sites(folder, f"{overrides} {more}", clock, delays)

        def fail(message, reply):
            train = message.metadata.message_type == MessageType.TRAIN
            first = train and message.metadata.group_id == "1"
            if first and message.metadata.dst_node_id < 3:
                return Message(Error(0, "boom"), reply_to=message)
            return reply

        federation.grid.on_reply = fail
        return federation.run()

    assert list(run(tmp_path / "one", "").trained(1)) == ["vqa-0"]  # half of two
    both = run(tmp_path / "two", "strategy.min_replies=2 strategy.fraction_train=1")
    assert list(both.trained(1)) == ["vqa-0", "vqa-1"]


def test_an_update_that_is_rejected_is_no_answer(tmp_path, clock):
    """Of four, three must answer: two and the late one, as the third's update is not usable."""
    overrides = f"{MOST} strategy.rounds=1"
    run = Sites(tmp_path, overrides, clock, slow(("vqa-1", 1, 50.0), ("vqa-0", 1, 30.0)))

    def spoil(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "1":
            if message.metadata.dst_node_id == 1:
                reply.content["result"]["round"] = 7
        return reply

    run.grid.on_reply = spoil
    run.run()
    assert sorted(run.trained(1)) == ["counting-1", "vqa-0", "vqa-1"]
    assert clock.now > 1050


def test_when_no_share_answers_the_time_limit_closes_the_exchange(tmp_path, clock):
    overrides = f"{HALF} strategy.round_timeout_seconds=200"
    run = Sites(tmp_path, overrides, clock, lambda client, number: 1000.0)
    with pytest.raises(BelowMinimum, match="Exchange 1: 0 of 4 .* No reply within 200 s"):
        run.run()
    assert 1200 <= clock.now < 1203


def test_an_exchange_waits_for_busy_clients_that_it_needs(tmp_path, clock):
    """Two are late; the next exchange must have all four to draw from."""
    overrides = f"{HALF} strategy.rounds=1 strategy.min_available_nodes=4"
    delays = slow(("vqa-0", 1, 60.0), ("vqa-1", 1, 90.0))
    run = Sites(tmp_path / "one", overrides, clock, delays).run()
    assert run.asked(2) == CLIENTS and run.trained(2)["vqa-1"] == 2
    assert 1090 <= clock.now < 1095
    delays = slow(("vqa-0", 1, 60.0), ("vqa-1", 1, 900.0))
    run = Sites(tmp_path / "two", overrides, clock, delays)
    with pytest.raises(BelowMinimum, match="min_available_nodes` is 4.\n1 client still at work"):
        run.run()


def test_a_client_is_busy_until_its_time_limit_and_is_then_queried_again(tmp_path, clock):
    overrides = f"{MOST} strategy.rounds=4 strategy.round_timeout_seconds=30"

    def delay(client, number):  # each exchange lasts 9 s
        return 1e9 if (client, number) == ("vqa-1", 1) else 9.0 * (client == "vqa-0")

    run = Sites(tmp_path, overrides, clock, delay).run()
    assert [client for number, client, _ in run.failures()] == ["vqa-1"]
    asked = [number for number in range(1, 6) if "vqa-1" in run.asked(number)]
    assert asked == [1, 4, 5]  # not at 19 and 28 s, but at 37 s


def moves_from_node_4_to_5(folder, clock, *, answers):
    """A site that is busy at node 4 returns at node 5; whether Flower answers for node 4."""
    run = Sites(folder, MOST, clock, slow(("vqa-1", 1, 1e9), ("vqa-0", 2, 9.0)))
    run.grid.node_configs.append(run.grid.node_configs[3])  # the site of node 4
    run.grid.nodes, pull = [1, 2, 3, 4], run.grid.pull_messages

    def leave(ids):
        if clock.now > 1015:
            run.grid.nodes = [1, 2, 3, 5]
            for message_id in [i for i in ids if answers and i in run.grid._waiting]:
                if run.grid._waiting[message_id].metadata.dst_node_id == 4:
                    message = run.grid._waiting.pop(message_id)
                    return [Message(Error(3, "Node Unavailable"), reply_to=message)]
        return pull(ids)

    run.grid.pull_messages = leave
    return run


def test_a_busy_client_may_return_at_another_node(tmp_path, clock):
    """Flower answers for a node that is gone."""
    run = moves_from_node_4_to_5(tmp_path, clock, answers=True).run()
    busy, left = run.warnings()
    assert left[::2] == (2, "failed in exchange 1, which had closed: Node Unavailable")
    assert "vqa-1" not in run.asked(2)
    assert run.trained(3)["vqa-1"] == 1  # it never trained


def test_a_client_that_takes_part_at_another_node_is_not_reported_as_busy(tmp_path, clock):
    """Its old node is gone, and Flower has not answered for it."""
    run = moves_from_node_4_to_5(tmp_path, clock, answers=False).run()
    assert "vqa-1" in run.trained(3) and run.strategy.instructions.late
    assert [warning[::2] for warning in run.warnings()] == [
        (2, "still works on exchange 1, so it is not instructed.")
    ]


def test_the_closing_evaluation_leaves_busy_clients_out(tmp_path, clock):
    overrides = MOST.replace("evaluation.enabled=false", "") + " strategy.rounds=1"
    run = Sites(tmp_path, overrides, clock, slow(("vqa-1", 2, 1e6), ("vqa-0", 3, 50.0))).run()
    scored = [e["client"] for e in run.events("evaluate", round=2)]
    assert sorted(scored) == ["counting-0", "counting-1", "vqa-0"]  # all of three must answer
    assert run.warnings() == [(2, "vqa-1", "still works on exchange 2, so it is not instructed.")]


def test_draws_are_of_the_clients_that_are_not_busy(tmp_path, clock):
    overrides = f"{HALF} strategy.fraction_train=0.5 strategy.sampling=stratified strategy.rounds=5"
    run = Sites(tmp_path, overrides, clock, lambda client, n: 22.0 if client == "vqa-1" else 6.0)
    run.run()
    assert len(run.failures()) >= 2  # drawn, late and busy; then drawn again
    busy = {number for number, client, text in run.warnings() if "not instructed" in text}
    for number in range(1, 7):
        (roster,) = run.events("roster", round=number)
        assert roster["available"] == {"vqa": 2 - (number in busy), "counting": 2}
        assert not (number in busy and "vqa-1" in run.asked(number))
        assert len(run.asked(number)) == 2


def test_an_account_counts_the_upload_that_came_too_late(tmp_path, clock):
    overrides = f"{MOST.replace('evaluation.enabled=false', '')} privacy.enabled=true"
    run = Sites(tmp_path, overrides, clock, slow(("vqa-1", 1, 12.0), ("vqa-0", 2, 9.0))).run()
    releases = {e["round"]: e["releases"] for e in run.events("train") if e["client"] == "vqa-1"}
    assert releases == {3: 2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("fraction=0", "`strategy.close_after.fraction` is 0.0 but must be above 0 and at most 1"),
        ("fraction=1.1", "`strategy.close_after.fraction` is 1.1 but must be above 0 and at most"),
        ("grace_seconds=5", "`strategy.close_after.grace_seconds` is 5, which has no effect with"),
        ("grace_seconds=-1", "`strategy.close_after.grace_seconds` is -1.0 but must be at least 0"),
        (
            "fraction=0.5 strategy.round_timeout_seconds=50",
            "`strategy.close_after.grace_seconds` is 60 but must be below `strategy.round_timeout_",
        ),
    ],
)
def test_settings_without_effect_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(f"strategy.close_after.{overrides}")


def test_a_simulation_refuses_it(tmp_path):
    reason = r"`strategy.close_after.fraction` is 0.5 but must be 1 in a simulation"
    with pytest.raises(ConfigError, match=reason):
        check_settings(["strategy.close_after.fraction=0.5"])
    with pytest.raises(ConfigError, match=reason):  # started by `flwr run`
        Federation(tmp_path, HALF).run()
