"""Differential privacy in whole runs: what leaves a client, and what it has counted before."""

import json
import logging
import math

import pytest
import torch
from flwr.app import Message, MessageType
from inprocess import SMALL, Federation, InProcessGrid
from quick_training import quick_training

from pilot_flwr import client_app
from pilot_flwr.client import session as session_module
from pilot_flwr.client.privacy import change_norm
from pilot_flwr.client.privacy_accountant import PrivacyAccount, PrivacyDemands, epsilon
from pilot_flwr.errors import RunError, UpdateError
from pilot_flwr.flower import messages
from pilot_flwr.protocol import RunInfo
from pilot_flwr.run.events import parse_event
from pilot_flwr.run.progress import Progress

TWO = f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=1 strategy.rounds=1"
# Almost no noise, so that what was clipped can be seen.
CLIPPED = f"{TWO} privacy.enabled=true privacy.clip_norm=0.01 privacy.noise_multiplier=1e-6"
NOISY = f"{TWO} privacy.enabled=true privacy.clip_norm=0.25 privacy.noise_multiplier=4"


@pytest.fixture(scope="module", autouse=True)
def untrained():
    """Training takes no time here: its result is random, but the same in every run."""
    with quick_training():
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Federation(tmp_path_factory.mktemp("plain"), TWO).run()


@pytest.fixture(scope="module")
def clipped(tmp_path_factory):
    return Federation(tmp_path_factory.mktemp("clipped"), CLIPPED).run()


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return Federation(tmp_path_factory.mktemp("noisy"), NOISY).run()


def exchanges(federation, client):
    """What was sent to a client and what came back, exchange by exchange."""
    orders = {
        m.metadata.message_id: messages.decode_instruction(m.content)[0] for m in trains(federation)
    }
    for reply in federation.replies(MessageType.TRAIN):
        update = messages.decode_update(reply.content)
        if update.client == client:
            order = orders[reply.metadata.reply_to_message_id]
            sent = {"lora": order.lora, "adapter": order.adapters[update.task]}
            yield sent, {"lora": update.lora, "adapter": update.adapter}


def trains(federation):
    return [
        m
        for m in federation.grid.messages
        if m.metadata.message_type == MessageType.TRAIN and not m.metadata.reply_to_message_id
    ]


def change(sent, got):
    return torch.cat(
        [(got[g][n].double() - sent[g][n].double()).flatten() for g in sent for n in sent[g]]
    )


def test_the_upload_is_the_clipped_change_on_top_of_what_was_sent(plain, clipped):
    """In the first exchange both runs train the same: only the length of the change differs."""
    for client in ("vqa-0", "counting-0"):
        (sent, trained), (base, released) = (
            next(exchanges(run, client)) for run in (plain, clipped)
        )
        assert change_norm(sent, base) == 0
        whole = change(sent, trained)
        assert whole.norm() > 0.1
        expected = 0.01 * whole / whole.norm()
        got = change(sent, released)
        # float32 rounds what was sent plus a small change, number by number.
        assert (got - expected).norm() < 0.02 * 0.01
        assert got.norm() == pytest.approx(0.01, rel=0.01)
    for client in ("vqa-0", "counting-0"):
        for sent, released in exchanges(clipped, client):
            assert change(sent, released).norm() < 0.0101


def test_the_noise_has_the_size_that_is_accounted_for(noisy):
    """What is not noise has norm 0.25 at most, which is nothing beside it."""
    found = [
        change(*pair) for client in ("vqa-0", "counting-0") for pair in exchanges(noisy, client)
    ]
    assert len(found) == 4
    for one in found:
        assert one.std() == pytest.approx(4 * 0.25, rel=0.02)
    assert abs(torch.corrcoef(torch.stack(found)) - torch.eye(4)).max() < 0.02


def test_neither_losses_nor_scores_leave_a_client(noisy):
    received = noisy.replies(MessageType.TRAIN)
    assert len(received) == 4 and not noisy.replies(MessageType.EVALUATE)
    for reply in received:
        assert "evaluation" not in reply.content
        assert not [name for name in reply.content["training"] if name.startswith("loss")]
    assert {e["loss"] for e in noisy.events("train")} == {None}
    assert noisy.events("evaluate") == []
    text = (noisy.folder.path / "summary.md").read_text()
    assert text.startswith("No evaluation: a private run without `privacy.send_metrics`")


def test_a_client_withholds_metrics_even_if_it_is_ordered_to_evaluate(tmp_path):
    """The order comes from a server that is not trusted; so does `evaluation.enabled`."""
    federation = Federation(tmp_path, f"{NOISY} data.tasks=[vqa]")
    grid = federation.grid

    def order_to_evaluate(message, reply):
        return reply

    grid.on_reply = order_to_evaluate
    push = grid.push_messages

    def forge(messages):
        messages = list(messages)
        for message in messages:
            if "instruction" in message.content:
                message.content["instruction"]["evaluate"] = True
        return push(messages)

    grid.push_messages = forge
    federation.run()
    assert trains(federation)[0].content["instruction"]["evaluate"] is True
    assert all("evaluation" not in r.content for r in federation.replies(MessageType.TRAIN))


