"""Find a client's files and its rows in them.

The run's configuration names the files of simulated clients (`data.folder`, `data.files`), and a
task's rows are partitioned among its clients. A real site's files are named only in its own node
config, and all their rows belong to it.

Flower's partitioners (flwr-datasets) divide a table of row numbers, with at most one more column,
so that rows are never loaded. The same seed gives the same partition in every process.
"""

import functools
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.config.data import DataConfig, PartitionConfig
from pilot_flwr.config.rules import expanded
from pilot_flwr.data.images import Colour
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.llava import LlavaExamples, Reading
from pilot_flwr.data.row_files import may_have_rows, open_rows
from pilot_flwr.errors import ConfigError, DataError

Split = Literal["train", "test"]
Rows = NDArray[np.int64]
"""Row numbers, sorted."""

_STREAM = {"train": 0, "test": 1}
_DRAWS = 10  # as often as flwr-datasets tries


@dataclass(frozen=True)
class SiteFiles:
    """The files of a real site, from its own node config; all paths are absolute."""

    train: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    images: Path | None = None
    linked_folders: tuple[Path, ...] = ()
    allowed_overlap: float = 0.0

    def rows(self, split: Split) -> LlavaExamples:
        """Return all rows of a split, regardless of how many a run uses."""
        reading = Reading(self.images, linked_folders=self.linked_folders)
        return LlavaExamples([open_rows(path) for path in getattr(self, split)], reading)


def read_site(
    data: DataConfig, site: SiteFiles, task: str, split: Split, seed: int, background: Colour | None
) -> LlavaExamples:
    """Return the examples of a real site, at most `data.train_examples` or `data.test_examples`."""
    paths = getattr(site, split)
    if not paths:
        raise ConfigError(f"`{split}-file` is missing in the node config, but the run needs it.")
    suffix, official = data.files[task].prompt_suffix, data.image_reading == "official"
    reading = Reading(site.images, suffix, background, official, site.linked_folders)
    examples = LlavaExamples([open_rows(path) for path in paths], reading)
    return _limited(examples, data, split, _seeds(seed, task, split))


def read_simulated(
    data: DataConfig, number: int, task: str, split: Split, seed: int, background: Colour | None
) -> LlavaExamples:
    """Return the examples of client `number` of a task."""
    task_files, partition = data.files[task], data.partition
    files = [open_rows(path) for path in _split_paths(data, task, split)]
    images = _simulated_path(data, task_files.images, f"data.files.{task}.images")
    official, linked = data.image_reading == "official", linked_folders(data)
    reading = Reading(images, task_files.prompt_suffix, background, official, linked)
    seeds = _seeds(seed, task, split)
    if partition.kind == "files" and len(files) == data.clients_per_task > 1:
        return _limited(LlavaExamples([files[number]], reading), data, split, seeds)
    examples = LlavaExamples(files, reading)
    if task_files.split_test if split == "test" else partition.kind != "files":
        parts = _partition_once(
            examples.files,
            partition,
            num_clients=data.clients_per_task,
            seed=seeds,
            allow_broken=data.allowed_broken > 0,
        )
        examples = examples.select(parts[number])
        seeds += (number,)
    return _limited(examples, data, split, seeds)


def simulated_paths(data: DataConfig, splits: Sequence[Split]) -> list[Path]:
    """Return the files of some splits and the image folders; raise unless all of them exist."""
    paths = []
    for task in data.tasks:
        for split in splits:
            paths += _split_paths(data, task, split)
        key = f"data.files.{task}.images"
        folder = _simulated_path(data, data.files[task].images, key)
        if not folder.is_dir():
            raise ConfigError(f"`{key}` names {str(folder)!r}, which is not a folder.")
        paths.append(folder)
    linked_folders(data)
    return paths


def linked_folders(data: DataConfig) -> tuple[Path, ...]:
    """Return a simulation's folders that links of images may lead to; raise unless they exist."""
    key = "data.linked_folders"
    folders = tuple(_simulated_path(data, name, key) for name in data.linked_folders)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"`{key}` names {str(folder)!r}, which is not a folder.")
    return folders


def _split_paths(data: DataConfig, task: str, split: Split) -> list[Path]:
    key = f"data.files.{task}.{split}"
    names = getattr(data.files[task], split)
    if not names:
        raise ConfigError(f"`{key}` is empty but must name a file, except for real sites.")
    paths = [_simulated_path(data, name, key) for name in names]
    for path in paths:
        if not may_have_rows(path):
            raise ConfigError(
                f"`{key}` names {str(path)!r}, which is not a file or a data set's folder."
            )
    return paths


