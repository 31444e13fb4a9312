"""Clients of a smaller LoRA rank than the federation's: the server's state, and whole runs."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import MessageType
from inprocess import SMALL, TWO_TASKS, Federation, assert_same_state, edit, finish, resumed
from llava_files import write_federation
from quick_training import quick_training

from pilot_flwr.algorithm.lora_ranks import rank_of
from pilot_flwr.algorithm.server_state import InitialState, ServerState, draw_lora
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.errors import BelowMinimum, UpdateError
from pilot_flwr.flower.codec import decode_state
from pilot_flwr.flower.messages import decode_update
from pilot_flwr.inference.export import export_lora
from pilot_flwr.inference.runs import client_model, load_model, open_run, select_consensus
from pilot_flwr.protocol import Member, Update
from pilot_flwr.run.checkpoint import load_checkpoint
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import Aggregated, select

RANKS = {"vqa-0": 2, "vqa-1": 8, "counting-0": 8, "counting-1": 3}
SET = "+model.lora.client_ranks={vqa-0:2,counting-1:3}"
LONGER = f"{TWO_TASKS} {SET} strategy.rounds=2 strategy.num_neighbors=1"


def product(state, layer):
    return state[f"{layer}.lora_B"].double() @ state[f"{layer}.lora_A"].double()


def layers(state):
    return [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]


def distance(one, other):
    parts = [float((product(one, n) - product(other, n)).square().sum()) for n in layers(one)]
    return sum(parts) ** 0.5


def closest(matrix, rank):
    u, values, v = np.linalg.svd(matrix.numpy())
    return torch.from_numpy((u[:, :rank] * values[:rank]) @ v[:rank])


# The server's state.

SHAPES = {"q.lora_A": torch.Size((4, 9)), "q.lora_B": torch.Size((7, 4))}


def server():
    return ServerState(("x", "y"), InitialState({}, draw_lora(SHAPES, torch.float32, seed=3)))


def update(client, rank, server_round=1, examples=5):
    generator = torch.Generator().manual_seed(10 * server_round + rank + ord(client[-1]))
    lora = {
        "q.lora_A": torch.randn(rank, 9, generator=generator),
        "q.lora_B": torch.randn(7, rank, generator=generator),
    }
    return Update(client, client[0], server_round, examples, {}, lora)


def strategy(rule, words=""):
    return load_config(f"strategy.lora={rule} {words}").strategy


def test_an_upload_has_the_rank_that_its_client_declared():
    state, member = server(), Member("x-0", "x", 5, 0, lora_rank=2)
    state.check(update("x-0", 2), member, 1)
    for rank, reason in ((3, "is 3 but must be 2, as the client declared"), (5, "from 1 to 4")):
        with pytest.raises(UpdateError, match=f"the rank of its LoRA .*{reason}"):
            state.check(update("x-0", rank), member, 1)
    with pytest.raises(UpdateError, match="is 2 but must be 4, as the client declared"):
        state.check(update("x-0", 2), replace(member, lora_rank=0), 1)
    narrow = update("x-0", 2)
    narrow.lora["q.lora_A"] = narrow.lora["q.lora_A"][:, 1:]
    with pytest.raises(UpdateError, match="its LoRA does not fit: tensor `q.lora_A`"):
        state.check(narrow, member, 1)


def test_a_mean_over_all_is_that_of_the_products_and_reaches_absent_clients_too():
    state, config = server(), strategy("global")
    updates = [update("x-0", 2), update("x-1", 4), update("y-0", 3, examples=10)]
    state.aggregate(updates, config)
    later = [update("x-1", 4, 2), update("y-0", 3, 2, examples=15)]
    done = state.aggregate(later, config)
    mean = 0.25 * product(later[0].lora, "q") + 0.75 * product(later[1].lora, "q")
    for client, rank in (("x-0", 2), ("x-1", 4), ("y-0", 3)):
        assert rank_of(state.loras[client]) == rank
        expected = closest(mean, rank)
        torch.testing.assert_close(
            product(state.loras[client], "q"), expected, rtol=1e-5, atol=1e-5
        )
        error = float((mean - expected).norm() / mean.norm())
        assert done.truncation.get(client, error) == pytest.approx(error)
    assert done.truncation.keys() == {"x-1", "y-0"}


def test_clients_of_one_rank_share_their_task_mean():
    state, config = server(), strategy("task")
    state.aggregate([update("x-0", 2), update("x-1", 4), update("x-2", 2)], config)
    assert state.loras["x-0"] is state.loras["x-2"] is not state.loras["x-1"]


def test_an_exchange_of_equal_ranks_mixes_products_too_once_they_have_differed():
    state, config = server(), strategy("task")
    state.aggregate([update("x-0", 4), update("y-0", 2)], config)
    updates = [update("x-0", 4, 2), update("x-1", 4, 2)]
    state.aggregate(updates, config)
    mean = sum(product(u.lora, "q") for u in updates) / 2
    torch.testing.assert_close(
        product(state.loras["x-0"], "q"), closest(mean, 4), rtol=1e-5, atol=1e-5
    )


def test_a_site_may_change_its_rank():
    state, config = server(), strategy("adaptive")
    state.aggregate([update("x-0", 4), update("x-1", 4)], config)
    before = product(state.loras["x-0"], "q")
    smaller = state.lora_for("x-0", "x", 1)
    torch.testing.assert_close(product(smaller, "q"), closest(before, 1), rtol=1e-5, atol=1e-5)
    assert rank_of(state.lora_for("new", "x", 3)) == 3
    assert rank_of(state.lora_for("x-0", "x")) == 4


@pytest.mark.parametrize("rule", ["adaptive", "task", "global", "exact"])
def test_equal_ranks_take_the_same_path_whoever_sets_them(rule):
    one, other = server(), server()
    updates = [update(client, 4) for client in ("x-0", "x-1", "y-0")]
    for state, rank in ((one, 0), (other, 4)):
        for u in updates:
            state.check(u, Member(u.client, u.task, 5, 0, rank), 1)
        assert state.aggregate(updates, strategy(rule)).truncation == {}
    assert_same_state(one, other)
    mixed = one.loras["x-0"]["q.lora_A"]
    if rule == "global":
        torch.testing.assert_close(mixed, sum(u.lora["q.lora_A"] for u in updates) / 3)


# A simulation.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three exchanges with two clients of smaller ranks, trained in earnest."""
    return finish(tmp_path_factory.mktemp("run"), LONGER)


