"""Open files of rows: JSON, or Hugging Face data sets.

A data set is a parquet file, an Arrow file or a folder that `save_to_disk` wrote. It is
memory-mapped, so that neither its rows nor their images are loaded. Parquet and Feather files
cannot be read row by row: they are unpacked once per process into an anonymous temporary file.

To support another format, extend `_open_table`.
"""

import functools
import json
import mmap
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pilot_flwr.data.json_rows import Row, RowFile, stamp_of
from pilot_flwr.errors import DataError

_PARQUET, _ARROW, _STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_AT_A_TIME = 64  # rows in memory while a file is unpacked


def open_rows(path: Path) -> RowFile:
    """Open a file or folder of rows; an unchanged one is indexed once per process."""
    stamp = stamp_of(path)
    if not (path.is_dir() or path.is_file()):
        raise DataError(f"{path.name} is neither a file nor a folder.")
    file = _open_rows(path, stamp)
    if not file:
        raise DataError(f"{path.name} has no rows.")
    return file


def may_have_rows(path: Path) -> bool:
    """Return whether a path is a file, or a folder that `save_to_disk` wrote."""
    files = path, path / "state.json", path / "dataset_dict.json"
    return any(map(os.path.isfile, files))  # unlike `is_file`, false without permission


@functools.lru_cache(maxsize=64)
def _open_rows(path: Path, stamp: tuple[int, int]) -> RowFile:
    if path.is_dir() or _begin(path).startswith((_PARQUET, _ARROW, _STREAM)):
        return TableFile(path)
    return RowFile(path)


class TableFile(RowFile):
    """The rows of a Hugging Face data set, by number from 0.

    Null fields are omitted, since every row of a table has every column. The bytes of an image are
    a `memoryview` of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.is_array = path, path.name, True
        self.stamp = stamp_of(path)
        self._files = _shards(path)
        self._lock = threading.Lock()
        self._batches: list[Any] | None = None
        self._broken: DataError | None = None
        self._lines = range(self._count())

    def _count(self) -> int:
        if len(self._files) == 1 and _begin(self._files[0]).startswith(_PARQUET):
            from pyarrow import parquet

            with self._named(self._files[0]), parquet.ParquetFile(self._files[0]) as file:
                return int(file.metadata.num_rows)
        return sum(batch.num_rows for batch in self._open_batches())

    def _open_batches(self) -> list[Any]:
        with self._lock:
            if self._broken is not None:
                raise DataError(str(self._broken))
            if self._batches is None:
                try:
                    self._batches = self._load()
                except DataError as error:
                    self._broken = error
                    raise
                sizes = [batch.num_rows for batch in self._batches]
                self._ends = np.cumsum(sizes, dtype=np.int64)
        return self._batches

    def _load(self) -> list[Any]:
        batches = []
        for path in self._files:
            with self._named(path):
                batches += _open_table(path)
        names = batches[0].schema.names if batches else []
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{self.name} has the column {twice[0]!r} twice.")
        return batches

    @contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        """Replace pyarrow's errors, which quote the path, by ones with the file's name."""
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None)
            shard = f", {path.name}," if path != self.path else ""
            raise DataError(
                f"{self.name}{shard} cannot be read ({reason})."
                if reason
                else f"{self.name}{shard} is truncated, damaged, encrypted or not a file of rows."
            ) from None

    @contextmanager
    def _open(self) -> Iterator[Any]:
        self._check_unchanged()
        yield self._open_batches()

    def _read(self, file: Any, number: int) -> Row:
        index = int(np.searchsorted(self._ends, number, side="right"))
        batch = file[index]
        place = number - (int(self._ends[index - 1]) if index else 0)
        try:
            row = {
                name: _value(column[place])
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
        except (ValueError, OverflowError, NotImplementedError) as error:
            raise DataError(
                f"{self.origin(number)} has a value that cannot be read ({type(error).__name__})."
            ) from None
        return {name: _as_list(value) for name, value in row.items() if value is not None}


def _value(scalar: Any) -> Any:
    """Return a value of a table; null members of objects are omitted."""
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        members = ((name, _value(member)) for name, member in scalar.items())
        return {name: member for name, member in members if member is not None}
    if isinstance(scalar, pa.ListScalar) and not isinstance(scalar, pa.MapScalar):
        return [_value(element) for element in scalar.values]
    if isinstance(scalar, pa.BinaryScalar) and not isinstance(scalar, pa.StringScalar):
        return memoryview(scalar.as_buffer()).cast("B")
    return scalar.as_py()


def _as_list(value: Any) -> Any:
    """Return an object of equally long lists as a list of objects.

    This is how `datasets` stores a `Sequence` of objects, such as turns.
    """
    if isinstance(value, dict) and all(isinstance(member, list) for member in value.values()):
        if len({len(member) for member in value.values()}) == 1:
            members = zip(*value.values(), strict=True)
            return [dict(zip(value, member, strict=True)) for member in members]
    return value


def _shards(path: Path) -> list[Path]:
    """Return the files of a data set."""
    if path.is_file():
        return [path]
    try:
        if (splits := path / "dataset_dict.json").is_file():
            names = [f"{path.name}/{split}" for split in json.loads(splits.read_bytes())["splits"]]
            raise DataError(
                f"{path.name} is a data set of several splits: name the folder of one of them, "
                f"{', '.join(names)}."
            )
        if not (path / "state.json").is_file():
            raise DataError(
                f"{path.name} is a folder, but not one that `save_to_disk` wrote; name the files "
                "of the rows."
            )
        state = json.loads((path / "state.json").read_bytes())
        names = [shard["filename"] for shard in state["_data_files"]]
        selected = state.get("_indices_data_files") or state.get("_indices_files")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path.name}/state.json cannot be read; save the data set again."
        ) from None
    if selected:
        raise DataError(
            f"{path.name} is a selection of rows saved by an old version of `datasets`; save it "
            "again with a current one."
        )
    files = [path / Path(str(name)).name for name in names]
    for file in files:
        if not file.is_file():
            raise DataError(f"{path.name} lacks the file {file.name}; copy the whole folder.")
    return files


def _open_table(path: Path) -> list[Any]:
    """Return the record batches of a file, memory-mapped.

    Each is validated before any value is read: Arrow does not check offsets, and a damaged one
    would end the process or return other memory as text.
    """
    import pyarrow as pa
    from pyarrow import parquet

    begin = _begin(path)
    if begin.startswith(_PARQUET):
        with parquet.ParquetFile(path) as packed:
            batches = packed.iter_batches(batch_size=_AT_A_TIME)
            unpacked = _unpacked(packed.schema_arrow, batches)
            if sum(batch.num_rows for batch in unpacked) != packed.metadata.num_rows:
                raise pa.ArrowInvalid("The footer has another number of rows.")
            return unpacked
    source = pa.memory_map(str(path))
    if begin.startswith(_ARROW):
        file = pa.ipc.open_file(source)
        batches = (file.get_batch(number) for number in range(file.num_record_batches))
        return _unpacked(file.schema, batches)
    return list(_validated(pa.ipc.open_stream(source)))


def _validated(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _unpacked(schema: Any, batches: Iterable[Any]) -> list[Any]:
    import pyarrow as pa

    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_stream(file, schema) as stream:
            for batch in _validated(batches):
                stream.write_batch(batch)
        file.flush()
        return list(
            pa.ipc.open_stream(pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))
        )


def _begin(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise DataError(f"{path.name} cannot be opened ({error.strerror}).") from None
