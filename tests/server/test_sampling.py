"""Which clients an exchange draws: sizes, shares of tasks, determinism, and whole runs."""

import math
import re
from collections import Counter

import pytest
import torch
from flwr.app import Error, Message, MessageType
from hypothesis import given
from hypothesis import strategies as st
from inprocess import SMALL, Federation, assert_same_state, resumed
from quick_training import quick_training

from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import ConfigError
from pilot_flwr.flower.grid import clients_at_once
from pilot_flwr.run.checkpoint import latest_checkpoint
from pilot_flwr.run.tables import summary
from pilot_flwr.server.sampling import draw, seats

federations = st.dictionaries(
    st.text("abc", min_size=1, max_size=4), st.sampled_from(["vqa", "ocr", "count"]), min_size=1
)
seeds = {"seed": st.integers(0, 2**63 - 1), "exchange": st.integers(1, 10_000)}


@given(federations, st.data(), st.booleans())
def test_a_draw_depends_only_on_seed_exchange_and_clients(task_of, data, stratified):
    size = data.draw(st.integers(1, len(task_of)))
    chosen = {name: data.draw(values) for name, values in seeds.items()}
    drawn = draw(task_of, size, stratified=stratified, **chosen)
    other = dict(data.draw(st.permutations(list(task_of.items()))))
    assert draw(other, size, stratified=stratified, **chosen) == drawn <= task_of.keys()
    tasks = Counter(task_of.values())
    if not stratified:
        assert len(drawn) == size
        return
    assert len(drawn) == max(size, len(tasks))
    mine = Counter(task_of[client] for client in drawn)
    assert mine.keys() == tasks.keys()
    for task, number in mine.items():  # not more than one above its share, rounded up
        assert number <= max(1, math.ceil(size * tasks[task] / len(task_of)))


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_seats_are_the_shares_where_these_are_whole(available, data):
    factor = data.draw(st.integers(1, 4))
    whole = {task: factor * number for task, number in available.items()}
    assert seats(whole, sum(available.values())) == available


@pytest.mark.parametrize("stratified", [False, True])
def test_all_clients_of_a_task_are_drawn_equally_often(stratified):
    """400 draws of 3 from 12: each client 100 times, standard deviation √(400 · ¼ · ¾) < 9."""
    task_of = {f"c{number}": "ab"[number % 2] for number in range(12)}
    counts = Counter(
        client
        for exchange in range(400)
        for client in draw(task_of, 3, stratified=stratified, seed=7, exchange=exchange)
    )
    assert counts.keys() == task_of.keys()
    assert all(abs(number - 100) < 5 * 9 for number in counts.values())


@given(
    st.integers(1, 500), st.floats(0.001, 1), st.integers(0, 20), st.integers(1, 20), st.booleans()
)
def test_the_number_drawn_is_that_of_flowers_fedavg(available, fraction, nodes, replies, whole):
    fraction = 1.0 if whole else fraction
    config = StrategyConfig(fraction_train=fraction, min_train_nodes=nodes, min_replies=replies)
    flower = max(int(available * fraction), nodes)
    assert config.num_drawn(available, train=True) == min(max(flower, replies), available)
    assert config.min_available >= max(nodes, replies)
    if whole:
        assert config.num_drawn(available, train=True) == available


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("strategy.fraction_train=0", "`strategy.fraction_train` is 0.0 but must be above 0 and"),
        ("strategy.fraction_evaluate=1.5", "is 1.5 but must be above 0 and at most 1"),
        ("strategy.fraction_train=0.1", "draws none of 9 clients: it must be at least 0.111112, o"),
        ("strategy.fraction_evaluate=0.1", "draws none of 9 clients: it must be at least 0.111112"),
        ("strategy.min_train_nodes=10", "`strategy.min_train_nodes` is 10 .* of clients, 9"),
        ("strategy.min_available_nodes=10", "`strategy.min_available_nodes` is 10 .* clients, 9"),
        ("strategy.fraction_train=0.4 strategy.min_replies=4", "an exchange draws 3 of 9 clients"),
        ("strategy.fraction_train=0.25 strategy.sampling=stratified", "needs one for each of 3"),
        ("strategy.sampling=stratified", "no effect without a `strategy.fraction_train`"),
        (
            "strategy=centralised strategy.fraction_train=0.5",
            "must be 1 with .strategy.trained_by=poo",
        ),
        ("strategy=zero_shot strategy.fraction_train=0.5", "must be 1 with .strategy.trained_by=n"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides)


@given(st.integers(1, 5000))
def test_the_least_fraction_that_an_error_names_draws_a_client(clients):
    assert StrategyConfig(fraction_train=math.ceil(1e6 / clients) / 1e6).num_drawn(
        clients, train=True
    ) == max(1, int(clients * math.ceil(1e6 / clients) / 1e6))


HALF = (
    f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=3 strategy.rounds=4 "
    "strategy.fraction_train=0.5 strategy.fraction_evaluate=0.5 strategy.sampling=stratified seed=3"
)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    with quick_training():
        return Federation(tmp_path_factory.mktemp("half"), HALF).run()


