"""A client's files, and the rows of them that belong to it.

A simulated client's files are named in the run's configuration (`data.folder`, `data.files`), and a
task's rows are partitioned among its clients. A real site's files are named in its own node
configuration alone, and all their rows belong to it.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pilot_flwr.config.data import DataConfig, PartitionConfig
from pilot_flwr.config.rules import expanded
from pilot_flwr.data.images import Colour
from pilot_flwr.data.json_rows import RowFile, open_rows
from pilot_flwr.data.llava import LlavaExamples, Reading
from pilot_flwr.data.partition import Rows, partition_rows, subsample
from pilot_flwr.errors import ConfigError

Split = Literal["train", "test"]
_Key = tuple[str, int, int]


@dataclass(frozen=True)
class SiteFiles:
    """The files of a real site, from its own node configuration; all paths are absolute."""

    train: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    images: Path | None = None


def read_site(
    data: DataConfig,
    files: SiteFiles,
    task: str,
    split: Split,
    *,
    seed: int,
    background: Colour | None = None,
) -> LlavaExamples:
    """Return the examples of a real site, at most `data.train_examples` or `data.test_examples`."""
    paths = getattr(files, split)
    if not paths:
        raise ConfigError(
            f"`{split}-file` is missing in the node config; the run uses the {split} split."
        )
    opened = [open_rows(path) for path in paths]
    rows = np.arange(sum(map(len, opened)), dtype=np.int64)
    reading = Reading(files.images, data.files[task].prompt_suffix, background)
    kept = subsample(rows, _most(data, split), [seed, _number(task), _STREAM[split]])
    return LlavaExamples(opened, reading, kept)


def read_simulated(
    data: DataConfig,
    task: str,
    number: int,
    split: Split,
    *,
    seed: int,
    background: Colour | None = None,
) -> LlavaExamples:
    """Return the examples of a simulated client."""
    described = data.files[task]
    opened = [open_rows(path) for path in simulated_paths(data, task, split)]
    seeds = [seed, _number(task), _STREAM[split]]
    partition = data.partition
    each = partition.kind == "files" and len(opened) == data.clients_per_task > 1
    if each:
        opened = [opened[number]]
    if not each and (described.split_test if split == "test" else partition.kind != "files"):
        files = tuple((str(file.path), *file.stamp) for file in opened)
        kind = "iid" if partition.kind == "files" else partition.kind
        rows = _partitioned(
            files,
            replace(partition, kind=kind),
            data.clients_per_task,
            tuple(seeds),
            data.allowed_broken > 0,
        )[number]
        seeds.append(number)
    else:
        rows = np.arange(sum(map(len, opened)), dtype=np.int64)
    images = simulated_path(data, described.images, f"data.files.{task}.images")
    reading = Reading(images, described.prompt_suffix, background)
    return LlavaExamples(opened, reading, subsample(rows, _most(data, split), seeds))


def simulated_paths(data: DataConfig, task: str, split: Split) -> list[Path]:
    """Return the files of a task's split, from the run's configuration."""
    key = f"data.files.{task}.{split}"
    names = getattr(data.files[task], split)
    if not names:
        raise ConfigError(
            f"`{key}` is empty but must name a file; only real sites bring their own files."
        )
    return [_existing(simulated_path(data, name, key), key, Path.is_file) for name in names]


def simulated_path(data: DataConfig, name: str, key: str) -> Path:
    """Resolve a path of the run's configuration against `data.folder`."""
    path = expanded("data.folder", data.folder) / expanded(key, name)
    if not path.is_absolute():
        raise ConfigError(
            f"`{key}` is {name!r} and `data.folder` {data.folder!r}, but one of them must be an "
            "absolute path."
        )
    return path


def check_simulated(data: DataConfig, splits: Sequence[Split]) -> None:
    """Raise `ConfigError` unless every file of some splits, and every image folder, exists."""
    for task in data.tasks:
        for split in splits:
            simulated_paths(data, task, split)
        key = f"data.files.{task}.images"
        _existing(simulated_path(data, data.files[task].images, key), key, Path.is_dir)


def _existing(path: Path, key: str, test: Callable[[Path], bool]) -> Path:
    if not test(path):
        kind = "folder" if test is Path.is_dir else "file"
        raise ConfigError(f"`{key}` names {str(path)!r}, which is not a {kind}.")
    return path


@functools.lru_cache(maxsize=16)
def _partitioned(
    files: tuple[_Key, ...],
    config: PartitionConfig,
    num_clients: int,
    seed: tuple[int, ...],
    allow_broken: bool,
) -> list[Rows]:
    opened: list[RowFile] = [open_rows(Path(path)) for path, *_ in files]
    return partition_rows(
        opened, config, num_clients=num_clients, seed=seed, allow_broken=allow_broken
    )


def _most(data: DataConfig, split: Split) -> int:
    return data.train_examples if split == "train" else data.test_examples


def _number(task: str) -> int:
    """Return a task's seed, from its name, so that other tasks do not change its rows."""
    return zlib.crc32(task.encode())


_STREAM = {"train": 0, "test": 1}
