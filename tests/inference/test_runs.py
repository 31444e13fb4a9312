"""A run folder, opened: the models in it are those that the run had."""

import shutil
from pathlib import Path

import pytest
import torch
from perturbed import perturb, private_state

from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.errors import ConfigError, RunError, StateError
from pilot_flwr.inference.runs import (
    client_model,
    last_scores,
    load_model,
    open_run,
    select_client,
    select_consensus,
)
from pilot_flwr.run.checkpoint import save_checkpoint

CPU = torch.device("cpu")


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished.folder.path, tmp_path / "run"))


def test_a_client_model_is_put_together_from_the_servers_state_and_its_own(finished):
    run = open_run(finished.folder.path)
    assert run.checkpoint.server_round == 2 and run.notes == ()
    server = finished.strategy.state
    for client in ("vqa-1", "counting-0"):
        model = client_model(run, client, device=CPU)
        own, private = server.task_of[client], finished.private(client)
        assert model.stage == 2 and not model.training
        assert_same(model.state("lora"), server.loras[client])
        assert_same(model.state("own_task_adapter"), server.adapters[own])
        for task, state in server.adapters.items():
            if task != own:
                foreign = {f"{task}/{name}": tensor for name, tensor in state.items()}
                assert_same(model.state("foreign_task_adapters"), foreign)
        for group, state in private.groups.items():
            assert_same(model.state(group), state)


def test_a_new_site_gets_the_consensus_model_of_its_task(finished):
    run = open_run(finished.folder.path)
    model = load_model(run, select_consensus(run, "vqa"), device=CPU)
    server = finished.strategy.state
    assert model.stage == 1
    assert_same(model.state("own_task_adapter"), server.adapters["vqa"])
    for name, tensor in model.state("lora").items():
        mean = (server.loras["vqa-0"][name] + server.loras["vqa-1"][name]) / 2
        torch.testing.assert_close(tensor, mean, rtol=1e-6, atol=1e-8)
    assert_same(model.state("lora"), server.lora_for("a new site", "vqa"))
    inert = model.connector.client_adapter(torch.randn(2, 3, 64))
    assert torch.equal(inert, torch.zeros_like(inert))


def test_a_client_that_never_trained_gets_it_too(copy):
    shutil.rmtree(copy / "clients" / "vqa-0")
    whole = open_run(copy).checkpoint
    task_of = {client: task for client, task in whole.task_of.items() if client != "vqa-0"}
    save_checkpoint(
        copy / "checkpoint",
        server_round=3,
        adapters={task: whole.adapter(task) for task in whole.tasks},
        loras={client: whole.lora(client) for client in task_of},
        tasks=whole.tasks,
        task_of=task_of,
        run=whole.run,
        events=whole.events,
    )
    run = open_run(copy)
    assert "vqa-0" not in run.checkpoint.task_of
    who = select_client(run, "vqa-0")
    assert who.private is None
    model = load_model(run, who, device=CPU)
    assert_same(model.state("lora"), run.checkpoint.lora("vqa-1"))


def test_a_private_state_from_elsewhere(finished, make_model, tmp_path):
    run = open_run(finished.folder.path)
    stage1 = private_state(perturb(make_model("counting")))
    PrivateStore(tmp_path, "counting-1", "counting").save(stage1, server_round=1)
    model = client_model(run, "counting-1", device=CPU, state=tmp_path)
    assert model.stage == 1
    assert_same(model.state("client_adapter"), stage1.groups["client_adapter"])
    with pytest.raises(
        StateError, match=r"no private state of exchange 2 or before.*`--state`.*`--task`"
    ):
        select_client(run, "counting-1", state=tmp_path / "other")


def test_a_client_whose_own_part_is_missing_is_not_replaced_in_silence(copy):
    shutil.rmtree(copy / "clients")
    with pytest.raises(StateError, match="'vqa-0' has trained"):
        select_client(open_run(copy), "vqa-0")


def test_a_private_state_for_other_tasks_is_refused(finished, tmp_path):
    other = finished.private("vqa-0")
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    store.save(PrivateState(2, ("vqa", "captioning"), other.groups), server_round=2)
    with pytest.raises(StateError, match="captioning"):
        client_model(open_run(finished.folder.path), "vqa-0", device=CPU, state=tmp_path)


def test_another_clients_private_state_is_refused(finished):
    run = open_run(finished.folder.path)
    with pytest.raises(StateError, match="to client 'vqa-1', not to 'vqa-0'"):
        select_client(run, "vqa-0", state=finished.folder.path / "clients" / "vqa-1")


def test_a_torn_checkpoint_is_passed_over_aloud(copy):
    file = copy / "checkpoint" / "round-0002" / "lora" / "vqa-0.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    run = open_run(copy)
    assert run.checkpoint.server_round == 1
    assert "vqa-0.safetensors" in run.notes[0] and "round-0001" in run.notes[1]
    with pytest.raises(StateError, match=r"vqa-0\.safetensors"):
        open_run(copy, server_round=2)


def test_an_earlier_round_can_be_asked_for(finished):
    run = open_run(finished.folder.path, server_round=1)
    assert run.checkpoint.server_round == 1
    assert run.notes == ()
    first = select_client(run, "vqa-0").private
    assert (first.stage, select_client(open_run(finished.folder.path), "vqa-0").private.stage) == (
        1,
        2,
    )
    with pytest.raises(StateError, match="`--round` is 7 but the run has checkpoints of 1, 2"):
        open_run(finished.folder.path, server_round=7)


def test_settings_can_be_different_now(finished):
    path = finished.folder.path
    run = open_run(path, overrides=["evaluation.batch_size=3", "train.max_length=99"])
    assert (run.config.evaluation.batch_size, run.config.train.max_length) == (3, 99)
    with pytest.raises(ConfigError, match=r"evaluation\.batch_size"):
        open_run(path, overrides=["evaluation.batch_size=0"])


def test_last_scores_are_those_of_the_closing_evaluation(finished):
    scores = {event.client: event.score for event in last_scores(open_run(finished.folder.path))}
    assert list(scores) == ["vqa-0", "vqa-1", "counting-0", "counting-1"]
    for client, score in scores.items():
        assert score == finished.events("evaluate", round=2, client=client)[-1]["score"]


@pytest.mark.parametrize(
    "content, error, words",
    [
        (None, RunError, "not a run folder"),
        ("", ConfigError, "is empty"),
        ("hello", ConfigError, "not a run's configuration"),
        ("seed: [", ConfigError, "not a run's configuration"),
        ("data: {tasks: [vqa]}", StateError, "but the run's"),
    ],
)
def test_a_foreign_folder_is_refused(copy, content, error, words):
    config = copy / "config.yaml"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(error, match=words):
        open_run(copy)


def test_a_run_without_a_checkpoint_is_refused(copy):
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(StateError, match="no intact checkpoint"):
        open_run(copy)


def test_names_are_checked(finished):
    run = open_run(finished.folder.path)
    with pytest.raises(ConfigError, match="'vqa-7' but must be one of vqa-0.*`--task`"):
        select_client(run, "vqa-7")
    with pytest.raises(ConfigError, match="'ocr' but must be one of vqa, counting"):
        select_consensus(run, "ocr")


def test_nothing_is_written_into_the_run_folder(finished):
    def stamps():
        return {p: p.stat().st_mtime_ns for p in finished.folder.path.rglob("*")}

    before = stamps()
    client_model(open_run(finished.folder.path), "vqa-0", device=CPU)
    assert stamps() == before