def drawn_in(federation, exchange):
    return [e["client"] for (event,) in [federation.events("roster", round=exchange)]
            for e in event["clients"]]  # fmt: skip


def test_an_exchange_instructs_only_the_clients_drawn(half):
    task_of = {f"{task}-{n}": task for task in ("vqa", "counting") for n in range(3)}
    for number in range(1, 6):
        expected = draw(task_of, 3, stratified=True, seed=3, exchange=number)
        assert set(drawn_in(half, number)) == expected
        assert {e["client"] for e in half.events("order", round=number)} == expected
        assert {e["client"] for e in half.events("train", round=number)} == expected
        assert {e["client"] for e in half.events("evaluate", round=number - 1)} == expected
        (roster,) = half.events("roster", round=number)
        assert roster["available"] == {"vqa": 3, "counting": 3}
    closing = draw(task_of, 3, stratified=True, seed=3, exchange=6)
    assert {e["client"] for e in half.events("evaluate", round=5)} == closing
    assert half.events("failure") == []


def test_clients_that_always_fail_do_not_hold_up_the_others(tmp_path):
    """A repeated exchange draws again."""
    patient = "strategy.below_minimum=wait strategy.min_replies=3 strategy.wait_seconds=0.01"

    def act(message, reply):
        training = message.metadata.message_type == MessageType.TRAIN
        if training and message.content["instruction"]["client"] == "vqa-1":
            return Message(Error(0, "out of memory"), reply_to=message)
        return reply

    with quick_training():
        federation = Federation(tmp_path, f"{HALF} {patient}")
        federation.grid.on_reply = act
        federation.run()
    trained = {e["round"]: e["client"] for e in federation.events("train")}
    assert len(trained) == 5 and "vqa-1" not in trained.values()
    assert federation.events("repeat")


def test_the_first_participation_is_stage_1_and_all_others_stage_2(half):
    seen = set()
    for event in half.events("train"):
        assert event["stage"] == (2 if event["client"] in seen else 1)
        seen.add(event["client"])
    firsts = {e["round"] for e in half.events("train", stage=1)}
    assert max(firsts) > 1  # else this test shows nothing


def test_a_client_that_is_not_drawn_keeps_its_lora_and_a_task_its_adapter(tmp_path):
    """Uniform draws of one of two clients: one task is missing in every exchange."""
    overrides = (
        f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=1 strategy.rounds=3 "
        "strategy.fraction_train=0.5 evaluation.enabled=false"
    )
    with quick_training():
        federation = Federation(tmp_path, overrides).run()
    before = None
    for number in range(1, 5):
        (client,) = drawn_in(federation, number)
        replies = [r for r in federation.replies("train") if r.metadata.group_id == str(number)]
        assert len(replies) == 1
        folder = tmp_path / "checkpoint" / f"round-{number:04d}"
        if not folder.is_dir():
            continue
        found = latest_checkpoint(tmp_path / "checkpoint", fits=lambda c, n=number: ""
                                  if c.server_round == n else "another")[0]  # fmt: skip
        if before is not None:
            other = {"vqa-0": "counting", "counting-0": "vqa"}[client]
            same = found.adapter(other), before.adapter(other)
            assert all(torch.equal(t, same[1][name]) for name, t in same[0].items())
            if f"{other}-0" in before.task_of:
                same = found.lora(f"{other}-0"), before.lora(f"{other}-0")
                assert all(torch.equal(t, same[1][name]) for name, t in same[0].items())
        before = found


def test_the_summary_says_how_many_clients_its_scores_cover(half):
    text = summary(half.folder.events, ("vqa", "counting"))
    assert "Scores cover the clients drawn" in text
    rows = [line.split("|")[4:6] for line in text.splitlines() if " of 3)" in line]
    for zero_shot_and_first in zip(*rows, strict=True):  # of each task's three, three in all
        scored = re.findall(r"\((\d) of 3\)", " ".join(zero_shot_and_first))
        assert sum(map(int, scored)) == 3


def test_a_resumed_run_draws_the_same_and_ends_the_same(half, tmp_path):
    with quick_training():
        second = resumed(tmp_path, HALF, exchange=4)
    assert_same_state(second.strategy.state, half.strategy.state)


def test_a_simulation_has_no_more_messages_out_than_its_clients_can_use(tmp_path):
    """Of 12 clients, and contents are released: the grid alone could keep them."""
    overrides = (
        f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=6 strategy.rounds=1 "
        "evaluation.enabled=false"
    )
    federation = Federation(tmp_path, overrides)
    grid, most = federation.grid, Counter()
    push = grid.push_messages

    def count(messages):
        ids = push(list(messages))
        kinds = Counter(m.metadata.message_type for m in grid._waiting.values())
        for kind, number in kinds.items():
            most[kind] = max(most[kind], number)
        return ids

    grid.push_messages = count
    with quick_training():
        federation.run()
    assert most["train"] == clients_at_once(grid, federation.config.simulation) < 12
    assert len(federation.events("train", round=2)) == 12
