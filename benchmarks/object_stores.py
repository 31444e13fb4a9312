"""Measure the memory of Flower's object stores, where a SuperLink keeps replies until they are read.

Each store is filled with replies in a process of its own, which has neither a SuperLink's network
nor its other state. A SuperLink without ``--database`` uses the first, one with a file the second.

Run ``python benchmarks/object_stores.py`` (about 2 minutes, 1 GB of disk) to update
``benchmarks/results/object_stores.json``, or ``--quick`` for small replies and write nothing.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, write_record
from flwr.app import RecordDict
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.object_store import ObjectStore
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory

from pilot_flwr.flower.codec import encode_state

RESULT = RESULTS / "object_stores.json"
REPLIES, PARAMETERS = 16, 10_240_000
TENSORS = 64


def resident_bytes() -> int:
    """Return this process's resident memory, after free heap is given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


def put(store: ObjectStore, seed: int, parameters: int) -> tuple[str, int]:
    """Put a reply of `parameters` in bfloat16 into a store; return its id and its bytes."""
    generator = torch.Generator().manual_seed(seed)
    size = parameters // TENSORS
    lora = {str(n): torch.randn(size, generator=generator).bfloat16() for n in range(TENSORS)}
    reply = RecordDict({"lora": encode_state(lora)})
    store.preregister(1, get_object_tree(reply))
    total = 0
    for name, part in get_all_nested_objects(reply).items():
        content = part.deflate()
        total += len(content)
        store.put(name, content)
    return reply.object_id, total


def fill(database: str, replies: int, parameters: int) -> dict[str, Any]:
    """Fill a store, then delete what is in it."""
    store = ObjectStoreFactory(database).store()
    store.delete(put(store, replies, parameters)[0])  # everything is imported and connected
    before = resident_bytes()
    done = [put(store, seed, parameters) for seed in range(replies)]
    full = resident_bytes() - before
    for name, _ in done:
        store.delete(name)
    return {
        "store": type(store).__name__,
        "replies": replies,
        "bytes": sum(size for _, size in done),
        "resident_bytes_when_full": full,
        "resident_bytes_after_deletion": resident_bytes() - before,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, write nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        database, replies, parameters = options.child
        print(json.dumps(fill(database, int(replies), int(parameters))))
        return {}
    replies, parameters = (2, 64_000) if options.quick else (REPLIES, PARAMETERS)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for database in (FLWR_IN_MEMORY_DB_NAME, str(Path(name) / "state.db")):
            command = [sys.executable, __file__, "--child", database, str(replies), str(parameters)]
            done = subprocess.run(  # nosec B603  # this script
                command, check=True, stdout=subprocess.PIPE
            )
            found = json.loads(done.stdout.splitlines()[-1])
            results[found.pop("store")] = found
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(RESULT, results, packages=("pilot-flwr", "flwr", "torch"))
    return results


if __name__ == "__main__":
    main()
