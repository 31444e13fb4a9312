"""The one shape of an instruction-tuning example, whatever file or generator it comes from.

To add a data source, return a sequence of `Example`; nothing else in the package changes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from pilot_flwr.errors import DataError

IMAGE_MARKER = "<image>"
"""Where an image stands in a turn's text, as in LLaVA's JSON files."""


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Example:
    """One image and the conversation about it.

    Parameters
    ----------
    id : str
        Unique within the client's split; errors name it.
    image : PIL.Image.Image
        RGB image.
    turns : tuple of Turn
        User and assistant alternate, the user begins and the assistant ends. The text of
        the first user turn holds `IMAGE_MARKER` once.

    Raises
    ------
    DataError
        The turns are not as said.
    """

    id: str
    image: Image.Image
    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        for number, turn in enumerate(self.turns, start=1):
            role = "user" if number % 2 else "assistant"
            if turn.role != role:
                raise DataError(
                    f"Example {self.id!r}: turn {number} is {turn.role!r} but must be {role!r}."
                )
            if not turn.text.strip():
                raise DataError(f"Example {self.id!r}: turn {number} is empty.")
        if len(self.turns) < 2 or len(self.turns) % 2:
            raise DataError(f"Example {self.id!r} must end with an assistant turn.")
        markers = [turn.text.count(IMAGE_MARKER) for turn in self.turns]
        if markers[0] != 1 or sum(markers) != 1:
            raise DataError(
                f"Example {self.id!r} has {sum(markers)} image markers ({IMAGE_MARKER}) but must "
                "have one, in its first turn."
            )

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All turns but the last: what generation starts from."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        """Text of the last assistant turn: the reference at evaluation."""
        return self.turns[-1].text
