"""Rows of a JSON array or a JSONL file, read one at a time: constant memory for any size.

A file is walked through once, which finds where each row begins; eight bytes a row are kept. A
row is then read from its place whenever it is asked for. Rows count from 1 in every error, as
lines do in an editor: in a JSONL file the row is the line.

The walk decodes the file as Latin-1, where a character is a byte, so that places in the text are
places in the file. JSON's structure is ASCII, and UTF-8 has no ASCII byte inside a character, so
the structure is the same. The rows themselves are decoded as UTF-8.
"""

import functools
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pilot_flwr.errors import DataError

Row = dict[str, Any]
"""One row: an object of the file."""

LARGEST_ROW = 2**24
"""Longest row in bytes (16 MiB): where the walk gives up waiting for a row's end."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 2**22
_MARGIN = 16  # an error this close to the end of what was read may be a token that was cut
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class RowFile(Sequence[Row]):
    """The rows of one file, by number from 0.

    Parameters
    ----------
    path : Path
        A JSON file with one array of objects, or a JSONL file with an object a line; which of
        both it is shows in its first character. UTF-8.
    chunk : int
        Bytes that the walk through an array reads at a time.

    Attributes
    ----------
    name : str
        The file's base name, by which errors call it: they may leave this machine.
    is_array : bool
        Whether it is one JSON array.
    stamp : tuple of int
        Size and time of the last change; a file that has another one is not read on.

    Raises
    ------
    DataError
        The file cannot be read, or is an array that is broken; names the row. A broken line of a
        JSONL file is an error only when it is read.
    """

    def __init__(self, path: Path, *, chunk: int = _CHUNK) -> None:
        self.path = path
        self.name = path.name
        with self._open() as file:
            self.stamp = _stamp(file)
            first = _first_byte(file)
            self.is_array = first == b"["
            if first not in (b"[", b"{"):
                found = "begins with something else" if first else "is empty"
                raise DataError(
                    f"{self.name} {found} but must be a JSON array of rows, which begins with "
                    "'[', or JSONL with an object a line, which begins with '{'."
                )
            # Where each row begins, and at last where the last row ends.
            self._places = self._walk_array(file, chunk) if self.is_array else _walk_lines(file)

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, number: Any) -> Any:
        """Return one row, or the rows of a slice.

        Raises
        ------
        DataError
            The row is broken, or no object, or the file has changed since it was opened.
        """
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, so none at {number}.")
        number %= len(self)
        with self._open() as file:
            self._check_unchanged(file)
            return self._read(file, number)

    def __iter__(self) -> Iterator[Row]:
        """Go through all rows in one pass; raises as reading a row does."""
        for row in self.scan():
            if isinstance(row, DataError):
                raise row
            yield row

    def scan(self) -> Iterator[Row | DataError]:
        """Go through all rows in one pass; a broken one comes as its error."""
        with self._open() as file:
            self._check_unchanged(file)
            for number in range(len(self)):
                try:
                    row: Row | DataError = self._read(file, number)
                except DataError as error:
                    row = error
                yield row

    def origin(self, number: int) -> str:
        """Return what errors call a row: ``train.json, row 17`` for number 16."""
        return f"{self.name}, row {number + 1}"

    def _read(self, file: BinaryIO, number: int) -> Row:
        start, end = self._places[number], self._places[number + 1]
        if end - start > LARGEST_ROW:
            raise DataError(f"{self.origin(number)} has more than {LARGEST_ROW} bytes.")
        file.seek(start)
        try:
            text = file.read(end - start).decode("utf-8")
            row, stop = _DECODER.raw_decode(text)
        except UnicodeDecodeError:
            raise DataError(f"{self.origin(number)} is not UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.origin(number)} is broken JSON ({_what(error)}).") from None
        if not self.is_array and text[stop:].strip():
            raise DataError(f"{self.origin(number)} has more than one JSON value on its line.")
        if not isinstance(row, dict):
            raise DataError(f"{self.origin(number)} is no JSON object.")
        return row

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.name} cannot be opened ({error.strerror}).") from None

    def _check_unchanged(self, file: BinaryIO) -> None:
        if _stamp(file) != self.stamp:
            raise DataError(f"{self.name} has changed since it was opened; start anew.")

    def _walk_array(self, file: BinaryIO, chunk: int) -> "array[int]":
        walk = _Walk(file, chunk)
        walk.next_character()
        walk.step(1)  # the bracket
        starts, end = array("q"), walk.place
        following = walk.next_character()
        while following != "]":
            starts.append(walk.place)
            walk.step(self._row_length(walk, len(starts)))
            end, following = walk.place, walk.next_character()
            if following == ",":
                walk.step(1)
                following = walk.next_character()
                if following == "]":
                    raise self._broken(len(starts) + 1, walk.place, "a comma, but no row")
            elif following != "]":
                what = "no comma before it" if following else "the file ends without a ']'"
                raise self._broken(len(starts) + 1, walk.place, what)
        walk.step(1)
        if walk.next_character():
            raise DataError(
                f"{self.name} has more after the end of its array, at byte {walk.place}."
            )
        starts.append(end)
        return starts

    def _row_length(self, walk: "_Walk", row: int) -> int:
        """Characters of the value that the walk stands at; reads on as needed."""
        while True:
            try:
                value, end = _DECODER.raw_decode(walk.text, walk.at)
            except json.JSONDecodeError as error:
                place = walk.base + error.pos
                cut = error.pos >= len(walk.text) - _MARGIN
                cut |= error.msg.startswith("Unterminated string")
                if cut and len(walk.text) - walk.at <= LARGEST_ROW and walk.read():
                    continue
                raise self._broken(row, place, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self._broken(row, walk.place, _what(error)) from None
            if not isinstance(value, dict):
                raise self._broken(row, walk.place, "no JSON object")
            return end - walk.at

    def _broken(self, row: int, place: int, what: str) -> DataError:
        return DataError(
            f"{self.name}, row {row} is broken JSON at byte {place} ({what}), so that the rest "
            "of the array cannot be read."
        )


@functools.lru_cache(maxsize=64)
def _open_rows(path: str, size: int, changed: int) -> RowFile:
    return RowFile(Path(path))


def open_rows(path: Path) -> RowFile:
    """Return the rows of a file; one that has not changed is walked through once a process.

    Raises
    ------
    DataError
        As `RowFile`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path.name} cannot be opened ({error.strerror}).") from None
    if not path.is_file():
        raise DataError(f"{path.name} is no file.")
    return _open_rows(str(path), status.st_size, status.st_mtime_ns)