def test_metrics_leave_if_that_is_asked_for(tmp_path):
    run = Federation(tmp_path, f"{NOISY} data.tasks=[vqa] privacy.send_metrics=true").run()
    assert all(math.isfinite(e["loss"]) for e in run.events("train"))
    assert len(run.events("evaluate")) == 3


def test_the_account_is_reported_for_every_client_and_exchange(noisy):
    for number in (1, 2):
        events = noisy.events("train", round=number)
        assert [e["client"] for e in events] == ["counting-0", "vqa-0"]
        for event in events:
            assert event["epsilon"] == epsilon([4.0] * number, 1e-5)
            assert (event["delta"], event["releases"]) == (1e-5, number)
            (line,) = Progress().lines(parse_event(json.dumps(event)))[-1:]
            assert f"ε {event['epsilon']:.4g} at δ 1e-05, loss withheld" in line
    for row in (1, 2):
        assert (
            f"ε <= {epsilon([4.0] * row, 1e-5):.4g} at δ 1e-05"
            in (noisy.folder.path / "timeline.md").read_text()
        )
    kept = PrivacyAccount(noisy.folder.path / "clients" / "vqa-0.privacy.json", "vqa-0").releases()
    assert [(e["run"], e["round"]) for e in kept] == [("test-1", 1), ("test-1", 2)]


def test_private_parameters_stay_exact(plain, clipped):
    """ψ_s is trained in stage 1 and never leaves: neither clipping nor noise touches it."""
    for client in ("vqa-0", "counting-0"):
        one, other = (run.private(client).groups["client_adapter"] for run in (plain, clipped))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_upload_is_counted_before_it_is_made(tmp_path, monkeypatch):
    account = tmp_path / "clients" / "vqa-0.privacy.json"
    seen = []

    def fail(*_, **__):
        seen.append(json.loads(account.read_text())["releases"])
        raise RuntimeError("killed")

    monkeypatch.setattr(session_module, "release", fail)
    with pytest.raises(RunError, match="killed"):
        Federation(tmp_path, f"{NOISY} data.tasks=[vqa]").run()
    assert len(seen) == 1 and len(seen[0]) == 1


def test_what_cannot_be_counted_is_not_uploaded(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrivacyAccount, "spend", full)
    run = Federation(tmp_path, f"{NOISY} data.tasks=[vqa]")
    with pytest.raises(RunError, match="No space left"):
        run.run()
    assert run.replies(MessageType.TRAIN) == []


