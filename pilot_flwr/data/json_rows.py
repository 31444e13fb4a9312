"""Read the rows of a JSON array or a JSONL file one at a time, in constant memory.

One pass indexes the file, at eight bytes a row; a row is read on demand. Rows count from 1 in every
error; those of JSONL are numbered by their lines, blank ones included, as in an editor.
"""

import contextlib
import json
import os
import re
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pilot_flwr.data.json_text import CHUNK, LARGEST_VALUE, Cursor, open_text, parse
from pilot_flwr.errors import DataError

Row = dict[str, Any]
"""One row: an object of the file."""

_FIRST_MEMBER = re.compile(r'\{\s*"([^"\\]*)"\s*:\s*\[\s*\{(?!\s*"(?:from|role)")')


class RowFile(Sequence[Row]):
    """The rows of one file, by number from 0.

    Errors have only the file's base name, as they may leave this machine. A file that has changed
    since it was opened is refused.
    """

    def __init__(self, path: Path, *, chunk: int = CHUNK) -> None:
        self.path = path
        self.name = path.name
        self._copy: BinaryIO | None = None
        self.stamp = stamp_of(path)
        file = open_text(path, self.name)
        try:
            cursor = Cursor(file, self.name, "row", chunk)
            self.is_array = cursor.next_character() == "["
            if self.is_array:
                # Offsets of the rows, then the end of the last one.
                self._offsets = _scan_array(cursor)
                self._lines: Sequence[int] = range(len(self._offsets) - 1)
            else:
                file.seek(start := cursor.base)
                _check_lines(file, self.name)
                file.seek(start)
                self._offsets, self._lines = _scan_lines(file)
        except BaseException:
            file.close()
            raise
        if isinstance(file.name, int):  # a temporary file
            self._copy = file
            weakref.finalize(self, file.close)
        else:
            file.close()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: Any) -> Any:
        """Return one row, or the rows of a slice."""
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        with self._open() as file:
            return self._read(file, number)

    def scan(self) -> Iterator[Row | DataError]:
        """Iterate over all rows in one pass, yielding the error of a broken one."""
        with self._open() as file:
            for number in range(len(self)):
                try:
                    row: Row | DataError = self._read(file, number)
                except DataError as error:
                    row = error
                yield row

    def row_number(self, number: int) -> int:
        """Return a row's number in errors, from 1: its place in the array, or its line."""
        return self._lines[number] + 1

    def origin(self, number: int) -> str:
        """Return a row's name in errors: ``train.json, row 17``."""
        return f"{self.name}, row {self.row_number(number)}"

    def _read(self, file: BinaryIO, number: int) -> Row:
        line = self._lines[number]
        start, end = self._offsets[line], self._offsets[line + 1]
        if end - start > LARGEST_VALUE:
            raise DataError(f"{self.origin(number)} has more than {LARGEST_VALUE} bytes.")
        data = os.pread(file.fileno(), end - start, start).strip()
        row, rest = parse(data, self.origin(number))
        if not self.is_array and rest.strip():
            why = "a comma after it" if rest.strip() == "," else "more than one JSON value"
            raise DataError(f"{self.origin(number)} has {why} on its line.")
        if not isinstance(row, dict):
            raise DataError(f"{self.origin(number)} is not a JSON object.")
        return row

    def _check_unchanged(self) -> None:
        if stamp_of(self.path) != self.stamp:
            raise DataError(f"{self.name} has changed since it was opened; restart the run.")

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        self._check_unchanged()
        if self._copy is not None:
            yield self._copy
        else:
            try:
                file = self.path.open("rb")
            except OSError as error:
                raise DataError(f"{self.name} cannot be opened ({error.strerror}).") from None
            with file:
                yield file


def _scan_array(cursor: Cursor) -> "array[int]":
    starts, end = array("q"), cursor.offset + 1
    for start, text in cursor.array():
        starts.append(start)
        end = start + len(text)
    cursor.end("array")
    starts.append(end)
    return starts


def _scan_lines(file: BinaryIO) -> "tuple[array[int], Sequence[int]]":
    """Return the offsets of all lines and the indices of those that are not blank.

    Lines are read in bounded pieces.
    """
    offsets, lines = array("q", [file.tell()]), array("q")
    ended = True
    while piece := file.readline(LARGEST_VALUE):
        if ended:
            offsets.append(offsets[-1])
        offsets[-1] += len(piece)
        line = len(offsets) - 2
        if not piece.isspace() and (not lines or lines[-1] != line):
            lines.append(line)
        ended = piece.endswith(b"\n")
    return offsets, range(len(lines)) if lines[-1] + 1 == len(lines) else lines


def _check_lines(file: BinaryIO, name: str) -> None:
    """Raise unless a file that begins with an object has one row per line."""
    text = file.read(CHUNK).decode("latin-1")
    whole, text = len(text) < CHUNK, text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        several = "\n" in text[:end]
        form = _object_form(value, several) if several or whole and not text[end:].strip() else ""
    except (ValueError, RecursionError) as error:
        if "\n" not in text[: getattr(error, "pos", 0)] or _is_object(text.split("\n", 2)[1]):
            return  # one line is broken
        first = _FIRST_MEMBER.match(text)
        form = _WRAPPED.format(f"`{first[1]}`") if first else _SEVERAL_LINES
    if form:
        raise DataError(f"{name} {form}.")


_WRAPPED = "is one object around the list of rows, {}: save the list alone, '[...]'"
_COLUMNS = 'has columns instead of rows: write rows, in pandas with `orient="records"`'
_BY_KEY = "is one object with a row for each key: save the rows as a list, '[...]'"
_SEVERAL_LINES = "has rows on several lines: write each on one line, or all as a list, '[...]'"


def _object_form(row: Row, several_lines: bool) -> str:
    """Describe a file's first object if it is not one row on one line; else return ""."""
    lists = {
        key: value[0].keys()
        for key, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    if not any(keys & {"from", "role", "bytes", "path"} for keys in lists.values()):
        if lists:
            return _WRAPPED.format(", ".join(f"`{key}`" for key in lists))
        if len(row) > 1 and all(isinstance(value, list) for value in row.values()):
            return _COLUMNS
        if row and all(isinstance(value, dict) and value for value in row.values()):
            digits = all(key.isdecimal() for value in row.values() for key in value)
            return _COLUMNS if digits else _BY_KEY
    return _SEVERAL_LINES if several_lines else ""


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def stamp_of(path: Path) -> tuple[int, int]:
    """Return the total size and latest modification time of a file, or of a folder's files."""
    try:
        found = [path, *path.iterdir()] if path.is_dir() else [path]
        status = [file.stat() for file in found]
    except OSError as error:
        raise DataError(f"{path.name} cannot be opened ({error.strerror}).") from None
    return sum(file.st_size for file in status), max(file.st_mtime_ns for file in status)
