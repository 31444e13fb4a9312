import json
import os

import pytest
import torch

from pilot_flwr.checkpoint import (
    PrivateState,
    PrivateStore,
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


def test_private_state_round_trip(tmp_path):
    store = PrivateStore(tmp_path / "new" / "folder")
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
    store = PrivateStore(tmp_path)
    store.save(STATE)
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:size])
    with pytest.raises(StateError, match="cannot be read"):
        store.load()
    with pytest.raises(StateError, match="cannot be read"):
        store.stage()


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    store = PrivateStore(tmp_path)
    save_file({"a": torch.zeros(1)}, store.path)
    with pytest.raises(StateError, match="has format None"):
        store.load()
    save_tensors(store.path, {"nonsense": torch.zeros(1)}, {"stage": "1", "tasks": "[]"})
    with pytest.raises(StateError, match="is not a private state"):
        store.load()
    for metadata in ({}, {"stage": "one", "tasks": "[]"}, {"stage": "1", "tasks": "["}):
        save_tensors(store.path, {}, metadata)
        with pytest.raises(StateError, match="is not a private state"):
            store.stage()


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    store = PrivateStore(tmp_path)
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