class _Walk:
    """A walk through a file's characters, of which a stretch is in memory.

    Attributes
    ----------
    text : str
        The stretch, which begins at byte `base` of the file.
    at : int
        Where in it the walk stands.
    """

    def __init__(self, file: BinaryIO, chunk: int) -> None:
        self.file, self.chunk = file, chunk
        self.base, self.at, self.text = file.tell(), 0, ""

    @property
    def place(self) -> int:
        """Byte of the file at which the walk stands."""
        return self.base + self.at

    def step(self, length: int) -> None:
        """Go on by some characters of the stretch."""
        self.at += length

    def read(self) -> bool:
        """Read on, and forget what lies behind; return whether there was more.

        At least doubles what lies ahead, so that a long row is scanned few times.
        """
        ahead = self.text[self.at :]
        more = self.file.read(max(self.chunk, len(ahead)))
        self.base, self.at, self.text = self.place, 0, ahead + more.decode("latin-1")
        return bool(more)

    def next_character(self) -> str:
        """Go on to a character that is not white space and return it; empty at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank  # it matches the empty text as well
            self.at = blank.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read():
                return ""


def _walk_lines(file: BinaryIO) -> "array[int]":
    """Places of the lines, blank lines at the end left out; a line is read in bounded pieces."""
    places = array("q", [file.tell()])
    last, ended = 0, True  # last: lines up to the last one that is not blank
    while piece := file.readline(LARGEST_ROW):
        if ended:
            places.append(places[-1])
        places[-1] += len(piece)
        if not piece.isspace():
            last = len(places) - 1
        ended = piece.endswith(b"\n")
    return places[: last + 1]


def _first_byte(file: BinaryIO) -> bytes:
    """Return the first byte that is not white space; leave the file behind a byte order mark."""
    file.seek(begin := 3 if file.read(3) == _BYTE_ORDER_MARK else 0)
    while (byte := file.read(1)).isspace():
        pass
    file.seek(begin)
    return byte


def _what(error: Exception) -> str:
    """Return what is wrong with JSON, without its text."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "too deeply nested" if isinstance(error, RecursionError) else "a number too long"


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
