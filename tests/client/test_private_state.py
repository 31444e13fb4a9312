"""A client's own states: one file per exchange, each whole, none of them another's."""

import hashlib
import os
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file

from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.errors import StateError
from pilot_flwr.run.atomic import load_tensors, save_tensors

STATE = PrivateState(
    2,
    ("vqa", "ocr"),
    {
        "client_adapter": {"linear_1.weight": torch.randn(2, 3)},
        "cross_task_adapters": {"ocr/linear_1.weight": torch.randn(2, 3).bfloat16()},
        "router": {"weight": torch.randn(2, 3)},
    },
    moments={
        "lora/layers.0.q_proj.lora_A/exp_avg": torch.randn(2, 3),
        "router/weight/step": torch.tensor(7.0),
    },
)

OWNER = {"client": "vqa-0", "task": "vqa"}


def test_private_state_round_trip(tmp_path):
    store = PrivateStore(tmp_path / "new" / "folder", "vqa-0", "vqa")
    assert store.load() is None
    assert store.stage() == 0
    store.save(STATE, server_round=4)
    loaded = store.load()
    assert (loaded.stage, loaded.tasks, store.stage()) == (2, ("vqa", "ocr"), 2)
    for group, tensors in STATE.groups.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, loaded.groups[group][name])
            assert tensor.dtype == loaded.groups[group][name].dtype
    assert loaded.groups.keys() == STATE.groups.keys() and loaded.personal == {}
    assert loaded.moments.keys() == STATE.moments.keys()
    assert all(torch.equal(t, loaded.moments[name]) for name, t in STATE.moments.items())


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_torn_file_is_refused(tmp_path, size):
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    store.save(STATE, server_round=4)
    whole = store.path(4).read_bytes()
    store.path(4).write_bytes(whole[:size])
    with pytest.raises(StateError, match="cannot be read"):
        store.load()
    with pytest.raises(StateError, match="cannot be read"):
        store.stage()


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    save_file({"a": torch.zeros(1)}, store.path(4))
    with pytest.raises(StateError, match="has format None"):
        store.load()
    save_tensors(store.path(4), {"nonsense": torch.zeros(1)}, OWNER | {"stage": "1", "tasks": "[]"})
    with pytest.raises(StateError, match="is not a private state"):
        store.load()
    for metadata in ({}, {"stage": "one", "tasks": "[]"}, {"stage": "1", "tasks": "["}):
        save_tensors(store.path(4), {}, metadata | OWNER)
        with pytest.raises(StateError, match="is not a private state"):
            store.stage()


def test_another_clients_state_is_refused(tmp_path):
    """Its tensors would fit: only the file can say whose it is."""
    PrivateStore(tmp_path, "vqa-0", "vqa").save(STATE, server_round=4)
    for client, task, words in [
        ("vqa-1", "vqa", "belongs to client 'vqa-0', not to 'vqa-1'"),
        ("vqa-0", "ocr", "belongs to task 'vqa', not to 'ocr'"),
    ]:
        for read in (PrivateStore.load, PrivateStore.stage):
            with pytest.raises(StateError, match=words):
                read(PrivateStore(tmp_path, client, task))


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    store.save(STATE, server_round=4)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(PrivateState(1), server_round=5)
    monkeypatch.undo()
    assert store.load().stage == 2
    assert [path.name for path in tmp_path.iterdir()] == ["private-0004.safetensors"]


def test_tensors_that_are_views_are_saved_by_value(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "t.safetensors", {"t": base.T}, {})
    assert torch.equal(load_tensors(tmp_path / "t.safetensors")[0]["t"], base.T)


