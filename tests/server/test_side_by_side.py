"""What two turns, two runs or two sites could do to one another, and what a site can say."""

import threading

import pytest
import torch
from flwr.app import Error, Message, MessageType
from inprocess import SMALL, Federation, InProcessGrid, edit
from quick_training import quick_training

from pilot_flwr import server_app
from pilot_flwr.client import session
from pilot_flwr.client.node import Site
from pilot_flwr.client.privacy_accountant import PrivacyAccount
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.client_app import app
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PrivacyConfig
from pilot_flwr.data.federation import Client
from pilot_flwr.errors import ConfigError, RunError, StateError
from pilot_flwr.flower.codec import decode_state
from pilot_flwr.flower.messages import OWN_ERROR
from pilot_flwr.formatting import LONGEST_REASON
from pilot_flwr.protocol import Instruction
from pilot_flwr.run.atomic import hold

NAMES = ["vqa-0", "vqa-1", "vqa-2"]
OPEN = (
    f"{SMALL} data.tasks=[vqa] strategy.rounds=1 strategy.clients=3 strategy.wait_seconds=0.5 "
    "evaluation.enabled=false"
)


@pytest.fixture(autouse=True)
def quickly():
    with quick_training():
        yield


def sites(folder, *, names=NAMES, shared=False, **more):
    return [
        {
            "client-id": name,
            "task": "vqa",
            "state-folder": str(folder / "states" / ("" if shared else name[:20])),
            **more,
        }
        for name in names
    ]


def open_run(tmp_path, words=OPEN, **options):
    nodes = options.pop("nodes", None) or sites(tmp_path)
    federation = Federation(tmp_path / "run", words, num_nodes=len(nodes), node_configs=nodes)
    federation.grid.on_reply = options.pop("on_reply", lambda message, reply: reply)
    return federation.run()


