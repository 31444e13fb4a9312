"""Replies are handed over one by one, and waiting is bounded."""

import types
import weakref

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.flower import grid as module
from pilot_flwr.flower.grid import PollingGrid, match


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now = 0.0
        self.naps = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


class SlowGrid:
    """Answers message i after `delays[i]` seconds; None means never."""

    def __init__(self, clock, delays):
        self.clock, self.delays, self.pushed = clock, delays, 0

    def push_messages(self, messages):
        first, self.pushed = self.pushed, self.pushed + len(messages)
        return [str(i) for i in range(first, self.pushed)]

    def pull_messages(self, ids):
        return [
            types.SimpleNamespace(metadata=types.SimpleNamespace(reply_to_message_id=i))
            for i in sorted(ids)
            if self.delays[int(i)] is not None and self.delays[int(i)] <= self.clock.now
        ]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(module.time, "sleep", clock.sleep)
    return clock


def test_replies_come_one_by_one_while_others_are_still_out(clock):
    replies = PollingGrid(SlowGrid(clock, [1.0, 500.0])).send_and_receive(["a", "b"])
    assert next(replies).metadata.reply_to_message_id == "0"
    assert clock.now < 1.2
    assert next(replies).metadata.reply_to_message_id == "1"
    assert list(replies) == []


@pytest.mark.parametrize("delay", [0.2, 3.0, 40.0, 3600.0])
def test_waiting_costs_a_few_per_cent_at_most(clock, delay):
    list(PollingGrid(SlowGrid(clock, [delay])).send_and_receive(["a"]))
    assert clock.now - delay <= max(0.05, 0.06 * delay)
    assert max(clock.naps) <= 3.0


def test_the_time_limit_holds(clock):
    replies = list(PollingGrid(SlowGrid(clock, [0.0, None])).send_and_receive("ab", timeout=10))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["0"]
    assert 10 <= clock.now < 11


def test_the_end_may_come_with_the_replies_and_late_ones_are_yielded(clock):
    """Of four messages, two are enough: the loop ends 5 s after the second, at 7 s."""
    grid = SlowGrid(clock, [4.0, 1.0, 2.0, 6.9, 7.1])
    late = dict.fromkeys(grid.push_messages(["an earlier one"]))
    ends, seen = [], []

    def closes():
        return ends[1] + 5 if len(ends) > 1 else float("inf")

    for reply in PollingGrid(grid).send_and_receive("abcd", timeout=99, closes=closes, late=late):
        seen.append(reply.metadata.reply_to_message_id)
        if seen[-1] in late:
            del late[seen[-1]]
        else:
            ends.append({"1": 1.0, "2": 2.0, "3": 6.9}[seen[-1]])
    assert seen == ["1", "2", "0", "3"]
    assert clock.now == pytest.approx(7.0)


def test_messages_that_wait_for_their_turn_are_not_sent_after_the_end(clock):
    grid = SlowGrid(clock, [0.0, None, None, None, None])
    answered = []
    replies = PollingGrid(grid).send_and_receive(
        iter("abcde"), at_once=2, closes=lambda: 3.0 if answered else float("inf")
    )
    answered += replies
    assert len(answered) == 1 and 3.0 <= clock.now < 3.1
    assert grid.pushed == 3


class AilingGrid(SlowGrid):
    """Answers with an error for the first `seconds`."""

    def __init__(self, clock, status, seconds):
        super().__init__(clock, [0.0])
        self.status, self.seconds = status, seconds

    def pull_messages(self, ids):
        self.ail()
        return super().pull_messages(ids)

    def get_node_ids(self):
        self.ail()
        return [1, 2]

    def ail(self):
        if self.clock.now < self.seconds:
            request = httpx.Request("POST", "https://server/v1/runtime/pull-messages")
            httpx.Response(self.status, request=request).raise_for_status()


def test_an_error_of_the_superlink_does_not_end_a_run(clock):
    grid = PollingGrid(AilingGrid(clock, 500, seconds=100))
    (reply,) = grid.send_and_receive(["a"])
    assert reply.metadata.reply_to_message_id == "0" and 100 <= clock.now < 104
    assert list(PollingGrid(AilingGrid(clock, 503, seconds=200)).get_node_ids()) == [1, 2]
    assert 200 <= clock.now < 204


def test_an_error_that_stays_or_is_ours_does(clock):
    for status, least in ((500, module.PATIENCE_SECONDS), (404, 0)):
        before = clock.now
        with pytest.raises(httpx.HTTPStatusError):
            list(PollingGrid(AilingGrid(clock, status, seconds=1e6)).send_and_receive(["a"]))
        assert least <= clock.now - before <= least + 3


def test_no_message_is_no_wait(clock):
    assert list(PollingGrid(SlowGrid(clock, [])).send_and_receive([])) == []
    assert clock.naps == []


@given(st.integers(1, 12), st.integers(1, 5))
def test_messages_are_made_one_by_one_and_no_more_are_out_than_allowed(total, at_once):
    clock = Clock()
    grid = SlowGrid(clock, [None] * total)
    out = set()

    def messages():
        for number in range(total):
            assert len(out) < at_once
            out.add(str(number))
            yield number

    def pull(ids):
        assert set(ids) <= out
        return SlowGrid.pull_messages(grid, ids)

    grid.delays, grid.pull_messages = [0.0] * total, pull
    answered = []
    for reply in PollingGrid(grid).send_and_receive(messages(), at_once=at_once):
        answered.append(reply.metadata.reply_to_message_id)
        out.remove(answered[-1])
    assert sorted(answered, key=int) == [str(number) for number in range(total)]


def test_a_reply_is_released_before_the_next_is_pulled(clock):
    grid, alive = SlowGrid(clock, [0.0] * 9), weakref.WeakSet()

    class Reply(types.SimpleNamespace):
        __hash__ = object.__hash__

    def pull(ids):
        assert len(alive) == 0
        found = [Reply(metadata=r.metadata) for r in SlowGrid.pull_messages(grid, ids)]
        alive.update(found)
        assert len(found) <= PollingGrid.pulled
        return found

    grid.pull_messages = pull
    number = 0
    for reply in PollingGrid(grid).send_and_receive(range(9)):
        number += 1
        del reply
    assert number == 9


def test_replies_are_matched_with_messages_once_and_silence_comes_last():
    def message(**values):
        return types.SimpleNamespace(metadata=types.SimpleNamespace(**values))

    messages = [message(message_id=name).metadata for name in "abc"]
    replies = [message(reply_to_message_id=name) for name in ("c", "older", "c", "a")]
    found = list(match(messages, replies))
    assert found == [(2, replies[0]), (0, replies[3]), (1, None)]
