"""From examples to token tensors, with labels on the assistant's tokens alone.

The text and where its answers are come from `pilot_flwr.data.chat_template`; the tokenizer's
offsets say which tokens are the answers'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pilot_flwr.data.chat_template import ChatTemplate, Rendered
from pilot_flwr.data.examples import Example, Turn
from pilot_flwr.errors import DataError

IGNORE_INDEX = -100
"""Label of a token that carries no loss, as in `torch.nn.functional.cross_entropy`."""

TokenCounter = Callable[[Sequence[tuple[int, int]]], list[int]]
"""From the sizes (height, width) of one example's images to the tokens that each takes."""


@dataclass(frozen=True)
class Batch:
    """Token tensors of B examples, padded to one length L.

    Attributes
    ----------
    input_ids, attention_mask, labels : Tensor
        int64, shape (B, L). A label is the token itself where the loss counts, else
        `IGNORE_INDEX`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )


def same_for_all(tokens: int) -> TokenCounter:
    """Return the counter of an architecture whose images all take `tokens` tokens."""
    return lambda sizes: [tokens] * len(sizes)


class Collator:
    """Tokenizes and pads examples.

    Parameters
    ----------
    processor
        A processor of transformers: tokenizer with offsets, chat template, image token.
    count_tokens : callable
        How many tokens the images of an example take.
    max_length : int
        Longest sequence allowed, in tokens; a longer example is an error, never cut.
    system_prompt : str
        Begins every conversation, if not empty.
    """

    def __init__(
        self,
        processor: Any,
        *,
        count_tokens: TokenCounter,
        max_length: int,
        system_prompt: str = "",
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.count_tokens = count_tokens
        self.max_length = max_length
        self.template = ChatTemplate(processor, system_prompt=system_prompt)

    def train_batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize whole conversations, padded on the right.

        Raises
        ------
        DataError
            An example is too long, or a token straddles the end of a prompt.
        """
        rows = [self.tokenize(example) for example in examples]
        return self._pad([ids for ids, _ in rows], [labels for _, labels in rows], side="right")

    def end_token_id(self) -> int:
        """Return the id of the token that ends every answer: where generation has to stop."""
        return self.template.end_token_id()

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize all turns but the last, ready to generate, padded on the left."""
        rows = [self.prompt(example) for example in examples]
        return self._pad(rows, [[IGNORE_INDEX] * len(ids) for ids in rows], side="left")

    def prompt(self, example: Example) -> list[int]:
        """Return token ids of all turns but the last; raises `DataError` if there are too many."""
        text = self._conversation(example, example.prompt, generate=True).text
        ids: list[int] = self._encode(text, example)["input_ids"]
        return ids

    def length(self, example: Example) -> int:
        """Return the number of tokens of the whole conversation, however long it is.

        Only the headers of the images are read.
        """
        text = self._conversation(example, example.turns).text
        return len(self._tokens(text)["input_ids"])

    def tokenize(self, example: Example) -> tuple[list[int], list[int]]:
        """Return token ids and labels of one example, each a list of L integers.

        Raises
        ------
        DataError
            The example is too long, or a token straddles the edge of an answer.
        """
        text, answers = self._conversation(example, example.turns)
        encoded = self._encode(text, example)
        labels = []
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            inside = any(first <= start and end <= last for first, last in answers)
            overlaps = any(start < last and first < end for first, last in answers)
            if overlaps and not inside:
                # By position alone: errors go to the server, and the text is the client's.
                raise DataError(
                    f"{example.name}: the token at characters {start} to {end} of the "
                    "rendered conversation straddles the edge of an answer, so its label is "
                    "undefined."
                )
            labels.append(token if inside and end > start else IGNORE_INDEX)
        return encoded["input_ids"], labels

    def _conversation(
        self, example: Example, turns: Sequence[Turn], *, generate: bool = False
    ) -> Rendered:
        """Render turns of an example, with image tokens in their number."""
        try:
            rendered = self.template.render(turns, generate=generate)
        except DataError as error:
            raise DataError(f"{example.name}: {error}") from None
        return self._with_image_tokens(example, rendered)

    def _with_image_tokens(self, example: Example, rendered: Rendered) -> Rendered:
        """Repeat each image token as often as its image has features."""
        image_token = self.processor.image_token
        pieces = rendered.text.split(image_token)
        if len(pieces) - 1 != len(example.images):
            raise DataError(
                f"{example.name}: the chat template renders {len(pieces) - 1} image tokens for "
                f"{len(example.images)} images."
            )
        counts = self.count_tokens([image.size() for image in example.images])
        text, moved = pieces[0], []
        for piece, count in zip(pieces[1:], counts, strict=True):
            moved.append((len(text), (count - 1) * len(image_token)))
            text += image_token * count + piece
        return Rendered(text, [_shift(span, moved) for span in rendered.answers])

    def _tokens(self, text: str) -> Any:
        bos = self.tokenizer.bos_token
        return self.tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens=not (bos and text.startswith(bos)),
            verbose=False,  # what is too long is an error of our own
        )

    def _encode(self, text: str, example: Example) -> Any:
        encoded = self._tokens(text)
        length = len(encoded["input_ids"])
        if length > self.max_length:
            raise DataError(
                f"{example.name} has {length} tokens but `train.max_length` is {self.max_length}."
            )
        return encoded

    def _pad(self, ids: list[list[int]], labels: list[list[int]], *, side: str) -> Batch:
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad

        def stack(rows: list[list[int]], value: int) -> Tensor:
            fill = [[value] * (longest - len(row)) for row in rows]
            if side == "right":
                return torch.tensor([row + more for row, more in zip(rows, fill, strict=True)])
            return torch.tensor([more + row for row, more in zip(rows, fill, strict=True)])

        mask = stack([[1] * len(row) for row in ids], 0)
        return Batch(stack(ids, pad), mask, stack(labels, IGNORE_INDEX))


def _shift(span: tuple[int, int], moved: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Move a span behind the insertions before it, each given by its new place and length."""
    start, end = span
    for place, length in moved:
        if place < start:
            start, end = start + length, end + length
    return start, end
