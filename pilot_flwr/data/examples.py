"""The common form of instruction-tuning examples from files and generators.

To add a data source, return a sequence of `Example` and add a row to `federation.SOURCES`.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from pilot_flwr.data.images import ImageFile
from pilot_flwr.errors import DataError
from pilot_flwr.formatting import count

IMAGE_MARKER = "<image>"
"""Placeholder of an image in a turn's text, as in LLaVA's JSON files."""


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    text: str


class KeptImage(NamedTuple):
    """An image in memory."""

    image: Image.Image

    def read(self) -> Image.Image:
        """Return the image in RGB, as the model sees it."""
        return self.image.convert("RGB")

    def size(self) -> tuple[int, int]:
        """Return (height, width) of what `read` returns."""
        return self.image.height, self.image.width

    def identity(self) -> str:
        """Return a hash of the pixels as a key."""
        size = f"{self.image.mode} {self.image.size} ".encode()
        return hashlib.sha256(size + self.image.tobytes()).hexdigest()


ImageSource = KeptImage | ImageFile


@dataclass(frozen=True)
class Example:
    """A conversation about no image, one image, or several."""

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    origin: str = ""
    fields: tuple[str, ...] = ()
    """The turns' fields in the file, such as ``messages[0].content``."""

    def __post_init__(self) -> None:
        for number, turn in enumerate(self.turns, start=1):
            role = "user" if number % 2 else "assistant"
            where = f"{self.name}: {self.field(number - 1)}"
            if turn.role != role:
                raise DataError(f"{where} is {turn.role!r} but must be {role!r}.")
            if not turn.text.strip():
                raise DataError(f"{where} is empty.")
            if role == "assistant" and IMAGE_MARKER in turn.text:
                raise DataError(f"{where} is an answer but holds an image marker.")
        if len(self.turns) < 2 or len(self.turns) % 2:
            raise DataError(f"{self.name} must end with an assistant turn.")
        markers = sum(turn.text.count(IMAGE_MARKER) for turn in self.turns)
        if markers != len(self.images):
            raise DataError(
                f"{self.name} has {count(markers, 'image marker')} ({IMAGE_MARKER}) but "
                f"{count(len(self.images), 'image')}."
            )

    def field(self, turn: int) -> str:
        """Return the name of a turn in errors; `turn` counts from 0."""
        return f"`{self.fields[turn]}`" if self.fields else f"turn {turn + 1}"

    @property
    def name(self) -> str:
        """Name of this example in errors: its file and row; a row's id never leaves a site."""
        return self.origin or f"Generated example {self.id!r}"

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All turns but the last, from which generation starts."""
        return self.turns[:-1]

    @property
    def answers(self) -> tuple[str, ...]:
        """References for evaluation, at least one."""
        return self.references or (self.turns[-1].text,)
