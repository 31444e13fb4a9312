"""The folder of cached features that runs share: its bound, its users, its faults."""

import errno
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pilot_flwr.model import feature_folder as module
from pilot_flwr.model.feature_folder import FeatureFolder

FEATURES = torch.arange(3000.0).reshape(1, 30, 100)
SIZE = 13_000  # of an entry, and some more


@pytest.fixture
def told():
    return []


@pytest.fixture
def make(tmp_path, told):
    def make(entries=1000, since=None):
        since = time.time_ns() if since is None else since
        return FeatureFolder(tmp_path, limit=entries * SIZE, since=since, progress=told.append)

    return make


def names(folder, candidates):
    return {name for name in candidates if folder._path(name).exists()}


def age(folder, name, seconds):
    when = time.time() - seconds
    os.utime(folder._path(name), (when, when))


def total(folder):
    return sum(path.stat().st_size for path in folder.folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_run_finds_an_entry(make, dtype):
    make().put({"a": FEATURES.to(dtype)})
    found = make().get("a")
    assert found.dtype == dtype and torch.equal(found, FEATURES.to(dtype))
    assert make().get("b") is None


def test_the_oldest_entries_make_room_and_a_use_makes_an_entry_young(make, told):
    first = make(4)
    first.put(dict.fromkeys("abcd", FEATURES))
    for seconds, name in enumerate("abcd"):
        age(first, name, 100 - seconds)
    first.get("a")
    second = make(4)
    second.put({"e": FEATURES})
    assert names(second, "abcde") == set("acde")
    second.put({"f": FEATURES, "g": FEATURES})
    assert names(second, "abcdefg") == set("aefg")
    assert total(second) <= second.limit and told == []


def test_nothing_that_this_run_used_is_removed(make, told):
    """Stored entries are kept, the others are encoded on each use, and one warning is printed."""
    folder = make(3, since=time.time_ns() - 10**9)
    for name in "abcde":
        folder.put({name: FEATURES})
    assert names(folder, "abcde") == set("abc")
    assert len(told) == 1 and "the entries of this run alone take" in told[0]
    assert torch.equal(folder.get("a"), FEATURES)


def test_a_lower_bound_holds_from_the_start(make):
    folder = make(10)
    folder.put(dict.fromkeys("abcdefgh", FEATURES))
    for name in "abcdefgh":
        age(folder, name, 100)
    assert total(make(3)) <= 3 * SIZE


def test_a_killed_writers_leftovers_are_removed_and_the_size_is_measured(
    make, tmp_path, monkeypatch
):
    make(4).put({"a": FEATURES})
    replaced = []

    def replace_once(*paths):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(paths)
        os.rename(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_once)
        make(4).put({"b": FEATURES, "c": FEATURES})
    (tmp_path / ".x.safetensors.123.tmp").write_bytes(b"0" * 5000)
    folder = make(4)
    assert names(folder, "abc") == set("ab")
    assert int((tmp_path / ".bytes").read_text()) == total(folder)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("wrong", ["", "x", "99999999"])
def test_a_size_that_is_unreadable_or_above_the_limit_is_measured(make, tmp_path, wrong):
    make(3).put({"a": FEATURES})
    (tmp_path / ".bytes").write_text(wrong)
    folder = make(3)
    assert int((tmp_path / ".bytes").read_text()) == total(folder) > 0


def test_opening_a_folder_does_not_list_its_entries(make, monkeypatch):
    make().put({"a": FEATURES})

    def unexpected(*_):
        raise AssertionError("The folder was listed.")

    monkeypatch.setattr(Path, "glob", unexpected)
    monkeypatch.setattr(os, "scandir", unexpected)
    assert torch.equal(make().get("a"), FEATURES)


@pytest.mark.parametrize("damage", ["empty", "other", "cut", "bit"])
def test_a_damaged_entry_is_absent_and_written_again(make, damage):
    folder = make()
    folder.put({"a": FEATURES})
    path = folder._path("a")
    whole = path.read_bytes()
    changed = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    damaged = {"empty": b"", "other": b"x" * 100, "cut": whole[:-50], "bit": changed}
    path.write_bytes(damaged[damage])
    assert folder.get("a") is None
    folder.put({"a": FEATURES})
    assert torch.equal(folder.get("a"), FEATURES)


def write_and_read(folder, first, limit):
    kept = FeatureFolder(Path(folder), limit=limit, since=time.time_ns(), progress=print)
    for number in range(first, first + 30):
        kept.put({str(number): torch.full((1, 30, 100), float(number))})
        for other in range(40):
            found = kept.get(str(other))
            assert found is None or bool((found == other).all())


@pytest.mark.parametrize("writer", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_two_writers_share_a_folder_and_its_bound(tmp_path, writer):
    """Their entries overlap; neither sees a torn one, and the sum keeps to the bound."""
    limit = 25 * SIZE
    spawn = multiprocessing.get_context("spawn")
    pool = ThreadPoolExecutor(2) if writer == "threads" else ProcessPoolExecutor(2, spawn)
    with pool:
        done = [pool.submit(write_and_read, str(tmp_path), first, limit) for first in (0, 10)]
        assert [future.result(timeout=120) for future in done] == [None, None]
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert 20 * SIZE < int((tmp_path / ".bytes").read_text()) == sum(sizes) <= limit


def test_a_folder_that_cannot_be_made_is_reported_and_left_alone(tmp_path, told):
    (tmp_path / "file").write_text("")
    folder = FeatureFolder(tmp_path / "file" / "x", limit=SIZE, since=0, progress=told.append)
    folder.put({"a": FEATURES})
    assert folder.get("a") is None
    assert len(told) == 1 and f"cached in {tmp_path}/file/x: Not a directory" in told[0]


def test_a_full_disk_is_reported_and_leaves_nothing_torn(make, tmp_path, told, monkeypatch):
    folder = make()
    folder.put({"a": FEATURES})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        folder.put({"b": FEATURES})
    assert len(told) == 1 and "No space left on device" in told[0]
    folder.put({"c": FEATURES})
    assert names(folder, "abc") == {"a"} and not list(tmp_path.glob(".*.tmp"))
    assert torch.equal(folder.get("a"), FEATURES)


def test_room_for_private_states_is_left_on_the_disk(make, told, monkeypatch):
    monkeypatch.setattr(module, "RESERVE", 2**60)
    folder = make()
    folder.put({"a": FEATURES, "b": FEATURES})
    assert names(folder, "ab") == set() and len(told) == 1 and "less than" in told[0]
