"""Read annotation files entry by entry, and write rows in LLaVA's form.

Files are parsed incrementally, so that memory does not grow with them; what a data set stores in
two places (a question and its answers, an image and its captions) is joined by id.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeVar

from pilot_flwr.data.examples import IMAGE_MARKER
from pilot_flwr.data.json_text import Cursor, open_text, parse
from pilot_flwr.errors import DataError

SPLITS = ("train", "val", "test")

T = TypeVar("T")


class Unusable(DataError):
    """An entry cannot become a row; `reason` does not name the entry."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Sources:
    """The files to convert, and how."""

    annotations: tuple[Path, ...]
    questions: tuple[Path, ...] = ()
    split: str = "train"
    padded: bool = True
    image_prefix: str = ""

    @property
    def scored(self) -> bool:
        """True if rows have references."""
        return self.split != "train"


class Entry(NamedTuple):
    """One question, caption or box: its place in a file, its unique id, and its fields."""

    origin: str
    id: str
    fields: dict[str, Any]


Row = dict[str, Any]


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each member of a file's object."""
    return _entries(path, "an object", "{", _members)


def elements(path: Path, where: str = "") -> Iterator[dict[str, Any]]:
    """Yield the objects of a file's list, or of the list at its member `where`.

    An element that is not an object is an empty one.
    """
    if where:
        kind = f"an object with the list `{where}`"
        found = _entries(path, kind, "{", lambda cursor: _members_elements(cursor, where))
    else:
        found = _entries(path, "a list", "[", _elements)
    return map(as_fields, found)


def member(path: Path, name: str) -> Any:
    """Return one member of a file's object, without keeping the others."""
    kind = f"an object with `{name}`"
    found = _entries(path, kind, "{", lambda cursor: _members(cursor, name))
    return [value for _, value in found][0]


def as_fields(value: Any) -> dict[str, Any]:
    """Return an object of a file, or an empty one in place of anything else."""
    return dict(value) if isinstance(value, dict) else {}


def _entries(
    path: Path, kind: str, first: str, walk: Callable[[Cursor], Iterator[T]]
) -> Iterator[T]:
    """Yield the entries that `walk` finds in a file that begins with `first`, at least one."""
    found = False
    with open_text(path, str(path)) as file:
        cursor = Cursor(file, str(path), "entry", chunk=2**18)
        if cursor.next_character() != first:
            raise DataError(f"{path} must hold {kind}.")
        for entry in walk(cursor):
            found = True
            yield entry
        cursor.end("value")
    if not found:
        raise DataError(f"{path} holds no entry; it must hold {kind} with entries.")


def _members(cursor: Cursor, name: str | None = None) -> Iterator[tuple[str, Any]]:
    for number, key in enumerate(cursor.object(), start=1):
        if name is None or key == name:
            yield key, _parsed(cursor.value(number), cursor, number)
        else:
            _skip(cursor, number)


def _members_elements(cursor: Cursor, where: str) -> Iterator[Any]:
    for number, key in enumerate(cursor.object(), start=1):
        if key == where and cursor.text[cursor.at] == "[":
            yield from _elements(cursor)
        else:
            _skip(cursor, number)


def _elements(cursor: Cursor) -> Iterator[Any]:
    for number, (_, text) in enumerate(cursor.array(), start=1):
        yield _parsed(text, cursor, number)


def _skip(cursor: Cursor, number: int) -> None:
    if cursor.text[cursor.at] == "[":
        for _ in cursor.array():
            pass
    else:
        cursor.value(number)


def _parsed(text: str, cursor: Cursor, number: int) -> Any:
    return parse(text.encode("latin-1"), f"{cursor.name}, {cursor.label} {number}")[0]


def field(entry: Entry, path: str) -> str:
    """Return the text or whole number at a dotted path in an entry, as stripped text."""
    value: Any = entry.fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise Unusable(entry.origin, f"`{path}` is missing, empty or not text.")
    return str(value).strip()


def optional(entry: Entry, *paths: str) -> dict[str, str]:
    """Return the fields at those paths that the entry has, by the last name of each path."""
    found = {}
    for path in paths:
        with suppress(Unusable):
            found[path.rpartition(".")[2]] = field(entry, path)
    return found


def texts(entry: Entry, name: str, key: str = "") -> list[str]:
    """Return a list of texts in an entry, or the texts at `key` in a list of objects."""
    value = entry.fields.get(name)
    if key and isinstance(value, list):
        value = [item.get(key) if isinstance(item, dict) else None for item in value]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise Unusable(entry.origin, f"`{name}` must be a list of texts.")
    return [text.strip() for text in value]


def to_row(
    entry: Entry,
    sources: Sources,
    image: str | None,
    *,
    question: str | None = None,
    answer: str | None = None,
    references: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Row:
    """Return a row of LLaVA's form: one question and its answer, by default the entry's fields.

    At test it has references, by default the answer alone. `columns` are paths of further fields,
    left out where the entry lacks them.
    """
    answer = field(entry, "answer") if answer is None else answer
    question = field(entry, "question") if question is None else question
    for name, text in (("question", question), ("answer", answer)):
        if not text:
            raise Unusable(entry.origin, f"The {name} is empty.")
        if IMAGE_MARKER in text:
            raise Unusable(entry.origin, f"The {name} holds {IMAGE_MARKER!r}.")
    row: Row = {"id": entry.id}
    if image:
        if PureWindowsPath(image).anchor or ".." in PureWindowsPath(image).parts:
            raise Unusable(entry.origin, "The image's name is absolute or contains '..'.")
        if "\0" in image:
            raise Unusable(entry.origin, "The image's name has a NUL.")
        row["image"] = image
        question = f"{IMAGE_MARKER}\n{question}"
    row["conversations"] = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer},
    ]
    if sources.scored:
        row["references"] = list(references or [answer])
    return row | optional(entry, *columns)
