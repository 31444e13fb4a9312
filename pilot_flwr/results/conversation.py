"""A conversation with a model: turns so far, and images in them."""

from collections.abc import Callable
from pathlib import Path

from pilot_flwr.data.examples import IMAGE_MARKER, Example, ImageSource, Turn
from pilot_flwr.data.image_files import ImageFile, mean_colour
from pilot_flwr.errors import DataError
from pilot_flwr.results.answering import Answerer


class Conversation:
    """Questions and answers; every answer is given to the whole conversation before it.

    Parameters
    ----------
    answerer : Answerer
        The model.
    max_new_tokens : int
        Longest answer in tokens.
    suffix : str
        Put after every question on a line of its own, if not empty.
    pad : bool
        Whether images are padded to a square, as in the run's data.
    """

    def __init__(
        self, answerer: Answerer, *, max_new_tokens: int, suffix: str = "", pad: bool = False
    ) -> None:
        self.answerer = answerer
        self.max_new_tokens = max_new_tokens
        self.suffix = suffix
        image_processor = answerer.processor.image_processor
        self._background = mean_colour(image_processor) if pad else None
        self._number = 0
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.turns: tuple[Turn, ...] = ()
        self.images: tuple[ImageSource, ...] = ()
        self._shown: tuple[ImageSource, ...] = ()
        self._number += 1

    def show(self, path: Path) -> None:
        """Put an image before the next question; ``~`` is the user's own folder.

        Raises
        ------
        DataError
            It cannot be read.
        """
        try:
            file = path.expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # no such user, a NUL in the name
            raise DataError(f"Image {str(path)!r} cannot be opened ({error}).") from None
        image = ImageFile(file.parent, file.name, f"Image {path}", self._background)
        image.read()
        self._shown += (image,)

    def ask(self, question: str, piece: Callable[[str], None] | None = None) -> str:
        """Return the model's answer; question and answer become part of the conversation.

        `piece` gets the answer's text as it comes.

        Raises
        ------
        DataError
            The question is empty, holds an image marker or is no text, or the conversation has
            become longer than `train.max_length`; it then stays as it was.
        """
        question = question.strip()
        if not question:
            raise DataError("The question is empty.")
        try:
            question.encode()
        except UnicodeEncodeError:  # halves of characters: what the terminal gave is no UTF-8
            raise DataError("The question is no text in UTF-8.") from None
        if IMAGE_MARKER in question:
            raise DataError(f"The question must not hold {IMAGE_MARKER}; show an image instead.")
        lines = [*[IMAGE_MARKER] * len(self._shown), question, *filter(None, [self.suffix])]
        asked = (*self.turns, Turn("user", "\n".join(lines)))
        images = self.images + self._shown
        # The last turn is what is asked for: the model does not see it.
        example = Example(f"conversation {self._number}", images, (*asked, Turn("assistant", "?")))
        (answer,) = self.answerer([example], max_new_tokens=self.max_new_tokens, piece=piece)
        answer = answer.strip()
        self.turns = (*asked, Turn("assistant", answer or "(no answer)"))
        self.images, self._shown = images, ()
        return answer
