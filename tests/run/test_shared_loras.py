"""LoRAs on disk: shared files, links to the previous checkpoint, mapped tensors, uploads."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from pilot_flwr.errors import StateError
from pilot_flwr.run import checkpoint as checkpoint_module
from pilot_flwr.run.atomic import TensorFile, create_tensors, save_tensors, spool_tensors
from pilot_flwr.run.checkpoint import create_lora, load_checkpoint, save_checkpoint
from pilot_flwr.run.provenance import RunIdentity
from pilot_flwr.server.resume import _loras


def lora(value):
    return {"a": torch.full((3, 4), float(value)), "b": torch.full((5,), float(value)).bfloat16()}


LAYOUT = {"a": torch.empty(3, 4).bfloat16(), "b": torch.empty(5).bfloat16()}


def save(folder, number, loras):
    return save_checkpoint(
        folder,
        server_round=number,
        adapters={"vqa": {"w": torch.ones(2)}},
        loras=loras,
        tasks=("vqa",),
        task_of=dict.fromkeys(loras, "vqa"),
        run=RunIdentity("demo-1", "x"),
        events=number,
    )


def values(folder, number):
    """Return every client's value in a checkpoint, after all of its checks."""
    found = load_checkpoint(folder / f"round-{number:04d}")
    return {client: float(found.lora(client)["a"][0, 0]) for client in found.task_of}


def files(folder, number):
    return {p.stem: p.stat().st_ino for p in (folder / f"round-{number:04d}/lora").iterdir()}


def restored(folder, number):
    checkpoint = load_checkpoint(folder / f"round-{number:04d}")
    return _loras(checkpoint, lora(0))


def test_a_lora_that_clients_share_is_one_file(tmp_path):
    shared = lora(1)
    save(tmp_path, 1, {"c": shared, "b": shared, "a": lora(2)})
    assert files(tmp_path, 1).keys() == {"a", "b"}
    assert values(tmp_path, 1) == {"a": 2, "b": 1, "c": 1}
    again = restored(tmp_path, 1)
    assert again["b"] is again["c"] and again["a"] is not again["b"]


def test_what_has_not_changed_is_linked_and_outlives_the_older_checkpoint(tmp_path):
    save(tmp_path, 1, {"a": lora(1), "b": lora(2)})
    state = restored(tmp_path, 1)
    for number in (2, 3, 4):
        state["b"] = lora(10 * number)
        save(tmp_path, number, state)
        assert values(tmp_path, number) == {"a": 1, "b": 10 * number}
    assert files(tmp_path, 3)["a"] == files(tmp_path, 4)["a"]
    assert files(tmp_path, 3)["b"] != files(tmp_path, 4)["b"]
    assert not (tmp_path / "round-0002").exists()
    assert float(state["a"]["a"].sum()) == 12


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    save(tmp_path, 1, {"a": lora(1)})

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint_module.os, "link", refuse)
    save(tmp_path, 2, restored(tmp_path, 1))
    assert files(tmp_path, 1)["a"] != files(tmp_path, 2)["a"]
    assert values(tmp_path, 2) == {"a": 1}


def test_no_two_files_get_one_name(tmp_path):
    """`b` shares the file `a`; then `a` gets its own, and afterwards another client joins."""
    shared = lora(1)
    save(tmp_path, 1, {"a": shared, "b": shared})
    state = restored(tmp_path, 1)
    state["a"] = lora(2)
    save(tmp_path, 2, state)
    assert values(tmp_path, 2) == {"a": 2, "b": 1}
    state = restored(tmp_path, 2)
    state["0"] = state["b"]
    save(tmp_path, 3, state)
    assert values(tmp_path, 3) == {"a": 2, "b": 1, "0": 1}
    assert files(tmp_path, 3)["b"] == files(tmp_path, 2)["b"]