def test_every_message_has_the_rank_of_its_client(finished):
    assert finished.events("failure") == []
    messages = [m for m in finished.grid.messages if "lora" in m.content.array_records]
    assert len(messages) == 4 * (3 + 3 + 1)  # three exchanges both ways, and the last evaluation
    for message in messages:
        record = message.content.config_records
        client = record.get("instruction", record.get("result"))["client"]
        assert {rank_of({n: t}) for n, t in decode_state(message.content["lora"]).items()} == {
            RANKS[client]
        }
    down = {e["client"]: e["down"]["lora"] for e in finished.events("order", round=3)}
    assert down["vqa-0"] < down["counting-1"] < down["vqa-1"] == down["counting-0"]


def test_the_server_mixes_products_as_the_design_says(finished):
    """Recompute the last exchange from the replies alone, with products that are built."""
    updates = [decode_update(m.content) for m in finished.replies(MessageType.TRAIN)][-4:]
    updates.sort(key=lambda update: update.client)
    (event,) = finished.events("aggregate", round=3)
    for update in updates:
        distances = {
            other.client: distance(update.lora, other.lora)
            for other in updates
            if other is not update
        }
        (nearest,) = [u for u in updates if u.client == min(distances, key=distances.get)]
        total = update.num_examples + nearest.num_examples  # w = 1 with one neighbour
        state, lost, whole = finished.strategy.state.loras[update.client], 0.0, 0.0
        assert rank_of(state) == RANKS[update.client]
        for layer in layers(state):
            mean = update.num_examples / total * product(update.lora, layer)
            mean = mean + nearest.num_examples / total * product(nearest.lora, layer)
            expected = closest(mean, RANKS[update.client])
            torch.testing.assert_close(product(state, layer), expected, rtol=1e-4, atol=1e-6)
            lost += float((mean - expected).square().sum())
            whole += float(mean.square().sum())
        assert event["truncation"][update.client] == pytest.approx((lost / whole) ** 0.5)


