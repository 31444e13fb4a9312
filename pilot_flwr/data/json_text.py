"""Read JSON files value by value, in constant memory: the rules for rows and for annotations.

`open_text` opens a file as UTF-8; its errors say what a file is that is not JSON. `Cursor` walks
through the text.

The cursor decodes the file as Latin-1, where a character is a byte, so that offsets in the text are
offsets in the file: JSON's structure is ASCII, and UTF-8 has no ASCII byte inside a character.
Values themselves are decoded as UTF-8 by `parse`.
"""

import codecs
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pilot_flwr.errors import DataError

LARGEST_VALUE = 2**24
"""Longest row or annotation in bytes (16 MiB)."""

CHUNK = 2**22

_HEAD = 2**16
_MARGIN = 16  # an error this close to the window's end may be a truncated token
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_UNPACK = "unpack it and name the file in it"

_SIGNATURES = {
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"PK\x05\x06": ("an empty zip archive", "name the file of the rows"),
    b'\x04"M\x18': ("compressed with lz4", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed with xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with zstandard", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"Rar!": ("a rar archive", _UNPACK),
    b"PAR1": ("a parquet file", "write its rows as JSON"),
    b"ARROW1": ("an Arrow file", "write its rows as JSON"),
    b"\xff\xff\xff\xff": ("an Arrow file", "write its rows as JSON"),
    b"FEA1": ("a Feather file", "write its rows as JSON or parquet"),
    b"\x89HDF": ("an HDF5 file", "write its rows as JSON"),
    b"\x93NUMPY": ("a NumPy array", "write its rows as JSON"),
    b"SQLite format": ("a SQLite database", "write its rows as JSON"),
    b"Obj\x01": ("an Avro file", "write its rows as JSON"),
    b"%PDF": ("a PDF file", "name the file of the rows"),
    b"\x89PNG": ("an image", "name the file of the rows"),
    b"\xff\xd8\xff": ("an image", "name the file of the rows"),
    b"version https://git-lfs": ("a git-lfs pointer", "run `git lfs pull`"),
    **{
        bytes([0x80, version]): ("a Python pickle, which is never loaded", "write it as JSON")
        for version in (2, 3, 4, 5)
    },
}
"""Signatures of files that are not JSON, each with a description and a remedy."""

_TEXTS = (
    (r"<!doctype html|<html|<head|<body", "an HTML page", "download the file again"),
    (r"<", "XML", "write its rows as JSON"),
    (r"//|/\*|#", "text that begins with a comment", "remove the comments"),
    (r"(var|let|const|export|module|window)\b", "JavaScript", "keep only the array"),
    (r"[(']", "Python's notation", "write the rows with `json.dump`"),
    (r'"?[\w ]+"?[,;\t]', "a table in text form (CSV)", "write its rows as JSON"),
    (r"---|- |\w+:\s", "YAML", "write the rows as JSON"),
    (r'"', "a JSON string, perhaps rows encoded twice", "write the rows themselves"),
)
"""Beginnings of text that is neither an array nor an object, with descriptions and remedies."""

_HINTS = (
    (r"'", "a single quote, as Python prints strings; write the rows with `json.dump`"),
    (r"//|/\*|#", "a comment, which JSON does not allow"),
    (r"(True|False|None)\b", "Python's notation; write the rows with `json.dump`"),
    (r"\xe2\x80[\x98-\x9f]|[\u2018-\u201f]", "a typographic quotation mark"),
)
"""Common mistakes at the position where the parser stops."""


def open_text(path: Path, name: str) -> BinaryIO:
    """Open a JSON file as UTF-8, after any byte order mark.

    Gzip, UTF-16, UTF-32 and CR line endings are converted in an anonymous temporary file, which is
    deleted when it is closed.

    Raises
    ------
    DataError
        The file cannot be read or is not JSON.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{name} cannot be opened ({error.strerror}).") from None
    try:
        text = _as_utf8(file, name)
        text.seek(3 if text.read(3) == codecs.BOM_UTF8 else 0)
        _check_begin(text, name)
    except BaseException:
        file.close()
        raise
    if text is not file:
        file.close()
    return text


def _as_utf8(file: BinaryIO, name: str) -> BinaryIO:
    head, stream = file.read(_HEAD), file
    file.seek(0)
    try:
        if packed := head.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
            head = stream.read(_HEAD)
            stream.seek(0)
        _check_signature(head, name)
        encoding = json.detect_encoding(head)
        wide = encoding if not encoding.startswith("utf-8") else ""
        # JSON strings cannot contain control characters, so these are line endings.
        returns = not wide and b"\r" in head and b"\n" not in head
        if not (packed or wide or returns):
            return file
        return _copy(stream, wide, returns)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{name} is a gzip file that is truncated or damaged.") from None
    except UnicodeDecodeError:
        raise DataError(f"{name} is binary data or broken {encoding.upper()}, not JSON.") from None
    except OSError as error:
        raise DataError(
            f"{name} cannot be converted into a temporary file ({error.strerror})."
        ) from None


def _copy(stream: BinaryIO, encoding: str, returns: bool) -> BinaryIO:
    decoder = codecs.getincrementaldecoder(encoding)() if encoding else None
    copy: BinaryIO = tempfile.TemporaryFile()
    try:
        more = True
        while more:
            chunk = stream.read(CHUNK)
            more = bool(chunk)
            if decoder is not None:
                text = decoder.decode(chunk, final=not more)
                returns = returns or ("\r" in text and "\n" not in text)
                chunk = text.encode()
            copy.write(chunk.replace(b"\r", b"\n") if returns else chunk)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _check_signature(head: bytes, name: str) -> None:
    for signature, (kind, remedy) in _SIGNATURES.items():
        if head.startswith(signature):
            raise DataError(f"{name} is {kind}, not JSON: {remedy}.")
    if head[257:262] == b"ustar":
        raise DataError(f"{name} is a tar archive, not JSON: {_UNPACK}.")


def _check_begin(text: BinaryIO, name: str) -> None:
    """Raise unless a text begins with an array or an object; keep its position."""
    start = text.tell()
    head = text.read(_HEAD)
    text.seek(start)
    begin = head.lstrip()[:256].decode("latin-1")
    if not head:
        raise DataError(f"{name} is empty; it must be JSON.")
    if not begin and len(head) < _HEAD:
        raise DataError(f"{name} has only white space; it must be JSON.")
    if begin.startswith(("[", "{")) or not begin:
        return
    if re.search(r"[\0-\x08\x0e-\x1f]", begin):
        raise DataError(f"{name} is binary data, not JSON.")
    for pattern, kind, remedy in _TEXTS:
        if re.match(pattern, begin, re.IGNORECASE):
            raise DataError(f"{name} is {kind}, not JSON: {remedy}.")
    raise DataError(f"{name} must be JSON, but begins with neither '[' nor '{{'.")


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return found


_UNIQUE_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse(data: bytes, origin: str) -> tuple[Any, str]:
    """Return the JSON value at the start of UTF-8 data, and the text after it.

    Raises `DataError` for broken JSON and for duplicate keys.
    """
    text = ""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # as of a concatenated file
        value, end = _UNIQUE_DECODER.raw_decode(text, _BLANK.match(text).end())  # type: ignore
    except UnicodeDecodeError:
        raise DataError(
            f"{origin} is not UTF-8; if its file is in Latin-1 or Windows-1252, convert it: "
            "`iconv -f WINDOWS-1252 -t UTF-8`."
        ) from None
    except _DuplicateKey as error:
        raise DataError(f"{origin} has the key {_short(error.args[0])} twice.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is broken JSON ({reason(error, text)}).") from None
    return value, text[end:]


def _short(key: str) -> str:
    return repr(key if len(key) <= 40 else f"{key[:40]}…")


def reason(error: Exception, text: str) -> str:
    """Describe a JSON error without quoting the text."""
    if not isinstance(error, json.JSONDecodeError):
        return "too deeply nested" if isinstance(error, RecursionError) else "a number too long"
    before, rest = text[: error.pos].rstrip()[-1:], text[error.pos : error.pos + 99].lstrip()
    for pattern, hint in _HINTS:
        if re.match(pattern, rest):
            return hint
    if before == "," and rest.startswith(("]", "}")):
        return "a comma before the closing bracket; remove it"
    if error.msg.startswith("Invalid control character"):
        return "a line break or other control character inside a string; write it as \\n"
    return error.msg


class Cursor:
    """A cursor at position `at` of a window in memory, `text`, which begins at byte `base`.

    `label` names the values of the file's list in errors, each by its number from 1.
    """

    def __init__(self, file: BinaryIO, name: str, label: str, chunk: int = CHUNK) -> None:
        self.file, self.name, self.label, self.chunk = file, name, label, chunk
        self.base, self.at, self.text = file.tell(), 0, ""

    @property
    def offset(self) -> int:
        """Byte offset of the cursor in the file."""
        return self.base + self.at

    def read(self) -> bool:
        """Drop the text before the cursor and read more; return false at the end of the file.

        The window at least doubles, so that a long value is scanned few times.
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

    def array(self) -> Iterator[tuple[int, str]]:
        """Walk through the array at the cursor; yield each value's byte offset and its text."""
        for number in self._items("]"):
            start = self.offset
            yield start, self.value(number)

    def object(self) -> Iterator[str]:
        """Walk through the object at the cursor; yield each key.

        The cursor is then at its value, which the caller has to read: with `value` or `array`.
        """
        seen: set[str] = set()
        for number in self._items("}"):
            if self.text[self.at : self.at + 1] != '"':
                raise self.broken(number, self.offset, "no key in double quotes")
            place = f"{self.name}, {self.label} {number}"
            key = parse(self.value(number).encode("latin-1"), place)[0]
            if key in seen:
                raise DataError(f"{self.name} has the key {_short(key)} twice.")
            seen.add(key)
            if self.next_character() != ":":
                raise self.broken(number, self.offset, "no colon after its key")
            self.at += 1
            if not self.next_character():
                raise self.broken(number, self.offset, "the file ends before its value")
            yield key

    def end(self, kind: str) -> None:
        """Raise unless only white space follows."""
        if self.next_character():
            raise DataError(
                f"{self.name} continues after its {kind}, at byte {self.offset}; put all into one "
                "array, or each row on a line."
            )

    def _items(self, close: str) -> Iterator[int]:
        self.at += 1
        number, following = 0, self.next_character()
        while following != close:
            number += 1
            yield number
            following = self.next_character()
            if following == ",":
                self.at += 1
                following = self.next_character()
                if following == close:
                    raise self.broken(number + 1, self.offset, "a trailing comma; remove it")
            elif following != close:
                found = "no comma before it" if following else f"the file ends without a '{close}'"
                raise self.broken(number + 1, self.offset, found)
        self.at += 1

    def value(self, number: int) -> str:
        """Move past the value at the cursor and return its text, reading more as needed."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                offset, why = self.base + error.pos, reason(error, self.text)
                cut = error.pos >= len(self.text) - _MARGIN
                cut |= error.msg.startswith("Unterminated string")
                if cut and len(self.text) - self.at <= LARGEST_VALUE and self.read():
                    continue
                raise self.broken(number, offset, why) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(number, self.offset, reason(error, "")) from None
            if end == len(self.text) and self.read():
                continue  # a number may be cut
            text, self.at = self.text[self.at : end], end
            return text

    def broken(self, number: int, offset: int, why: str) -> DataError:
        """Build the error for a broken value, after which nothing can be read."""
        return DataError(
            f"{self.name}, {self.label} {number} is broken JSON at byte {offset} ({why}), so that "
            "the rest cannot be read."
        )
