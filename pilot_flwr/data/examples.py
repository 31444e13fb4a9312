"""The one shape of an instruction-tuning example, whatever file or generator it comes from.

To add a data source, return a sequence of `Example`; nothing else in the package changes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

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
    """

    id: str
    image: Image.Image
    turns: tuple[Turn, ...]

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All turns but the last: what generation starts from."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        """Text of the last assistant turn: the reference at evaluation."""
        return self.turns[-1].text
