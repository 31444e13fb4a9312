"""Annotation files read entry by entry, and rows in LLaVA's form.

Files are parsed incrementally, so that memory does not grow with them; what a data set keeps in two
places (a question and its answers, an image and its captions) is joined by id.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ijson

from pilot_flwr.data.examples import IMAGE_MARKER
from pilot_flwr.errors import DataError

SPLITS = ("train", "val", "test")


class Unusable(DataError):
    """An entry cannot become a row; `reason` is why, without saying which entry."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Sources:
    """What is converted."""

    annotations: tuple[Path, ...]
    questions: tuple[Path, ...] = ()
    split: str = "train"
    padded: bool = True
    image_prefix: str = ""

    @property
    def scored(self) -> bool:
        """Whether rows have references."""
        return self.split != "train"


class Entry(NamedTuple):
    """One question, caption or box: where it stands, its unique id, and its fields."""

    origin: str
    id: str
    fields: dict[str, Any]


Row = dict[str, Any]


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each member of the object that a file holds."""
    return _parsed(path, "an object", "start_map", lambda file: ijson.kvitems(file, "", **_FLOATS))


def elements(path: Path, *where: str) -> Iterator[Any]:
    """Yield the elements of the list at the member `where` of a file, or of its outermost list."""
    place = ".".join((*where, "item"))
    kind = f"an object with the list `{'.'.join(where)}`" if where else "a list"
    first = "start_map" if where else "start_array"
    return _parsed(path, kind, first, lambda file: ijson.items(file, place, **_FLOATS))


def member(path: Path, name: str) -> Any:
    """Return one member of the object that a file holds, without keeping the others."""
    kind = f"an object with `{name}`"
    return next(_parsed(path, kind, "start_map", lambda file: ijson.items(file, name, **_FLOATS)))


def as_fields(value: Any) -> dict[str, Any]:
    """Return an object of a file, or an empty one in place of anything else."""
    return dict(value) if isinstance(value, dict) else {}


_FLOATS: dict[str, Any] = {"use_float": True}


def _parsed(path: Path, kind: str, first: str, parse: Any) -> Iterator[Any]:
    found = False
    try:
        with open(path, "rb") as file:
            if next(ijson.basic_parse(file))[0] != first:
                raise DataError(f"{path} must hold {kind}.")
            file.seek(0)
            for item in parse(file):
                found = True
                yield item
    except (ijson.JSONError, UnicodeDecodeError, StopIteration) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if not found:
        raise DataError(f"{path} holds no entry; it must hold {kind} with entries.")


def field(entry: Entry, *where: str) -> str:
    """Return a text or whole number among an entry's fields, as text without blanks around."""
    value: Any = entry.fields
    for name in where:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise Unusable(entry.origin, f"`{'.'.join(where)}` is missing, empty or not text.")
    return str(value).strip()


def optional(entry: Entry, **columns: tuple[str, ...]) -> dict[str, str]:
    """Return those columns, each from a field, that the entry has."""
    found = {}
    for name, where in columns.items():
        try:
            found[name] = field(entry, *where)
        except Unusable:
            continue
    return found


def texts(entry: Entry, name: str, key: str = "") -> list[str]:
    """Return a list of texts among an entry's fields, or of objects' `key`."""
    value = entry.fields.get(name)
    if key and isinstance(value, list):
        value = [item.get(key) if isinstance(item, dict) else None for item in value]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise Unusable(entry.origin, f"`{name}` must be a list of texts.")
    return [text.strip() for text in value]


def most_common(answers: Sequence[str]) -> str:
    """Return the answer that most annotators gave; of several, the one that came first."""
    return Counter(answers).most_common(1)[0][0]


def to_row(
    entry: Entry,
    image: str | None,
    question: str,
    answer: str,
    references: Sequence[str] | None = None,
    columns: dict[str, str] | None = None,
) -> Row:
    """Return a row of LLaVA's form: one question and its answer."""
    for name, text in (("question", question), ("answer", answer)):
        if not text:
            raise Unusable(entry.origin, f"The {name} is empty.")
        if IMAGE_MARKER in text:
            raise Unusable(entry.origin, f"The {name} holds {IMAGE_MARKER!r}.")
    human = f"{IMAGE_MARKER}\n{question}" if image else question
    row: Row = {"id": entry.id}
    if image:
        row["image"] = image
    row["conversations"] = [
        {"from": "human", "value": human},
        {"from": "gpt", "value": answer},
    ]
    if references is not None:
        row["references"] = list(references)
    return row | (columns or {})
