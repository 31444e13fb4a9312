"""LLaVA's JSON rows as examples, each read on demand.

A row is an object with

- ``id``: text or a number; need not be unique, as in LLaVA's own files,
- ``image``: a file in the image folder, or a list of them; absent for a row without images,
- ``conversations``: turns ``{"from": "human" | "gpt", "value": text}``, human first, gpt last,
- ``references``: optional list of reference answers for scoring.

Other fields are ignored, except that a partition may use one. Image markers (``<image>`` in a human
turn) are treated as in LLaVA-1.5's training: a turn's only marker moves to its front, on a separate
line. A row with one image and no marker gets the marker before its first question; LLaVA would
train on it without the image.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.data.examples import IMAGE_MARKER, Example, ImageSource, Turn
from pilot_flwr.data.images import Colour, ImageFile
from pilot_flwr.data.json_rows import Row, RowFile
from pilot_flwr.errors import DataError

LONGEST_ID = 256
"""In characters: an id labels errors and must not carry text."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES: dict[str, Any] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Reading:
    """How rows become examples."""

    images: Path | None = None
    prompt_suffix: str = ""
    background: Colour | None = None


class LlavaExamples(Sequence[Example]):
    """Rows of one file or several as examples.

    An example's id is unique: its row number, from 1, a colon and the row's id, with the file's
    number in front if there are several: ``2/17:000000033471``.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        reading: Reading,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.files = tuple(files)
        self.reading = reading
        self._ends = np.cumsum([len(file) for file in self.files], dtype=np.int64)
        total = int(self._ends[-1]) if self.files else 0
        self.rows = np.arange(total, dtype=np.int64) if rows is None else rows
        assert self.rows.size == 0 or 0 <= self.rows.min() <= self.rows.max() < total

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        """Return one example, or those of a slice."""
        if isinstance(position, slice):
            return [self[n] for n in range(*position.indices(len(self)))]
        index, number = self.place(position)
        file = self.files[index]
        label = f"{number + 1}:" if len(self.files) == 1 else f"{index + 1}/{number + 1}:"
        return to_example(file[number], label, file.origin(number), self.reading)

    def select(self, positions: NDArray[np.int64]) -> "LlavaExamples":
        """Return the examples at the given positions."""
        return LlavaExamples(self.files, self.reading, self.rows[positions])

    def row(self, position: int) -> Row:
        """Return the raw row of an example."""
        index, number = self.place(position)
        found: Row = self.files[index][number]
        return found

    def origin(self, position: int) -> str:
        """Return file and row of an example as errors name them."""
        index, number = self.place(position)
        return self.files[index].origin(number)

    def place(self, position: int) -> tuple[int, int]:
        """Return the index of an example's file and its row number there, both from 0."""
        row = int(self.rows[position])
        index = int(np.searchsorted(self._ends, row, side="right"))
        return index, row - (int(self._ends[index - 1]) if index else 0)


def to_example(row: Row, label: str, origin: str, reading: Reading) -> Example:
    """Return a row as an example."""
    images = _images(row, origin, reading)
    turns = _turns(row, origin)
    if len(images) == 1 and turns and not any(IMAGE_MARKER in turn.text for turn in turns):
        turns[0] = turns[0]._replace(text=f"{IMAGE_MARKER}\n{turns[0].text}")
    return Example(
        id=label + _id(row, origin),
        images=images,
        turns=tuple(_prompt(turn, reading) if turn.role == "user" else turn for turn in turns),
        references=_references(row, origin),
        origin=origin,
    )


def _id(row: Row, origin: str) -> str:
    found = row.get("id")
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        raise DataError(f"{origin}: `id` is missing, or neither text nor a whole number.")
    text = str(found)
    if len(text) > LONGEST_ID or not text.isprintable():
        raise DataError(f"{origin}: `id` must be printable and of at most {LONGEST_ID} characters.")
    return text


def _images(row: Row, origin: str, reading: Reading) -> tuple[ImageSource, ...]:
    found = row.get("image")
    names = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{origin}: `image` must be a file's name or a list of them.")
    if names and reading.images is None:
        raise DataError(f"{origin} has an image, but no image folder is configured.")
    folder = reading.images or Path()
    return tuple(
        ImageFile(folder, name, f"{origin}, image {number}", reading.background)
        for number, name in enumerate(names, start=1)
    )


def _turns(row: Row, origin: str) -> list[Turn]:
    found = row.get("conversations")
    if not isinstance(found, list) or not found:
        raise DataError(f"{origin}: `conversations` is missing or not a list of turns.")
    turns = []
    for number, turn in enumerate(found, start=1):
        where = f"{origin}: turn {number} of `conversations`"
        if not isinstance(turn, dict) or not _is_text(turn.get("value")):
            raise DataError(f"{where} must be an object with a text in `value`.")
        if turn.get("from") not in ("human", "gpt"):
            raise DataError(f"{where}: `from` must be human or gpt.")
        turns.append(Turn(_ROLES[turn["from"]], turn["value"]))
    return turns


def _is_text(value: Any) -> bool:
    """Return whether a tokenizer accepts a value: JSON can escape an unpaired surrogate."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _prompt(turn: Turn, reading: Reading) -> Turn:
    """Move a user turn's only image marker to the front and append the prompt suffix."""
    text = turn.text
    if text.count(IMAGE_MARKER) == 1:
        text = f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()
    if reading.prompt_suffix and text.strip() and not text.endswith(reading.prompt_suffix):
        text = f"{text}\n{reading.prompt_suffix}"
    return turn._replace(text=text)


def _references(row: Row, origin: str) -> tuple[str, ...]:
    found = row.get("references", [])
    if not isinstance(found, list) or not all(map(_is_text, found)):
        raise DataError(f"{origin}: `references` must be a list of texts.")
    return tuple(found)
