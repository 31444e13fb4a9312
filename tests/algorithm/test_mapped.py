"""Advice about mapped files reaches the system; checked with the kernel's record of the process."""

import ctypes
import mmap
import os
import re
import time
from pathlib import Path

import numpy as np
import torch

from pilot_flwr.algorithm.arrays import centred_gram
from pilot_flwr.algorithm.mapped import prefetch
from pilot_flwr.run.atomic import complete, create_tensors

ELEMENTS = 2**20


def flags(tensor):
    """Return the kernel's flags of the mapping that a tensor lies in."""
    mapping = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(edge, 16) for edge in found.groups())
            mapping = start <= tensor.data_ptr() < end
        elif mapping and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")


def resident(tensor):
    """Return the share of a tensor's pages that are in memory."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages)
    assert not failed
    return np.mean(np.frombuffer(pages, np.uint8) & 1)


def on_disk(path):
    """Write a file and let the system forget its pages, where a disk has them."""
    created = create_tensors(path, {"w": torch.empty(ELEMENTS)}, {})
    created["w"].fill_(0.5)
    complete(created)
    del created
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return torch.from_file(str(path), shared=True, size=path.stat().st_size // 4)[-ELEMENTS:]


def test_a_file_that_is_being_filled_is_read_without_its_surroundings(tmp_path):
    created = create_tensors(tmp_path / "a", {"v": torch.empty(5), "w": torch.empty(ELEMENTS)}, {})
    assert "rr" in flags(created["w"])
    complete(created)
    assert "rr" not in flags(created["w"]) and "rr" not in flags(created["v"][-1:])


def test_prefetched_pages_are_in_memory_before_they_are_read(tmp_path):
    half = slice(0, ELEMENTS // 2)
    mapped = on_disk(tmp_path / "a")
    prefetch([mapped], half)
    deadline = time.monotonic() + 20
    while resident(mapped[half]) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(mapped[half]) == 1
    assert (mapped == 0.5).all()


def test_advice_about_memory_that_is_not_a_file_changes_nothing():
    states = [{"w": torch.full((10_000,), float(k))} for k in range(3)]
    expected = 10_000 * np.outer(range(3), range(3))
    assert np.array_equal(centred_gram(states), expected)
    prefetch([np.zeros(7), torch.zeros(0)], slice(2, 90))