@pytest.fixture
def site_log(caplog):
    """The log of the site, which alone has the reasons in a private run."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def ask(overrides, node_config):
    grid = InProcessGrid(
        client_app.app, num_nodes=1, overrides=overrides, node_configs=[node_config]
    )
    query = Message(
        messages.encode_query(RunInfo("run-1", "/nowhere", "guessed"), 1), 1, MessageType.QUERY
    )
    (reply,) = grid.send_and_receive([query])
    return reply


@pytest.mark.parametrize(
    ("demand", "overrides", "reason"),
    [
        ({"min-noise-multiplier": 1.0}, TWO, "`privacy.enabled` of the run is false but this site"),
        (
            {"max-clip-norm": 1, "max-epsilon": 8},
            TWO,
            "`privacy.enabled` of the run is false",
        ),
        ({"max-epsilon": 8}, TWO, "`privacy.enabled` of the run is false"),
        (
            {"min-noise-multiplier": 4.5},
            NOISY,
            "`privacy.noise_multiplier` of the run is 4 but this site demands at least 4.5",
        ),
        (
            {"max-clip-norm": 0.1, "min-noise-multiplier": 1},
            NOISY,
            "`privacy.clip_norm` of the run is 0.25 but this site",
        ),
        (
            {"max-clip-norm": 0.25},
            NOISY,
            "`max-clip-norm` is 0.25 but bounds no ε without `min-noise-multiplier` or `max-eps",
        ),
        (
            {"min-noise-multiplier": 1.0},
            f"{NOISY} privacy.send_metrics=true",
            "`privacy.send_metrics` of the run is true but this site does not send",
        ),
        (
            {"max-epsilon": 1},
            NOISY,
            "to ε = 2.166 at δ = 1e-05, over all its runs, but its `max-epsilon` is 1",
        ),
        (
            {"max-epsilon": 2.5, "privacy-delta": 1e-9},
            NOISY,
            "at δ = 1e-09, over all its runs, but its `max-epsilon` is 2.5",
        ),
    ],
)
def test_a_site_refuses_a_run_that_asks_for_less(demand, overrides, reason, tmp_path, site_log):
    site = {"client-id": "vqa-0", "state-folder": str(tmp_path / "state")}
    reply = ask(overrides, site | demand)
    assert reply.has_error() and reason in site_log.text
    told = messages.PRIVATE_ERROR if "privacy.enabled=true" in overrides else reason
    assert told in reply.error.reason


@pytest.mark.parametrize(
    ("demand", "overrides"),
    [
        ({"min-noise-multiplier": 4.0, "max-clip-norm": 0.25, "max-epsilon": 2.2}, NOISY),
        ({"max-epsilon": 9, "allow-metrics": True}, f"{NOISY} privacy.send_metrics=true"),
        ({"privacy-delta": 1e-6}, TWO),
    ],
)
def test_a_site_takes_part_in_what_it_demands(demand, overrides, tmp_path):
    site = {"client-id": "vqa-0", "state-folder": str(tmp_path / "state")}
    assert not ask(overrides, site | demand).has_error()


def test_a_spent_budget_ends_a_sites_part_over_runs(tmp_path, site_log):
    """2.2 is enough for one upload at z = 4, whatever the run is called."""
    node = {"client-id": "vqa-0", "state-folder": str(tmp_path / "s"), "max-epsilon": 2.2}
    other = {"client-id": "counting-0", "state-folder": str(tmp_path / "other")}
    run = Federation(tmp_path / "run", NOISY, node_configs=[node, other]).run()
    assert [e["client"] for e in run.events("train", round=1)] == ["counting-0", "vqa-0"]
    assert [e["client"] for e in run.events("train", round=2)] == ["counting-0"]
    reasons = [e["reason"] for e in run.events("failure", round=2)]
    assert messages.PRIVATE_ERROR in reasons
    assert "its `max-epsilon` is 2.2: it takes no further part" in site_log.text
    site_log.clear()
    assert ask(NOISY, node).error.reason == messages.PRIVATE_ERROR
    assert "its `max-epsilon` is 2.2" in site_log.text


def test_a_budget_that_is_spent_behind_the_roster_ends_at_the_order(tmp_path, site_log):
    """The site takes part in another run as well, whose upload comes between query and order."""
    folder, spent = tmp_path / "s", []
    node = {"client-id": "vqa-0", "state-folder": str(folder), "max-epsilon": 2.2}
    other = {"client-id": "counting-0", "state-folder": str(tmp_path / "other")}
    run = Federation(tmp_path / "run", NOISY, node_configs=[node, other])

    def spend(message, reply):
        query = message.metadata.message_type == MessageType.QUERY
        if query and message.metadata.dst_node_id == 1 and not spent:
            assert not reply.has_error()  # the roster took it
            account = PrivacyAccount(folder / "vqa-0.privacy.json", "vqa-0")
            spent.append(account.spend(run.config.privacy, run="another", server_round=1))
        return reply

    run.grid.on_reply = spend
    run.run()
    assert [e["client"] for e in run.events("train", round=1)] == ["counting-0"]
    (failure,) = run.events("failure", round=1)
    assert (failure["phase"], failure["client"]) == ("train", "vqa-0")
    assert failure["reason"] == messages.PRIVATE_ERROR
    assert "its `max-epsilon` is 2.2: it takes no further part" in site_log.text
    kept = PrivacyAccount(folder / "vqa-0.privacy.json", "vqa-0").releases()
    assert [entry["run"] for entry in kept] == ["another"]


@pytest.mark.parametrize("key", ["min-noise-multiplier", "max-clip-norm", "max-epsilon"])
@pytest.mark.parametrize("value", ["much", True, -1.0, 0, math.nan, math.inf])
def test_odd_demands_are_told(key, value, tmp_path):
    site = {"client-id": "vqa-0", "state-folder": str(tmp_path / "state"), key: value}
    assert f"`{key}` is " in ask(TWO, site).error.reason


def test_no_demand_is_the_default():
    assert not PrivacyDemands().any


def test_losses_may_be_missing_from_a_private_reply_only(noisy, plain):
    content = noisy.replies(MessageType.TRAIN)[0].content
    assert messages.decode_result(content).training.losses == {}
    bare = {k: v for k, v in content.items() if k != "privacy"}
    with pytest.raises(UpdateError, match=r"`loss\.total` is None"):
        messages.decode_result(type(content)(bare))
    some = dict(content["training"]) | {"loss.ce": 1.0}
    half = type(content)({**content, "training": type(content["training"])(some)})
    with pytest.raises(UpdateError, match="metric `loss"):
        messages.decode_result(half)
    assert messages.decode_result(plain.replies(MessageType.TRAIN)[0].content).spent is None


@pytest.mark.parametrize(("name", "value"), [("epsilon", -1.0), ("delta", 2.0), ("releases", 0)])
def test_odd_accounts_from_a_client_are_refused(noisy, name, value):
    content = noisy.replies(MessageType.TRAIN)[0].content
    account = dict(content["privacy"]) | {name: value}
    odd = type(content)({**content, "privacy": type(content["privacy"])(account)})
    with pytest.raises(UpdateError, match=f"metric `{name}` is "):
        messages.decode_result(odd)