def test_the_run_folder_has_every_rank_and_its_models(finished, tmp_path):
    checkpoint = load_checkpoint(finished.folder.path / "checkpoint" / "round-0003")
    assert {client: rank_of(checkpoint.lora(client)) for client in RANKS} == RANKS
    (*_, last) = select(read_events(finished.folder.path), Aggregated)
    assert last.truncation.keys() == RANKS.keys()
    run, cpu = open_run(finished.folder.path), torch.device("cpu")
    for client in RANKS:
        model = client_model(run, client, device=cpu)
        state = finished.strategy.state.loras[client]
        assert all(torch.equal(t, state[name]) for name, t in model.state("lora").items())
        (scale,) = {layer.scaling["default"] for layer in model._lora_layers}
        assert scale == model.config.lora.alpha / model.config.lora.rank  # whatever the rank
    export_lora(model, tmp_path / "lora", base="x")
    exported = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert exported["r"] == RANKS[client]
    assert exported["lora_alpha"] / exported["r"] == pytest.approx(scale)
    consensus = load_model(run, select_consensus(run, "vqa"), device=cpu).state("lora")
    assert rank_of(consensus) == 8
    newcomer = finished.strategy.state.lora_for("new", "vqa")
    assert all(torch.equal(t, newcomer[name]) for name, t in consensus.items())


def test_an_inert_lora_of_any_rank_leaves_the_model_as_it_is(finished):
    """The first exchange starts from the leading part of the LoRA that all others start from."""
    first = {}
    for message in finished.grid.messages:
        if "instruction" in message.content.config_records:
            client = message.content["instruction"]["client"]
            first.setdefault(client, decode_state(message.content["lora"]))
    for name, tensor in first["vqa-1"].items():
        part = first["vqa-0"][name]
        same = tensor[:2] if name.endswith("A") else tensor[:, :2]
        assert torch.equal(part, same) and (name.endswith("A") or not part.any())


