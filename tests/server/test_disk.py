"""The plan's upper bound of the server's disk, against the bytes on the disk of a run."""

import os

import pytest
from inprocess import SMALL, Federation
from quick_training import quick_training

from pilot_flwr import strategy
from pilot_flwr.model.resource_plan import make_plan

HEADERS = 16384
"""More than the header and the last page of one file of tensors take."""


def tensors_on_disk(folder):
    """Return the size of every file of tensors by inode, those without a name included."""
    sizes = {}
    for path in folder.rglob("*.safetensors"):
        found = path.stat()
        sizes[found.st_ino] = found.st_size
    with open("/proc/self/maps") as maps:
        for line in maps:
            area, _, offset, _, inode, *path = line.split(maxsplit=5)
            if path and path[0].startswith(str(folder)):
                start, end = (int(place, 16) for place in area.split("-"))
                size = int(offset, 16) + end - start
                sizes[int(inode)] = max(sizes.get(int(inode), 0), size)
    return sizes


@pytest.mark.parametrize(
    "overrides",
    ["strategy.server_optimizer.name=adam strategy.update_norm.action=clip", "strategy=fedex_lora"],
)
def test_a_run_takes_at_most_the_planned_disk(overrides, tmp_path, monkeypatch):
    peak, checkpoints = [(0, 0)], tmp_path / "checkpoint"

    def measured(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            sizes = tensors_on_disk(checkpoints)
            peak[0] = max(peak[0], (sum(sizes.values()), len(sizes)))
            return result

        return call

    monkeypatch.setattr(strategy, "spool_tensors", measured(strategy.spool_tensors))
    monkeypatch.setattr(os, "replace", measured(os.replace))
    tasks = "data.tasks=[vqa,counting] data.clients_per_task=2 strategy.rounds=2"
    federation = Federation(tmp_path, f"{SMALL} {tasks} evaluation.enabled=false {overrides}")
    with quick_training():
        federation.run()
    assert federation.folder.checkpoints == checkpoints
    (side,) = make_plan(federation.config).server
    found, files = peak[0]
    assert 0.5 * side.disk_bytes < found <= side.disk_bytes + HEADERS * files
