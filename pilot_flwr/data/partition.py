"""Partition a task's rows among its clients with Flower's own partitioners (flwr-datasets).

These partition a Hugging Face data set: here a table of row numbers with at most one more column,
so that rows are never loaded. The same seed gives the same partition in every process. To add a
kind, add a function and its row to `_BY_SIZE`, and its name to `pilot_flwr.config.data`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.config.data import PartitionConfig
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.errors import ConfigError, DataError

Rows = NDArray[np.int64]
"""Row numbers, sorted."""

_DRAWS = 10  # as often as flwr-datasets tries


def partition_rows(
    files: Sequence[RowFile],
    config: PartitionConfig,
    *,
    num_clients: int,
    seed: Sequence[int],
    allow_broken: bool = False,
) -> list[Rows]:
    """Assign every row of some files to exactly one client; return sorted row numbers per client.

    Raises `ConfigError` if there are fewer rows than clients, or if no draw gives every client
    enough. With `allow_broken`, a broken row counts as one more value of the column.
    """
    total = sum(map(len, files))
    if total < num_clients:
        raise ConfigError(
            f"`data.clients_per_task` is {num_clients} but the task has {total} rows to divide."
        )
    rng = np.random.default_rng(seed)
    if config.kind == "dirichlet" and config.column:
        values = column_codes(files, config.column, allow_broken=allow_broken)
        shares = _by_column(values, config, num_clients, rng)
    else:
        shares = _BY_SIZE[config.kind](total, config, num_clients, rng)
    return [np.sort(share) for share in shares]


def subsample(rows: Rows, most: int, seed: Sequence[int]) -> Rows:
    """Draw at most `most` rows, 0 for all; a smaller draw is part of a larger one."""
    if most == 0 or most >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def column_codes(files: Sequence[RowFile], column: str, *, allow_broken: bool) -> NDArray[np.int64]:
    """Return a number for each row's value in a column, the same for equal values."""
    codes: dict[tuple[str, Any], int] = {}
    found = np.empty(sum(map(len, files)), np.int64)
    for number, value in enumerate(_values(files, column, allow_broken)):
        found[number] = codes.setdefault((type(value).__name__, value), len(codes))
    return found


def _values(files: Sequence[RowFile], column: str, allow_broken: bool) -> Iterable[Any]:
    for file in files:
        for number, row in enumerate(file.scan()):
            if isinstance(row, DataError):
                if not allow_broken:
                    raise row
                yield None
            elif isinstance(value := row.get(column), str | int | float):
                yield value
            else:
                raise DataError(
                    f"{file.origin(number)} has no text or number in `{column}`, by which "
                    "`data.partition.column` divides the rows."
                )


def _iid(
    total: int, config: PartitionConfig, num_clients: int, rng: np.random.Generator
) -> list[Rows]:
    from flwr_datasets.partitioner import IidPartitioner

    return _shares(IidPartitioner(num_clients), {"row": rng.permutation(total)}, num_clients)


def _by_size(
    total: int, config: PartitionConfig, num_clients: int, rng: np.random.Generator
) -> list[Rows]:
    from flwr_datasets.partitioner import SizePartitioner

    for _ in range(_DRAWS):
        cuts = np.cumsum(rng.dirichlet([config.alpha] * num_clients))[:-1] * total
        sizes = np.diff(np.round(cuts).astype(int), prepend=0, append=total).tolist()
        if min(sizes) >= config.min_examples:
            rows = {"row": rng.permutation(total)}
            return _shares(SizePartitioner(sizes), rows, num_clients)
    raise _too_few(config, total, num_clients)


def _by_column(
    values: NDArray[np.int64], config: PartitionConfig, num_clients: int, rng: np.random.Generator
) -> list[Rows]:
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_clients,
        partition_by="value",
        alpha=config.alpha,
        min_partition_size=config.min_examples,
        seed=int(rng.integers(2**32)),
    )
    table = {"row": np.arange(len(values)), "value": values}
    try:
        return _shares(partitioner, table, num_clients)
    except ValueError:  # its way to say that no draw gave every client enough
        raise _too_few(config, len(values), num_clients) from None


def _shares(partitioner: Any, table: dict[str, Any], num_clients: int) -> list[Rows]:
    """Return the row numbers of each partition of a table."""
    import datasets  # takes seconds, which a look at the settings need not

    partitioner.dataset = datasets.Dataset.from_dict(table)
    with warnings.catch_warnings():  # one for every draw; the last one raises
        warnings.simplefilter("ignore")
        parts = [partitioner.load_partition(n).with_format("numpy") for n in range(num_clients)]
    return [np.asarray(part["row"][:], np.int64) for part in parts]


def _too_few(config: PartitionConfig, total: int, num_clients: int) -> ConfigError:
    return ConfigError(
        f"`data.partition.min_examples` is {config.min_examples} but in {_DRAWS} draws with "
        f"`data.partition.alpha` {config.alpha}, {total} rows never gave each of {num_clients} "
        "clients as many; raise alpha or lower min_examples."
    )


_BY_SIZE: dict[str, Callable[[int, PartitionConfig, int, np.random.Generator], list[Rows]]] = {
    "iid": _iid,
    "dirichlet": _by_size,
}
