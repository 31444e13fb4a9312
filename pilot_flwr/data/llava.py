"""Read the rows of LLaVA and chat data sets as examples, on demand.

A row is an object with

- ``id``: optional text or number; need not be unique, as in LLaVA's own files,
- ``image`` or ``images``: a file in the image folder, an image in the row itself, or a list of
  them; absent for text-only rows,
- a conversation, in one of the forms of `pilot_flwr.data.turns`,
- ``references``: optional list of reference answers for scoring.

Other fields are ignored (a partition may use one), but a field that holds an image or another
medium is an error. Image markers (``<image>`` in a question) are treated as in LLaVA-1.5's
training: a turn's only marker moves to its front, on a separate line. A row with one image and no
marker gets the marker before its first question; LLaVA would train on it without the image.
"""

import base64
import hashlib
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
from pilot_flwr.data.media import REMEDY, unread_field
from pilot_flwr.data.turns import is_text, kind_of, read_conversation
from pilot_flwr.errors import DataError

LONGEST_ID = 256
"""In characters: an id labels errors and must not carry text."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:(//|image/)", re.IGNORECASE)
_DATA_ADDRESS = re.compile(r"data:image/[\w.+-]+(;[\w=.+-]+)*;base64,", re.IGNORECASE)
_IMAGES = ("image", "images")
_KNOWN = (*_IMAGES, "id", "conversations", "messages", "prompt", "completion", "text", "references")
_UNTRAINED = ("system", "system_prompt", "system_message", "tools", "functions", "history")
"""Fields that other tools put into the prompt."""
_WEIGHTS = ("weight", "sample_weight", "loss_weight", "loss_mask", "loss_scale")
"""Fields by which other tools weight a row in the loss."""


@dataclass(frozen=True)
class Reading:
    """How rows become examples."""

    images: Path | None = None
    prompt_suffix: str = ""
    background: Colour | None = None
    official: bool = False
    linked_folders: tuple[Path, ...] = ()


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
        label = f"{file.row_number(number)}:"
        if len(self.files) > 1:
            label = f"{index + 1}/{label}"
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

    def digest(self, settings: str) -> str:
        """Return a digest of the files, the selected rows, how they are read, and `settings`."""
        files = [(str(file.path), file.stamp) for file in self.files]
        text = f"{files}/{self.reading}/{settings}/".encode()
        return hashlib.sha256(text + self.rows.tobytes()).hexdigest()

    def place(self, position: int) -> tuple[int, int]:
        """Return the index of an example's file and its row number there, both from 0."""
        row = int(self.rows[position])
        index = int(np.searchsorted(self._ends, row, side="right"))
        return index, row - (int(self._ends[index - 1]) if index else 0)


def to_example(
    row: Row, label: str, origin: str, reading: Reading, *, answered: bool = True
) -> Example:
    """Return a row as an example; unless `answered`, its last question may lack an answer."""
    lost = unread_field(row, _KNOWN, pictures=any(row.get(key) for key in _IMAGES))
    if lost:
        raise DataError(f"{origin}: `{lost}` is not read. {REMEDY}; remove what is not needed.")
    if lost := next((name for name in _UNTRAINED if row.get(name)), None):
        remedy = "write its turns into the conversation" if lost == "history" else "remove it"
        raise DataError(
            f"{origin}: `{lost}` is not read; {remedy}. `model.system_prompt` sets a system "
            "prompt for all rows."
        )
    for name in _WEIGHTS:
        if isinstance(row.get(name), int | float | list) and row[name] != 1:
            raise DataError(
                f"{origin}: `{name}` is not supported: every row is trained on, with weight 1. "
                "Remove the field, or the row."
            )
    found = read_conversation(row, origin, answered=answered)
    images = _images(row, found.pictures, origin, reading)
    turns = found.turns
    if len(images) == 1 and not any(IMAGE_MARKER in turn.text for turn in turns):
        turns[0] = turns[0]._replace(text=f"{IMAGE_MARKER}\n{turns[0].text}")
    return Example(
        id=_id(row, label, origin),
        images=images,
        turns=tuple(_prompt(turn, reading) if turn.role == "user" else turn for turn in turns),
        references=_references(row, origin),
        origin=origin,
        fields=tuple(found.fields),
    )


