import json
import os
import shutil

import pytest
import torch

from pilot_flwr.checkpoint import (
    PrivateState,
    PrivateStore,
    latest_checkpoint,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
)
from pilot_flwr.errors import StateError

STATE = PrivateState(
    2,
    ("vqa", "ocr"),
    {
        "client_adapter": {"linear_1.weight": torch.randn(2, 3)},
        "cross_task_adapters": {"ocr/linear_1.weight": torch.randn(2, 3).bfloat16()},
        "router": {"weight": torch.randn(2, 3)},
    },
)

OWNER = {"client": "vqa-0", "task": "vqa"}


def test_private_state_round_trip(tmp_path):
    store = PrivateStore(tmp_path / "new" / "folder", "vqa-0", "vqa")
    assert store.load() is None
    assert store.stage() == 0
    store.save(STATE)
    loaded = store.load()
    assert (loaded.stage, loaded.tasks, store.stage()) == (2, ("vqa", "ocr"), 2)
    for group, tensors in STATE.groups.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, loaded.groups[group][name])
            assert tensor.dtype == loaded.groups[group][name].dtype


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_torn_file_is_refused(tmp_path, size):
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    store.save(STATE)
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:size])
    with pytest.raises(StateError, match="cannot be read"):
        store.load()
    with pytest.raises(StateError, match="cannot be read"):
        store.stage()


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    save_file({"a": torch.zeros(1)}, store.path)
    with pytest.raises(StateError, match="has format None"):
        store.load()
    save_tensors(store.path, {"nonsense": torch.zeros(1)}, OWNER | {"stage": "1", "tasks": "[]"})
    with pytest.raises(StateError, match="is not a private state"):
        store.load()
    for metadata in ({}, {"stage": "one", "tasks": "[]"}, {"stage": "1", "tasks": "["}):
        save_tensors(store.path, {}, metadata | OWNER)
        with pytest.raises(StateError, match="is not a private state"):
            store.stage()


def test_another_clients_state_is_refused(tmp_path):
    """Its tensors would fit: only the file can say whose it is."""
    PrivateStore(tmp_path, "vqa-0", "vqa").save(STATE)
    for client, task, words in [
        ("vqa-1", "vqa", "is of client 'vqa-0' but must be of 'vqa-1'"),
        ("vqa-0", "ocr", "is of task 'vqa' but must be of 'ocr'"),
    ]:
        for read in (PrivateStore.load, PrivateStore.stage):
            with pytest.raises(StateError, match=words):
                read(PrivateStore(tmp_path, client, task))


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    store.save(STATE)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(PrivateState(1))
    monkeypatch.undo()
    assert store.load().stage == 2
    assert [path.name for path in tmp_path.iterdir()] == ["private.safetensors"]


def test_tensors_that_are_views_are_saved_by_value(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "t.safetensors", {"t": base.T}, {})
    assert torch.equal(load_tensors(tmp_path / "t.safetensors")[0]["t"], base.T)


def test_checkpoints_are_whole_and_the_last_two_are_kept(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(
            tmp_path,
            server_round=number,
            adapters={"vqa": {"w": torch.full((2,), float(number))}},
            loras={"vqa-0": {"a": torch.zeros(1)}},
            info={"tasks": ["vqa"]},
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0002", "round-0003"]
    tensors, metadata = load_tensors(tmp_path / "round-0003/task_adapters/vqa.safetensors")
    assert tensors["w"].tolist() == [3.0, 3.0]
    assert metadata["task"] == "vqa"
    state = json.loads((tmp_path / "round-0003/state.json").read_text())
    assert (state["round"], state["tasks"]) == (3, ["vqa"])


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of two checkpoints, and the last one of them."""
    for number in (1, 2):
        last = save_checkpoint(
            tmp_path,
            server_round=number,
            adapters={"a": {"w": torch.full((2,), float(number))}, "b": {"w": torch.zeros(2)}},
            loras={"a-0": {"l": torch.full((3,), float(number))}},
            info={"tasks": ["a", "b"], "task_of": {"a-0": "a"}},
        )
    return last


def test_a_checkpoint_is_read_back(checkpoint):
    loaded = load_checkpoint(checkpoint)
    assert (loaded.server_round, loaded.tasks, loaded.task_of) == (2, ("a", "b"), {"a-0": "a"})
    assert loaded.adapter("a")["w"].tolist() == [2, 2]
    assert loaded.lora("a-0")["l"].tolist() == [2, 2, 2]
    assert latest_checkpoint(checkpoint.parent) == (loaded, [])


def _cut(folder):
    file = folder / "lora" / "a-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _swap(folder):
    shutil.copy(folder / "task_adapters/a.safetensors", folder / "task_adapters/b.safetensors")


def _edit(old, new):
    def edit(folder):
        text = (folder / "state.json").read_text()
        assert old in text
        (folder / "state.json").write_text(text.replace(old, new))

    return edit


@pytest.mark.parametrize(
    "damage, words",
    [
        (_cut, "cannot be read"),
        (_swap, "is of task 'a' but must be of 'b'"),
        (lambda f: (f / "state.json").unlink(), "FileNotFoundError"),
        (lambda f: (f / "state.json").write_text("[]"), "TypeError"),
        (lambda f: (f / "lora" / "a-0.safetensors").unlink(), r"has files for \[\]"),
        (lambda f: (f / "lora" / "x.safetensors").write_bytes(b""), r"\['a-0', 'x'\]"),
        (_edit("pilot-flwr-1", "pilot-flwr-0"), "format 'pilot-flwr-0'"),
        (_edit('"a-0": "a"', '"a-0": "c"'), r"tasks \['c'\]"),
        (_edit('"tasks"', '"task"'), "KeyError: 'tasks'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_passed_over(checkpoint, damage, words):
    damage(checkpoint)
    with pytest.raises(StateError, match=words):
        load_checkpoint(checkpoint)
    found, passed_over = latest_checkpoint(checkpoint.parent)
    assert found.server_round == 1
    assert len(passed_over) == 1


def test_without_a_whole_checkpoint_there_is_an_error(tmp_path):
    with pytest.raises(StateError, match="no whole checkpoint"):
        latest_checkpoint(tmp_path)
