"""Read the rows of a JSON array or a JSONL file one at a time, in constant memory.

One pass indexes the file, at eight bytes a row; a row is read on demand. Rows count from 1 in every
error, like lines in an editor.

The pass decodes the file as Latin-1, where a character is a byte, so that offsets in the text are
offsets in the file: JSON's structure is ASCII, and UTF-8 has no ASCII byte inside a character. Rows
themselves are decoded as UTF-8.
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
"""Longest row in bytes (16 MiB)."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 2**22
_MARGIN = 16  # an error this close to the window's end may be a truncated token
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class RowFile(Sequence[Row]):
    """The rows of one file, by number from 0.

    Errors have only the file's base name, as they may leave this machine. A file that has changed
    since it was opened is refused.
    """

    def __init__(self, path: Path, *, chunk: int = _CHUNK) -> None:
        self.path = path
        self.name = path.name
        self.stamp: tuple[int, int] | None = None
        with self._open() as file:
            self.stamp = _stamp(file)
            first = _first_byte(file)
            self.is_array = first == b"["
            if first not in (b"[", b"{"):
                found = "begins with something else" if first else "is empty"
                raise DataError(
                    f"{self.name} {found} but must be a JSON array, '[...]', or JSONL, '{{...}}'."
                )
            # Offsets of the rows, then the end of the last one.
            self._offsets = self._scan_array(file, chunk) if self.is_array else _scan_lines(file)

    def __len__(self) -> int:
        return len(self._offsets) - 1

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

    def origin(self, number: int) -> str:
        """Return a row's name in errors: ``train.json, row 17`` for number 16."""
        return f"{self.name}, row {number + 1}"

    def _read(self, file: BinaryIO, number: int) -> Row:
        start, end = self._offsets[number], self._offsets[number + 1]
        if end - start > LARGEST_ROW:
            raise DataError(f"{self.origin(number)} has more than {LARGEST_ROW} bytes.")
        file.seek(start)
        try:
            text = file.read(end - start).decode("utf-8")
            row, stop = _DECODER.raw_decode(text)
        except UnicodeDecodeError:
            raise DataError(f"{self.origin(number)} is not UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.origin(number)} is broken JSON ({_reason(error)}).") from None
        if not self.is_array and text[stop:].strip():
            raise DataError(f"{self.origin(number)} has more than one JSON value on its line.")
        if not isinstance(row, dict):
            raise DataError(f"{self.origin(number)} is not a JSON object.")
        return row

    def _open(self) -> BinaryIO:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.name} cannot be opened ({error.strerror}).") from None
        if self.stamp not in (None, _stamp(file)):
            file.close()
            raise DataError(f"{self.name} has changed since it was opened; restart the run.")
        return file

    def _scan_array(self, file: BinaryIO, chunk: int) -> "array[int]":
        cursor = _Cursor(file, chunk)
        cursor.next_character()
        cursor.at += 1  # the bracket
        starts, end = array("q"), cursor.offset
        following = cursor.next_character()
        while following != "]":
            starts.append(cursor.offset)
            cursor.at = self._row_end(cursor, len(starts))
            end, following = cursor.offset, cursor.next_character()
            if following == ",":
                cursor.at += 1
                following = cursor.next_character()
                if following == "]":
                    raise self._broken(len(starts) + 1, cursor.offset, "a comma, but no row")
            elif following != "]":
                reason = "no comma before it" if following else "the file ends without a ']'"
                raise self._broken(len(starts) + 1, cursor.offset, reason)
        cursor.at += 1
        if cursor.next_character():
            raise DataError(f"{self.name} continues after its array, at byte {cursor.offset}.")
        starts.append(end)
        return starts

    def _row_end(self, cursor: "_Cursor", row: int) -> int:
        """Return the end in the window of the value at the cursor, reading more as needed."""
        while True:
            try:
                value, end = _DECODER.raw_decode(cursor.text, cursor.at)
            except json.JSONDecodeError as error:
                offset = cursor.base + error.pos
                cut = error.pos >= len(cursor.text) - _MARGIN
                cut |= error.msg.startswith("Unterminated string")
                if cut and len(cursor.text) - cursor.at <= LARGEST_ROW and cursor.read():
                    continue
                raise self._broken(row, offset, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self._broken(row, cursor.offset, _reason(error)) from None
            if not isinstance(value, dict):
                raise self._broken(row, cursor.offset, "not a JSON object")
            return end

    def _broken(self, row: int, offset: int, reason: str) -> DataError:
        return DataError(
            f"{self.name}, row {row} is broken JSON at byte {offset} ({reason}), so that the rest "
            "of the array cannot be read."
        )


@functools.lru_cache(maxsize=64)
def _open_rows(path: str, size: int, changed: int) -> RowFile:
    return RowFile(Path(path))


def open_rows(path: Path) -> RowFile:
    """Open a file of rows; an unchanged file is scanned once per process."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path.name} cannot be opened ({error.strerror}).") from None
    if not path.is_file():
        raise DataError(f"{path.name} is not a file.")
    return _open_rows(str(path), status.st_size, status.st_mtime_ns)


class _Cursor:
    """A cursor at position `at` of a window in memory, `text`, which begins at byte `base`."""

    def __init__(self, file: BinaryIO, chunk: int) -> None:
        self.file, self.chunk = file, chunk
        self.base, self.at, self.text = file.tell(), 0, ""

    @property
    def offset(self) -> int:
        """Byte offset of the cursor in the file."""
        return self.base + self.at

    def read(self) -> bool:
        """Drop the text before the cursor and read more; return false at the end of the file.

        The window at least doubles, so that a long row is scanned few times.
        """
        ahead = self.text[self.at :]
        more = self.file.read(max(self.chunk, len(ahead)))
        self.base, self.at, self.text = self.offset, 0, ahead + more.decode("latin-1")
        return bool(more)

    def next_character(self) -> str:
        """Advance to the next character that is not white space and return it, "" at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank  # it matches the empty text as well
            self.at = blank.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read():
                return ""


def _scan_lines(file: BinaryIO) -> "array[int]":
    """Return the offsets of the lines, without trailing blank ones; read in bounded pieces."""
    offsets = array("q", [file.tell()])
    last, ended = 0, True  # last: lines up to the last one that is not blank
    while piece := file.readline(LARGEST_ROW):
        if ended:
            offsets.append(offsets[-1])
        offsets[-1] += len(piece)
        if not piece.isspace():
            last = len(offsets) - 1
        ended = piece.endswith(b"\n")
    return offsets[: last + 1]


def _first_byte(file: BinaryIO) -> bytes:
    """Return the first byte that is not white space, and seek past a byte order mark."""
    file.seek(begin := 3 if file.read(3) == _BYTE_ORDER_MARK else 0)
    while (byte := file.read(1)).isspace():
        pass
    file.seek(begin)
    return byte


def _reason(error: Exception) -> str:
    """Describe a JSON error without quoting the text."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "too deeply nested" if isinstance(error, RecursionError) else "a number too long"


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