def row_id(row: Row) -> Any:
    """Return a row's `id`, or the `question_id` of LLaVA's evaluation files, or None."""
    return row["id"] if row.get("id") is not None else row.get("question_id")


def _id(row: Row, label: str, origin: str) -> str:
    found = row_id(row)
    if found is None:  # the row's number is enough
        return label.removesuffix(":")
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        raise DataError(f"{origin}: `id` is neither text nor a whole number; it may be omitted.")
    text = str(found)
    if len(text) > LONGEST_ID or not text.isprintable():
        raise DataError(f"{origin}: `id` must be printable and of at most {LONGEST_ID} characters.")
    return label + text


def _images(
    row: Row, pictures: list[tuple[str, Any]], origin: str, reading: Reading
) -> tuple[ImageSource, ...]:
    """Return the images of a row: its own, in order, or those of its messages' parts."""
    keys = [key for key in _IMAGES if row.get(key) not in (None, [])]
    if len(keys) > 1:
        raise DataError(f"{origin} has both `image` and `images`; remove one.")
    marks = [(field, n) for field, n in pictures if n is None or isinstance(n, int)]
    for place, (field, number) in enumerate(marks):
        if number is not None and number != place:
            raise DataError(
                f"{origin}: `{field}` must be {place}: parts use the row's images in order."
            )
    found = [(field, value) for field, value in pictures if (field, value) not in marks]
    if found and (keys or marks):
        raise DataError(f"{origin} has images both in `{found[0][0]}` and in `images`.")
    for key in keys:
        values = row[key] if isinstance(row[key], list) else [row[key]]
        found = [(key, value) for value in values]
    return tuple(
        _source(value, field, f"{origin}, image {number}", origin, reading)
        for number, (field, value) in enumerate(found, start=1)
    )


def _source(value: Any, field: str, name: str, origin: str, reading: Reading) -> ImageSource:
    """Return one image of a row; errors call it `name`."""
    if isinstance(value, dict) and field.endswith("image_url"):
        value = value.get("url")
    data = _embedded(value, field, name)
    if isinstance(value, dict):
        value = value.get("path")
    if data is not None:
        value = value if isinstance(value, str) and len(value) <= LONGEST_ID else ""
    elif not isinstance(value, str):
        raise DataError(
            f"{origin}: `{field}` has {kind_of(value)} but must be a file's name, an object with "
            "`bytes` or `path`, or a list of them."
        )
    elif _ADDRESS.match(value):
        raise DataError(
            f"{name} is a URL (`{field}`), which is not read: save the image in the image folder "
            "and write its file name."
        )
    elif reading.images is None:
        raise DataError(f"{origin} has an image, but no image folder is configured.")
    folder, linked = reading.images or Path(), reading.linked_folders
    return ImageFile(folder, value, name, reading.background, reading.official, linked, data)


def _embedded(value: Any, field: str, name: str) -> bytes | memoryview | None:
    """Return the bytes of an image embedded in a row (base64 in JSON), or None."""
    found = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(found, bytes | memoryview):
        return found
    if isinstance(value, str):
        match = _DATA_ADDRESS.match(value)
        if not (match or field.endswith("base64")):
            return None
        found = value[match.end() :] if match else value
    elif found is None or not isinstance(value, dict):
        return None
    try:
        if isinstance(found, list):  # some tools write bytes as a list of numbers
            return bytes(found)
        return base64.b64decode(re.sub(r"\s", "", found), validate=True)
    except (ValueError, TypeError):
        raise DataError(f"{name} (`{field}`) has bytes that are not base64.") from None


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
    if not isinstance(found, list) or not all(map(is_text, found)):
        raise DataError(f"{origin}: `references` must be a list of texts.")
    return tuple(found)