def test_a_byte_that_changes_on_the_disk_gets_no_new_checksum(tmp_path):
    save(tmp_path, 1, {"a": lora(1)})
    state = restored(tmp_path, 1)
    with (tmp_path / "round-0001/lora/a.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    save(tmp_path, 2, state)
    with pytest.raises(StateError, match=r"round-0002/lora/a.safetensors has been changed"):
        load_checkpoint(tmp_path / "round-0002")


def test_a_checkpoint_with_a_file_for_every_client_is_read(tmp_path):
    """As earlier versions wrote it: without `lora_of`."""
    save(tmp_path, 1, {"a": lora(1), "b": lora(2)})
    path = tmp_path / "round-0001/state.json"
    content = json.loads(path.read_text())
    del content["lora_of"]
    content["checksum"] = checkpoint_module._checksum(content)
    path.write_text(json.dumps(content))
    assert values(tmp_path, 1) == {"a": 1, "b": 2}


@pytest.mark.parametrize("change", [{"a": "b", "b": "b"}, {"a": "a"}, {"a": 1, "b": "b"}, 3])
def test_an_assignment_of_files_that_does_not_fit_is_refused(tmp_path, change):
    save(tmp_path, 1, {"a": lora(1), "b": lora(2)})
    path = tmp_path / "round-0001/state.json"
    content = json.loads(path.read_text()) | {"lora_of": change}
    content["checksum"] = checkpoint_module._checksum(content)
    path.write_text(json.dumps(content))
    with pytest.raises(StateError):
        load_checkpoint(tmp_path / "round-0001")


def test_a_mapped_file_is_one_that_safetensors_reads(tmp_path):
    """With tensors of no elements and a scalar."""
    layout = {**LAYOUT, "empty": torch.empty(0, 3).bfloat16(), "one": torch.tensor(1.0).bfloat16()}
    created = create_tensors(tmp_path / "x.safetensors", layout, {"client": "a"})
    assert [*created] == [*layout]
    for number, tensor in enumerate(created.values()):
        tensor.fill_(number)
    found = load_file(tmp_path / "x.safetensors")
    for name, tensor in created.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_lora_created_in_the_next_checkpoint_is_not_written_again(tmp_path):
    created = create_lora(tmp_path, 1, "b", LAYOUT)
    for tensor in created.values():
        tensor.fill_(7)
    inode = created.path.stat().st_ino
    assert not list(tmp_path.glob("round-*"))
    save(tmp_path, 1, {"a": created, "b": created})
    assert files(tmp_path, 1) == {"b": inode} and values(tmp_path, 1) == {"a": 7, "b": 7}
    assert created.path == tmp_path / "round-0001/lora/b.safetensors"
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_an_error_before_a_page_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pilot_flwr.run.atomic.os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x.safetensors'"):
        create_tensors(tmp_path / "x.safetensors", LAYOUT, {})


def test_spooled_tensors_leave_no_name(tmp_path):
    state = {"z": torch.randn(3, 4), "a": torch.randn(2).bfloat16()}
    mapped = spool_tensors(state, tmp_path / "new")
    assert [*mapped] == ["z", "a"] and not list((tmp_path / "new").iterdir())
    assert all(torch.equal(mapped[name], tensor) for name, tensor in state.items())
    assert spool_tensors({}, tmp_path / "none") == {} and not (tmp_path / "none").exists()


def test_what_a_killed_writer_left_is_removed(tmp_path):
    save_tensors(tmp_path / ".spooled.123.tmp", lora(1), {})
    create_lora(tmp_path, 7, "gone", LAYOUT)
    save(tmp_path, 1, {"a": lora(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0001"]


def test_restored_loras_are_mapped_files(tmp_path):
    save(tmp_path, 1, {"a": lora(1)})
    (state,) = restored(tmp_path, 1).values()
    assert isinstance(state, TensorFile)
    assert state.path == tmp_path / "round-0001/lora/a.safetensors" and len(state.sha256) == 64


def test_a_mapped_file_keeps_no_descriptor(tmp_path):
    """A thousand clients have more files than a process may open."""
    before = len(os.listdir("/dev/fd"))
    mapped = [create_lora(tmp_path, 1, f"c{number}", LAYOUT) for number in range(20)]
    mapped += [spool_tensors(lora(number), tmp_path) for number in range(20)]
    assert len(mapped) == 40 and len(os.listdir("/dev/fd")) == before