def test_releases_of_two_runs_at_once_are_all_counted(tmp_path):
    config = PrivacyConfig(enabled=True, noise_multiplier=8.0)
    path = tmp_path / "vqa-0.privacy.json"

    def release(run):
        for number in range(8):
            PrivacyAccount(path, "vqa-0").spend(config, run=run, server_round=number)

    threads = [threading.Thread(target=release, args=(run,)) for run in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [(entry["run"], entry["round"]) for entry in PrivacyAccount(path, "vqa-0").releases()]
    assert sorted(made) == [(run, n) for run in ("one", "two") for n in range(8)]


def test_nobody_counts_between_the_check_and_the_release(tmp_path):
    """Two releases are allowed; four threads ask for one each, all of them at the same moment."""
    config = PrivacyConfig(enabled=True, noise_multiplier=8.0)
    account = PrivacyAccount(tmp_path / "vqa-0.privacy.json", "vqa-0")
    together, refused = threading.Barrier(4), []

    def check():
        if len(account.releases()) >= 2:
            raise ConfigError("no more")

    def release(run):
        together.wait()
        try:
            account.spend(config, run=run, server_round=1, check=check)
        except ConfigError:
            refused.append(run)

    threads = [threading.Thread(target=release, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(account.releases()), len(refused)) == (2, 2)


def test_a_session_waits_for_the_one_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "PATIENCE_SECONDS", 0.1)
    site = Site(Client("vqa-0", "vqa", 0), tmp_path, "cpu")
    order = Instruction(server_round=1, stage=1, tasks=("vqa",), adapters={}, lora={})
    with hold(tmp_path / session.SESSION_LOCK, "the other session"):
        with pytest.raises(RunError, match=r"state folder of client 'vqa-0' is in use"):
            session.run_session(site, load_config(SMALL), order, progress=print)
    assert PrivateStore(tmp_path, "vqa-0", "vqa").rounds() == []


def test_a_client_never_removes_anothers_states(tmp_path):
    state = PrivateState(1, (), {"client_adapter": {"w": torch.ones(2)}})
    PrivateStore(tmp_path, "vqa-0", "vqa").save(state, server_round=5)
    with pytest.raises(StateError, match=r"states of client 'vqa-0'.*no two clients may share"):
        PrivateStore(tmp_path, "vqa-1", "vqa").save(state, server_round=1)
    kept = PrivateStore(tmp_path, "vqa-0", "vqa").load()
    assert torch.equal(kept.groups["client_adapter"]["w"], torch.ones(2))


def test_sites_with_one_state_folder_do_not_destroy_each_others_adapters(tmp_path):
    run = open_run(tmp_path, nodes=sites(tmp_path, shared=True))
    assert {e["client"] for e in run.events("train", round=1)} == {"vqa-0"}
    assert {e["client"] for e in run.events("train", round=2)} == {"vqa-0"}
    reasons = [e["reason"] for e in run.events("failure", round=1, phase="train")]
    assert len(reasons) == 2
    assert all("no two clients may share a `state-folder`" in reason for reason in reasons)
    asked = [e["reason"] for e in run.events("failure", round=2, phase="roster")]
    assert sum("belongs to client 'vqa-0', not to" in reason for reason in asked) == 2


def test_a_name_too_long_for_a_file_is_refused(tmp_path):
    run = open_run(tmp_path, nodes=sites(tmp_path, names=["vqa-0", "vqa-1", "x" * 300]))
    assert {e["client"] for e in run.events("train", round=2)} == {"vqa-0", "vqa-1"}
    (reason,) = {e["reason"] for e in run.events("failure") if e["client"] == "node 3"}
    assert "300 characters, but must have at most 64" in reason


def test_a_private_run_at_its_end_is_resumed_for_its_evaluation(tmp_path):
    """Both uploads are spent, and a third is not allowed: the evaluation needs none."""
    words = (
        f"{SMALL} data.tasks=[vqa] strategy.rounds=1 strategy.clients=3 strategy.wait_seconds=3 "
        f"privacy.enabled=true privacy.noise_multiplier=6 privacy.send_metrics=true "
        f"run.folder={tmp_path / 'run'}"
    )
    nodes = sites(tmp_path, **{"max-epsilon": 2.2, "allow-metrics": True})

    def run(words, on_reply):
        grid = InProcessGrid(app, num_nodes=3, overrides=words, node_configs=nodes)
        grid.on_reply = on_reply
        server_app.run(grid, load_config(words), words, flower_run="1")
        return grid

    def stop(message, reply):
        if message.metadata.message_type == MessageType.EVALUATE:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run(words, stop)
    resumed = f"{words} resume={tmp_path / 'run'}"
    grid = run(resumed, lambda message, reply: reply)
    answers = [m for m in grid.messages if m.metadata.reply_to_message_id]
    assert [m.metadata.message_type for m in answers if m.has_error()] == []
    assert sum(m.metadata.message_type == MessageType.EVALUATE for m in answers) == 3


def test_what_a_site_says_of_an_error_is_one_bounded_printable_line(tmp_path):
    forged = "no\n2026-01-01 INFO \x1b[2J\x1b]0;title\x07 Verdict: all well " + "A" * 2_000_000

    def answer(message, reply):
        if message.metadata.message_type != MessageType.TRAIN:
            return reply
        if message.metadata.dst_node_id == 2:
            return Message(Error(OWN_ERROR, forged), reply_to=message)
        if message.metadata.dst_node_id == 3:
            edit(reply.content, "lora", lambda lora: lora.update({"n" * 1_000_000: torch.zeros(1)}))
        return reply

    run = open_run(tmp_path, on_reply=answer)
    reasons = [e["reason"] for e in run.events("failure", phase="train")]
    assert len(reasons) == 4  # two clients, two exchanges
    for reason in reasons:
        assert reason.isprintable()
        assert len(reason) < LONGEST_REASON + 10
    assert reasons[0].startswith("no 2026-01-01 INFO Verdict: all well AAA")
    assert (run.folder.path / "metrics.jsonl").stat().st_size < 100_000


def move_away(state, start):
    for name, before in start.items():
        state[name] = before + 1000 * (state[name] - before)


def test_the_rest_of_several_rejected_updates_is_as_without_them(tmp_path):
    """One is too long in its LoRA, the other in its adapter: the rest are as if both were gone."""
    words = (
        f"{SMALL} data.tasks=[vqa] data.clients_per_task=5 strategy.rounds=1 "
        "strategy.update_norm.action=reject evaluation.enabled=false"
    )
    hostile = {"vqa-1": "task-adapter.vqa", "vqa-3": "lora"}

    def longer(message, reply):
        part = (
            hostile.get(message.content["instruction"]["client"])
            if "instruction" in message.content
            else ""
        )
        if part and not reply.has_error():
            start = decode_state(message.content[part])
            edit(reply.content, part, lambda state: move_away(state, start))
        return reply

    def absent(message, reply):
        gone = (
            "instruction" in message.content and message.content["instruction"]["client"] in hostile
        )
        return Message(Error(0, "gone"), reply_to=message) if gone else reply

    states = []
    for number, on_reply in enumerate((longer, absent)):
        federation = Federation(tmp_path / str(number), words)
        federation.grid.on_reply = on_reply
        states.append(federation.run().strategy.state)
        lost = {e["client"] for e in federation.events("failure", phase="train")}
        assert lost == set(hostile)
    for left, right in ((s.adapters["vqa"], o.adapters["vqa"]) for s, o in [states]):
        assert all(torch.equal(left[name], right[name]) for name in right)
    for client in ("vqa-0", "vqa-2", "vqa-4"):
        left, right = (state.loras[client] for state in states)
        assert all(torch.equal(left[name], right[name]) for name in right)
