"""Which files a client has, and which of their rows are its own.

A simulated client's files are named in the run's configuration (`data.folder`, `data.files`),
and a task's rows are dealt out to its clients. A real site's files are named in its own node
configuration alone, whatever the run's says, and all their rows are its own.
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
from pilot_flwr.data.partition import Rows, deal, draw
from pilot_flwr.errors import ConfigError

Split = Literal["train", "test"]
_Key = tuple[str, int, int]


@dataclass(frozen=True)
class SiteFiles:
    """The files of one real site, by its own node configuration; all paths are absolute.

    Parameters
    ----------
    train, test : tuple of Path
        LLaVA JSON or JSONL, read one after the other; `test` may be empty if there is no
        evaluation.
    images : Path, optional
        The image folder.
    """

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
    """Return the examples of a real site, at most `data.train_examples` or `data.test_examples`.

    Parameters
    ----------
    data : DataConfig
        The run's; its paths are not looked at.
    files : SiteFiles
        The site's.
    task : str
        The site's task, for the prompt suffix.
    split : {"train", "test"}
        Which files.
    seed : int
        For the draw, if there are more rows than the run uses.
    background : tuple of int, optional
        Colour of the padding.

    Raises
    ------
    ConfigError, DataError
        There is no file for the split, or it cannot be read.
    """
    paths = getattr(files, split)
    if not paths:
        raise ConfigError(
            f"`{split}-file` is missing in the node config; the run uses the {split} split."
        )
    opened = [open_rows(path) for path in paths]
    rows = np.arange(sum(map(len, opened)), dtype=np.int64)
    reading = Reading(files.images, data.files[task].prompt_suffix, background)
    kept = draw(rows, _most(data, split), [seed, _number(task), _STREAM[split]])
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
    """Return the examples of a simulated client.

    Parameters
    ----------
    data : DataConfig
        The run's: files, partition, most examples.
    task : str
        The client's task.
    number : int
        Which of the task's clients, from 0.
    split : {"train", "test"}
        Which files.
    seed : int
        Seed of the federation: partition and draw.
    background : tuple of int, optional
        Colour of the padding.

    Raises
    ------
    ConfigError, DataError
        A file is not there or cannot be read, or cannot be dealt out as configured.
    """
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
        rows = _dealt(
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
    return LlavaExamples(opened, reading, draw(rows, _most(data, split), seeds))


def simulated_paths(data: DataConfig, task: str, split: Split) -> list[Path]:
    """Return the files of a task's split as the run's configuration names them.

    Raises
    ------
    ConfigError
        There is none, or one is not there.
    """
    key = f"data.files.{task}.{split}"
    names = getattr(data.files[task], split)
    if not names:
        raise ConfigError(
            f"`{key}` is empty but must name a file; only real sites have files of their own."
        )
    return [_existing(simulated_path(data, name, key), key, Path.is_file) for name in names]


def simulated_path(data: DataConfig, name: str, key: str) -> Path:
    """Return a path of the run's configuration, relative ones from `data.folder`.

    Raises
    ------
    ConfigError
        It is relative, and so is `data.folder`: clients run in other folders than the user.
    """
    path = expanded("data.folder", data.folder) / expanded(key, name)
    if not path.is_absolute():
        raise ConfigError(
            f"`{key}` is {name!r} and `data.folder` {data.folder!r}, but one of them must be an "
            "absolute path."
        )
    return path


def check_simulated(data: DataConfig, splits: Sequence[Split]) -> None:
    """Raise unless every file of some splits, and every image folder, is there.

    Raises
    ------
    ConfigError
        Names the setting and the path.
    """
    for task in data.tasks:
        for split in splits:
            simulated_paths(data, task, split)
        key = f"data.files.{task}.images"
        _existing(simulated_path(data, data.files[task].images, key), key, Path.is_dir)


def _existing(path: Path, key: str, test: Callable[[Path], bool]) -> Path:
    if not test(path):
        kind = "folder" if test is Path.is_dir else "file"
        raise ConfigError(f"`{key}` names {str(path)!r}, which is no {kind}.")
    return path


@functools.lru_cache(maxsize=16)
def _dealt(
    files: tuple[_Key, ...],
    config: PartitionConfig,
    num_clients: int,
    seed: tuple[int, ...],
    allow_broken: bool,
) -> list[Rows]:
    opened: list[RowFile] = [open_rows(Path(path)) for path, *_ in files]
    return deal(opened, config, num_clients=num_clients, seed=seed, allow_broken=allow_broken)


def _most(data: DataConfig, split: Split) -> int:
    return data.train_examples if split == "train" else data.test_examples


def _number(task: str) -> int:
    """Return a number for a task by its name, so that other tasks do not move its rows."""
    return zlib.crc32(task.encode())


_STREAM = {"train": 0, "test": 1}