@pytest.mark.parametrize(
    "words", ["", "strategy.lora=global", "strategy.lora=task strategy.update_norm.action=clip"]
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(words, tmp_path):
    overrides = f"{TWO_TASKS} {SET} strategy.rounds=2 evaluation.enabled=false {words}"
    with quick_training():
        whole = Federation(tmp_path / "whole", overrides).run()
        again = resumed(tmp_path / "resumed", overrides, exchange=3)
    assert_same_state(again.strategy.state, whole.strategy.state)
    assert whole.events("failure") == []


def test_without_a_smaller_rank_a_run_is_that_of_no_ranks(tmp_path):
    everyone = ",".join(f"{client}:8" for client in RANKS)
    runs = []
    with quick_training():
        for words in ("", f"+model.lora.client_ranks={{{everyone}}}"):
            overrides = f"{TWO_TASKS} evaluation.enabled=false {words}"
            runs.append(Federation(tmp_path / str(len(runs)), overrides).run())
    assert_same_state(runs[0].strategy.state, runs[1].strategy.state)
    assert runs[1].events("aggregate")[0]["truncation"] == {}


@pytest.mark.parametrize(
    "words",
    [
        "privacy.enabled=true",
        "train.proximal_weight=0.1",
        "model.sent_dtype=bfloat16 strategy.stages=1",
        "strategy.fraction_train=0.5 strategy.rounds=4 strategy.lora=global",
        "model.lora.dropout=0.1 model.compile=false model.gradient_checkpointing=true",
    ],
)
def test_a_smaller_rank_works_with(words, tmp_path):
    run = Federation(tmp_path, f"{TWO_TASKS} {SET} evaluation.enabled=false {words}").run()
    assert run.events("failure") == []
    ranks = {client: rank_of(lora) for client, lora in run.strategy.state.loras.items()}
    assert ranks.items() <= RANKS.items() and len(ranks) >= 2


def test_a_client_that_uploads_another_rank_is_rejected(tmp_path):
    overrides = f"{TWO_TASKS} {SET} evaluation.enabled=false strategy.update_norm.action=reject"

    def cheat(message, reply):
        if reply.metadata.message_type == MessageType.TRAIN and "lora" in reply.content:
            if reply.content["result"]["client"] == "vqa-0":
                edit(reply.content, "lora", widen)
        return reply

    def widen(state):
        for name, tensor in state.items():
            state[name] = torch.cat([tensor] * 2, dim=0 if name.endswith("A") else 1)

    federation = Federation(tmp_path, overrides)
    federation.grid.on_reply = cheat
    with quick_training():
        federation.run()
    reasons = {e["client"]: e["reason"] for e in federation.events("failure")}
    assert reasons == {
        "vqa-0": "Rejected: the rank of its LoRA is 4 but must be 2, as the client declared."
    }


def test_a_client_refuses_a_lora_of_another_rank(tmp_path):
    def claim(message, reply):
        if message.metadata.message_type == MessageType.QUERY:
            reply.content["member"]["lora-rank"] = 4
        return reply

    federation = Federation(tmp_path, f"{TWO_TASKS} evaluation.enabled=false")
    federation.grid.on_reply = claim
    with pytest.raises(BelowMinimum, match="sent a LoRA of rank 4 but client '.*' trains rank 8"):
        federation.run()


# Real sites.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_federation(tmp_path_factory.mktemp("data"), train=4, test=2, clients=1).parent


@pytest.fixture
def federation(data, tmp_path):
    """Make a federation of real sites, given as (client, task, more of the node config)."""

    def make(*sites, words=""):
        configs = [
            {
                "client-id": client,
                "task": task,
                "state-folder": str(tmp_path / client),
                "train-file": str(data / task / "train.json"),
                "test-file": str(data / task / "test.json"),
                "image-folder": str(data / task / "images"),
                **more,
            }
            for client, task, more in sites
        ]
        words = f"{SMALL} {words} model.feature_cache.where=off strategy.wait_seconds=0.2".split()
        overrides = shlex.join(expand([f"data={data / 'federation.yaml'}", *words]))
        nodes = {"num_nodes": len(configs), "node_configs": configs}
        return Federation(tmp_path / "run", overrides, **nodes), configs

    return make


def test_a_site_sets_its_rank_in_its_node_config(federation):
    run, _ = federation(
        ("St_Mary", "vqa", {"lora-rank": 3}),
        ("clinic", "counting", {}),
        ("proud", "vqa", {"lora-rank": 9}),
        words="strategy.rounds=1 strategy.clients=2",
    )
    run.run()
    ranks = {client: rank_of(lora) for client, lora in run.strategy.state.loras.items()}
    assert ranks == {"St_Mary": 3, "clinic": 8}
    assert [e["stage"] for e in run.events("train", client="St_Mary")] == [1, 2]
    assert {e["client"] for e in run.events("evaluate", round=2)} == {"St_Mary", "clinic"}
    (reason,) = {e["reason"] for e in run.events("failure") if e["client"].startswith("node")}
    assert reason == "`lora-rank` is 9 but must be at most 8, `model.lora.rank`."


def test_a_site_that_changes_its_rank_takes_part_again(federation):
    run, configs = federation(
        ("St_Mary", "vqa", {}),
        ("clinic", "counting", {}),
        words="strategy.rounds=2 strategy.clients=2 evaluation.enabled=false",
    )

    def change(message, reply):
        if message.metadata.group_id == "1" and "instruction" in message.content:
            configs[0]["lora-rank"] = 2
        return reply

    run.grid.on_reply = change
    with quick_training():
        run.run()
    assert [e["round"] for e in run.events("train", client="St_Mary")] == [1, 3]
    ((number, reason),) = [(e["round"], e["reason"]) for e in run.events("failure")]
    assert number == 2 and "a LoRA of rank 8 but client 'St_Mary' trains rank 2" in reason
    assert rank_of(run.strategy.state.loras["St_Mary"]) == 2
    assert rank_of(run.strategy.state.loras["clinic"]) == 8


def test_the_server_refuses_a_rank_that_the_run_cannot_use(tmp_path):
    def claim(message, reply):
        if message.metadata.message_type == MessageType.QUERY:
            reply.content["member"]["lora-rank"] = {"vqa-0": -1, "vqa-1": 4}.get(
                reply.content["member"]["client"], 0
            )
        return reply

    words = f"{TWO_TASKS} strategy=fedex_lora evaluation.enabled=false"
    federation = Federation(tmp_path, words)
    federation.grid.on_reply = claim
    with quick_training():
        federation.run()
    reasons = " ".join(e["reason"] for e in federation.events("failure"))
    assert "`lora-rank` is -1 but must be at least 1" in reasons
    assert "`strategy.lora` is exact but must be adaptive or task or global" in reasons
    assert set(federation.strategy.state.loras) == {"counting-0", "counting-1"}