def _simulated_path(data: DataConfig, name: str, key: str) -> Path:
    path = expanded("data.folder", data.folder) / expanded(key, name)
    if not path.is_absolute():
        raise ConfigError(f"`{key}` is {str(path)!r}, but it or `data.folder` must be absolute.")
    return path


def _seeds(seed: int, task: str, split: Split) -> tuple[int, ...]:
    """Return a split's seeds, by the task's name, so that other tasks do not change its rows."""
    return seed, zlib.crc32(task.encode()), _STREAM[split]


def _limited(
    examples: LlavaExamples, data: DataConfig, split: Split, seeds: Sequence[int]
) -> LlavaExamples:
    most = data.train_examples if split == "train" else data.test_examples
    return LlavaExamples(examples.files, examples.reading, subsample(examples.rows, most, seeds))


def subsample(rows: Rows, most: int, seed: Sequence[int]) -> Rows:
    """Draw at most `most` rows, 0 for all; a smaller draw is part of a larger one."""
    if most == 0 or most >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def partition_rows(
    files: Sequence[RowFile],
    config: PartitionConfig,
    *,
    num_clients: int,
    seed: Sequence[int],
    allow_broken: bool = False,
) -> list[Rows]:
    """Assign every row to exactly one client; return sorted row numbers per client.

    Raises `ConfigError` if there are fewer rows than clients, or if no draw gives every client
    enough. With `allow_broken`, a broken row counts as one more value of the column.
    """
    import datasets  # these take seconds, and reading the settings does not need them
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, SizePartitioner

    total = sum(map(len, files))
    if total < num_clients:
        raise ConfigError(f"`data.clients_per_task` is {num_clients} but a task has {total} rows.")
    rng = np.random.default_rng(seed)
    too_few = ConfigError(
        f"`data.partition.min_examples` is {config.min_examples} but in {_DRAWS} draws with "
        f"`data.partition.alpha` {config.alpha}, {total} rows never gave each of {num_clients} "
        "clients as many; raise alpha or lower min_examples."
    )
    partitioner: Any
    if config.kind == "dirichlet" and config.column:
        values = column_codes(files, config.column, allow_broken=allow_broken)
        table = {"row": np.arange(total), "value": values}
        partitioner = DirichletPartitioner(
            num_clients,
            partition_by="value",
            alpha=config.alpha,
            min_partition_size=config.min_examples,
            seed=int(rng.integers(2**32)),
        )
    else:
        if config.kind == "dirichlet":
            sizes = _dirichlet_sizes(total, config, num_clients, rng)
            if not sizes:
                raise too_few
            partitioner = SizePartitioner(sizes)
        else:
            partitioner = IidPartitioner(num_clients)
        table = {"row": rng.permutation(total)}
    partitioner.dataset = datasets.Dataset.from_dict(table)
    with warnings.catch_warnings():  # one for every draw; the last one raises
        warnings.simplefilter("ignore")
        try:
            parts = [partitioner.load_partition(n).with_format("numpy") for n in range(num_clients)]
        except ValueError:  # the Dirichlet partitioner's, if no draw gives every client enough
            raise too_few from None
    return [np.sort(np.asarray(part["row"][:], np.int64)) for part in parts]


_partition_once = functools.lru_cache(maxsize=16)(partition_rows)


def _dirichlet_sizes(
    total: int, config: PartitionConfig, num_clients: int, rng: np.random.Generator
) -> list[int]:
    for _ in range(_DRAWS):
        cuts = np.cumsum(rng.dirichlet([config.alpha] * num_clients))[:-1] * total
        sizes: list[int] = np.diff(np.round(cuts).astype(int), prepend=0, append=total).tolist()
        if min(sizes) >= config.min_examples:
            return sizes
    return []  # no draw gave every client enough


def column_codes(files: Sequence[RowFile], column: str, *, allow_broken: bool) -> NDArray[np.int64]:
    """Return a number for each row's value in a column, the same for equal values."""
    codes: dict[tuple[str, Any], int] = {}
    found = []
    for file in files:
        for number, row in enumerate(file.scan()):
            if isinstance(row, DataError):
                if not allow_broken:
                    raise row
                value = None
            elif not isinstance(value := row.get(column), str | int | float):
                raise DataError(
                    f"{file.origin(number)} has no text or number in `{column}`, the "
                    "`data.partition.column`."
                )
            found.append(codes.setdefault((type(value).__name__, value), len(codes)))
    return np.array(found, np.int64)
