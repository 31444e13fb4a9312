"""The one shape of an instruction-tuning example, whatever file or generator it comes from.

To add a data source, return a sequence of `Example`; nothing else in the package changes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from PIL import Image

from pilot_flwr.errors import DataError

IMAGE_MARKER = "<image>"
"""Where an image stands in a turn's text, as in LLaVA's JSON files."""


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    text: str


class ImageSource(Protocol):
    """An image that is read when it is needed, and not before."""

    def read(self) -> Image.Image:
        """Return the decoded RGB image, as the model is to see it."""
        ...

    def size(self) -> tuple[int, int]:
        """Return (height, width) of what `read` gives, without decoding the image."""
        ...

    def identity(self) -> str | None:
        """Return what tells this image from all others on this machine, None if nothing does."""
        ...


class KeptImage(NamedTuple):
    """An image that is in memory."""

    image: Image.Image

    def read(self) -> Image.Image:
        """Return the image in RGB."""
        return self.image.convert("RGB")

    def size(self) -> tuple[int, int]:
        """Return (height, width)."""
        return self.image.height, self.image.width

    def identity(self) -> None:
        """Return nothing: an image in memory has no name."""


@dataclass(frozen=True)
class Example:
    """A conversation about no image, one image, or several.

    Parameters
    ----------
    id : str
        Unique within the client's split; errors name it.
    images : tuple of ImageSource
        In the order of the markers.
    turns : tuple of Turn
        User and assistant alternate, the user begins and the assistant ends. The user's turns
        hold as many `IMAGE_MARKER` as there are images, the assistant's none.
    references : tuple of str
        Answers that the last one is scored against; if empty, the last turn is the only one.
    origin : str
        Where the example comes from, such as ``train.json, row 17``; errors name it.

    Raises
    ------
    DataError
        The turns are not as said.
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        for number, turn in enumerate(self.turns, start=1):
            role = "user" if number % 2 else "assistant"
            if turn.role != role:
                raise DataError(
                    f"{self.name}: turn {number} is {turn.role!r} but must be {role!r}."
                )
            if not turn.text.strip():
                raise DataError(f"{self.name}: turn {number} is empty.")
            if role == "assistant" and IMAGE_MARKER in turn.text:
                raise DataError(
                    f"{self.name}: turn {number} is an answer but holds an image marker."
                )
        if len(self.turns) < 2 or len(self.turns) % 2:
            raise DataError(f"{self.name} must end with an assistant turn.")
        markers = sum(turn.text.count(IMAGE_MARKER) for turn in self.turns)
        if markers != len(self.images):
            raise DataError(
                f"{self.name} has {markers} image markers ({IMAGE_MARKER}) but "
                f"{len(self.images)} images."
            )

    @property
    def name(self) -> str:
        """What errors call this example."""
        return f"Example {self.id!r}" + (f" ({self.origin})" if self.origin else "")

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All turns but the last: what generation starts from."""
        return self.turns[:-1]

    @property
    def answers(self) -> tuple[str, ...]:
        """The references at evaluation, at least one."""
        return self.references or (self.turns[-1].text,)