def test_a_file_has_the_tensors_and_checksum_that_others_compute(tmp_path):
    tensors = {
        "wide": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
        "half": torch.arange(5).bfloat16(),
        "codes": torch.arange(7, dtype=torch.uint8),
        "number": torch.tensor(3),
        "column": torch.arange(8).view(4, 2)[1:2, 1],  # contiguous, of stride 2
        "last": torch.arange(9.0)[8:],
        "none": torch.empty(0, 4),
    }
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors, {"client": "a"}, checksum=True)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in tensors.items())
    checksum = load_tensors(path)[1]["checksum"]
    zeroed = path.read_bytes().replace(checksum.encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == checksum


def test_a_write_needs_no_copy_of_the_tensors(tmp_path):
    tensors = {"w": torch.ones(2**21)}
    tracemalloc.start()  # torch's own memory is not counted, Python's bytes are
    save_tensors(tmp_path / "x.safetensors", tensors, {}, checksum=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def of(number):
    """A state that can be told from others."""
    return PrivateState(1, (), {"client_adapter": {"w": torch.full((2,), float(number))}})


def loaded(store, before=None):
    return store.load(before=before).groups["client_adapter"]["w"].tolist()


def test_an_exchange_starts_from_the_newest_state_before_it(tmp_path):
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    for number in (1, 2, 4):
        store.save(of(number), server_round=number)
    assert loaded(store) == [4, 4]
    assert [loaded(store, before) for before in (2, 3, 4, 5, 9)] == [
        [1, 1], [2, 2], [2, 2], [4, 4], [4, 4]
    ]  # fmt: skip
    assert store.load(before=1) is None and store.stage(before=1) == 0
    assert store.stage(before=2) == 1


def test_the_last_three_are_kept(tmp_path):
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    for number in range(1, 12):
        store.save(of(number), server_round=number)
    assert store.rounds() == [9, 10, 11]


def test_a_repeated_exchange_replaces_its_state_and_removes_later_ones(tmp_path):
    """A later one is of an attempt that the run has gone back behind."""
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    for number in (1, 2, 3):
        store.save(of(number), server_round=number)
    store.save(of(22), server_round=2)
    assert store.rounds() == [1, 2]
    assert loaded(store, before=4) == [22, 22]


@pytest.mark.parametrize("by", [0x01, 0x20, 0x2A, 0xFF])
def test_a_changed_byte_anywhere_is_refused(tmp_path, by):
    """Blanks of the header and names of its keys as well; nothing but `StateError` is raised."""
    store = PrivateStore(tmp_path, "vqa-0", "vqa")
    store.save(STATE, server_round=4)
    whole = store.path(4).read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= by
        store.path(4).write_bytes(bytes(changed))
        for read in (store.load, store.stage):
            with pytest.raises(StateError):
                read()
    store.path(4).write_bytes(whole)
    assert store.load().stage == 2


def test_a_state_of_an_earlier_version_is_read(tmp_path):
    store = PrivateStore(tmp_path, "vqa-0", "vqa", flower_run="1")
    tensors = {"client_adapter/w": torch.full((2,), 3.0)}
    save_tensors(store.path(3), tensors, OWNER | {"stage": "1", "tasks": "[]"})
    assert loaded(store) == [3, 3] and store.check_exchange(2) == 3
    with pytest.raises(StateError, match="asked to train exchange 1, but"):
        store.check_exchange(1)


def test_an_old_exchange_number_erases_nothing(tmp_path):
    """Within a run of Flower the latest exchange may be repeated, in another one also its last."""

    def store(run):
        return PrivateStore(tmp_path, "vqa-0", "vqa", flower_run=run)

    for number in (1, 2, 3, 4):
        store("1").save(of(number), server_round=number)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for run, number in [("1", 3), ("1", 2), ("1", 1), ("2", 2), ("2", 1)]:
        with pytest.raises(StateError, match=f"asked to train exchange {number}, but"):
            store(run).save(of(9), server_round=number)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    store("1").save(of(44), server_round=4)  # `strategy.below_minimum=wait`
    assert loaded(store("1")) == [44, 44]
    store("2").save(of(33), server_round=3)  # resumed from the checkpoint before the last
    assert loaded(store("2")) == [33, 33] and loaded(store("2"), before=3) == [2, 2]
    # One more run of Flower does not go back further than the first could.
    with pytest.raises(StateError, match="has trained exchange 4 and 3 is the first"):
        store("3").save(of(9), server_round=2)
    for number in (3, 4, 5):
        store("3").save(of(number), server_round=number)


@pytest.mark.parametrize("repeated", [False, True])
def test_whatever_dies_in_a_save_the_state_before_the_exchange_is_there(
    tmp_path, monkeypatch, repeated
):
    """Raise at the first, second, ... call that changes a name on the disk, until none is left."""
    for number in range(100):
        store = PrivateStore(tmp_path / str(number), "vqa-0", "vqa")
        for earlier in (1, 2, 3, 4) if repeated else (1, 2):
            store.save(of(earlier), server_round=earlier)
        calls = iter(range(number))
        with monkeypatch.context() as patch:
            for owner, name in [(os, "replace"), (os, "fsync"), (os, "unlink")]:
                patch.setattr(owner, name, _until(calls, getattr(owner, name)))
            try:
                store.save(of(33), server_round=3)
                done = True
            except KeyboardInterrupt:
                done = False
        assert loaded(store, before=3) == [2, 2]
        assert all(loaded(store, before=r + 1) for r in store.rounds())  # none is torn
        if done:
            break
    assert number > 2
    assert loaded(store) == [33, 33]


def _until(calls, function):
    def call(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call
