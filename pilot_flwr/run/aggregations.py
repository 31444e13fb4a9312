"""The matrices of a run's aggregations: distances and mixing weights, one file per exchange.

``aggregations/NNNN.safetensors`` in the run folder holds, for the K clients that the exchange
aggregated:

============  ==================  ==========================================================
tensor        type, shape         content
============  ==================  ==========================================================
clients       uint8               the clients' ids, a JSON list in UTF-8
distances     float32, K(K-1)/2   ‖Θ_l,k − Θ_l,j‖₂ for k < j, row by row
weights       float64             the weights that are not 0 of every distinct row, row by row
columns       int64               the client of each weight
ends          int64               for each distinct row, the place after its last weight
rows          int64, K            the distinct row of each client
============  ==================  ==========================================================

Clients with the same row share one, so that averages over all clients take K weights, not K².
The file is written, atomically, before the event that names it. A run folder may be anyone's, so
a file is checked in full when it is read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.algorithm.server_state import Aggregation
from pilot_flwr.errors import StateError
from pilot_flwr.run.atomic import read_metadata, remove_leftovers, save_tensors
from pilot_flwr.run.events import Aggregated, LoraMixing

FOLDER = "aggregations"
_FILE = re.compile(rf"{FOLDER}/(\d{{4,}})\.safetensors")
_KINDS = {
    "clients": np.uint8,
    "distances": np.float32,
    "weights": np.float64,
    "columns": np.int64,
    "ends": np.int64,
    "rows": np.int64,
}


@dataclass(frozen=True)
class Matrices:
    """Distances and mixing weights, float64 (K, K), of an exchange's K `clients`."""

    clients: list[str]
    distances: NDArray[np.float64]
    weights: NDArray[np.float64]


def write_matrices(folder: Path, exchange: int, done: Aggregation) -> str | None:
    """Write an aggregation's matrices into a run folder; return the file's name within it.

    Distances are rounded to float32. Without LoRAs there is no file.
    """
    if done.neighbors is None or done.distances is None:
        return None
    import torch

    distinct, rows = np.unique(done.neighbors, axis=0, return_inverse=True)
    places, columns = distinct.nonzero()
    arrays: dict[str, NDArray[Any]] = {
        "clients": np.frombuffer(json.dumps(done.clients).encode(), dtype=np.uint8).copy(),
        "distances": done.distances[np.triu_indices(len(done.clients), 1)].astype(np.float32),
        "weights": distinct[places, columns],
        "columns": columns,
        "ends": np.cumsum(np.count_nonzero(distinct, axis=1)),
        "rows": rows.ravel(),
    }
    name = f"{FOLDER}/{exchange:04d}.safetensors"
    save_tensors(folder / name, {key: torch.from_numpy(a) for key, a in arrays.items()}, {})
    return name


def read_matrices(folder: Path, event: Aggregated) -> Matrices | None:
    """Read the matrices of an aggregation; None if it mixed no LoRAs.

    Raises
    ------
    StateError
        The event names a file that is missing, damaged, or none of its run folder.
    """
    if event.file is None:
        return _of_earlier_version(event)
    if not _FILE.fullmatch(event.file):
        raise StateError(
            f"An `aggregate` event of exchange {event.exchange} names the file {event.file!r:.80} "
            f"but must name one like {FOLDER}/0001.safetensors."
        )
    path = folder / event.file
    if not path.is_file():
        raise StateError(f"{path}, which an event names, is missing.")
    try:
        return _unpack(_arrays(path))
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path} does not hold an aggregation's matrices: {error}.") from None


def remove_matrices(folder: Path, after: int) -> None:
    """Remove the files of the exchanges `after` one, which a resumed run repeats."""
    remove_leftovers(folder / FOLDER)
    for path in (folder / FOLDER).glob("*.safetensors"):
        named = _FILE.fullmatch(f"{FOLDER}/{path.name}")
        if named and int(named[1]) > after:
            path.unlink()


def mixing(event: Aggregated) -> LoraMixing | None:
    """Return how an aggregation mixed the LoRAs; None if it mixed none."""
    if event.mixing is None and event.neighbors:
        return describe(_dense(event.neighbors, sorted(event.neighbors)))
    return event.mixing


def describe(weights: NDArray[np.float64]) -> LoraMixing:
    """Describe mixing weights (K, K) in numbers."""
    used = weights > 0
    others = np.count_nonzero(used & ~np.eye(len(used), dtype=bool), axis=1)
    sizes = dict.fromkeys((row.tobytes(), int(row.sum())) for row in used)
    groups = tuple(size for _, size in sizes)
    disjoint = sum(groups) == len(used)
    return LoraMixing(len(used), int(others.min()), int(others.max()), groups if disjoint else ())


def _of_earlier_version(event: Aggregated) -> Matrices | None:
    if not event.neighbors or not event.distances:
        return None
    clients = sorted(event.neighbors.keys() | event.distances.keys())
    distances = _dense(event.distances, clients, missing=np.nan)
    return Matrices(clients, distances, _dense(event.neighbors, clients))


def _dense(
    matrix: dict[str, dict[str, float]], clients: list[str], missing: float = 0.0
) -> NDArray[np.float64]:
    rows = [[matrix.get(k, {}).get(j, missing) for j in clients] for k in clients]
    return np.array(rows, dtype=np.float64)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the tensors, each one-dimensional and of its type."""
    from safetensors import SafetensorError, safe_open

    read_metadata(path)
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            if names != _KINDS.keys():
                raise ValueError(f"its tensors are {sorted(names)[:9]}")
            arrays = {name: file.get_tensor(name) for name in _KINDS}
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(str(error)) from None
    for name, array in arrays.items():
        if array.dtype != _KINDS[name] or array.ndim != 1:
            raise ValueError(f"`{name}` is {array.dtype} of shape {array.shape}")
    return arrays


def _unpack(arrays: dict[str, NDArray[Any]]) -> Matrices:
    """Return the matrices of a file; `ValueError` if its tensors contradict each other."""
    clients = json.loads(arrays["clients"].tobytes().decode())
    if not isinstance(clients, list) or not all(isinstance(name, str) for name in clients):
        raise ValueError("`clients` is no list of ids")
    size, (upper, values) = len(clients), (arrays["distances"], arrays["weights"])
    columns, ends, rows = arrays["columns"], arrays["ends"], arrays["rows"]
    if size == 0 or len(set(clients)) != size:
        raise ValueError("`clients` is empty or has an id twice")
    if len(upper) != size * (size - 1) // 2 or not np.all(np.isfinite(upper) & (upper >= 0)):
        raise ValueError(f"`distances` are not finite, or not those of {size} clients")
    if len(columns) != len(values) or not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError("`weights` are not finite and positive, one for each of `columns`")
    counts = np.diff(ends, prepend=0)
    if len(ends) == 0 or len(ends) > size or np.any(counts < 0) or ends[-1] != len(values):
        raise ValueError("`ends` do not divide the weights into rows")
    if np.any((columns < 0) | (columns >= size)):
        raise ValueError(f"`columns` are not indices of {size} clients")
    if len(rows) != size or np.any((rows < 0) | (rows >= len(ends))):
        raise ValueError("`rows` are not those of the clients")
    distances = np.zeros((size, size))
    distances[np.triu_indices(size, 1)] = upper
    distinct = np.zeros((len(ends), size))
    distinct[np.repeat(np.arange(len(ends)), counts), columns] = values
    return Matrices(clients, distances + distances.T, distinct[rows])
