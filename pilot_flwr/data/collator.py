"""From examples to token tensors, with labels on the assistant's tokens alone.

The processor's own chat template renders the text; where the assistant's turns begin and end
is read off the template by rendering the conversation's beginnings, and the tokenizer's
offsets say which tokens they are. Nothing about one template is hard-coded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pilot_flwr.data.examples import IMAGE_MARKER, Example, Turn
from pilot_flwr.errors import DataError

IGNORE_INDEX = -100
"""Label of a token that carries no loss, as in `torch.nn.functional.cross_entropy`."""


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


class Collator:
    """Tokenizes and pads examples.

    Parameters
    ----------
    processor
        A LLaVA processor of transformers: tokenizer with offsets, chat template, image token.
    num_visual_tokens : int
        N, tokens that one image takes.
    max_length : int
        Longest sequence allowed, in tokens; a longer example is an error, never cut.
    """

    def __init__(self, processor: Any, *, num_visual_tokens: int, max_length: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.num_visual_tokens = num_visual_tokens
        self.max_length = max_length

    def train_batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize whole conversations, padded on the right.

        Raises
        ------
        DataError
            An example is too long, or a token straddles the end of a prompt.
        """
        rows = [self.tokenize(example) for example in examples]
        return self._pad([ids for ids, _ in rows], [labels for _, labels in rows], side="right")

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize all turns but the last, ready to generate, padded on the left."""
        rows = []
        for example in examples:
            text = self._render(example.prompt, generate=True)
            rows.append(self._encode(text, example)["input_ids"])
        return self._pad(rows, [[IGNORE_INDEX] * len(ids) for ids in rows], side="left")

    def tokenize(self, example: Example) -> tuple[list[int], list[int]]:
        """Return token ids and labels of one example, each a list of L integers."""
        text = self._render(example.turns)
        encoded = self._encode(text, example)
        spans = self._assistant_spans(example, text)
        labels = []
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            inside = any(first <= start and end <= last for first, last in spans)
            overlaps = any(start < last and first < end for first, last in spans)
            if overlaps and not inside:
                # By position alone: errors go to the server, and the text is the client's.
                raise DataError(
                    f"Example {example.id!r}: the token at characters {start} to {end} of the "
                    "rendered conversation straddles the edge of an answer, so its label is "
                    "undefined."
                )
            labels.append(token if inside and end > start else IGNORE_INDEX)
        return encoded["input_ids"], labels

    def _assistant_spans(self, example: Example, text: str) -> list[tuple[int, int]]:
        spans = []
        for index, turn in enumerate(example.turns):
            if turn.role != "assistant":
                continue
            prefix = self._render(example.turns[:index], generate=True)
            through = self._render(example.turns[: index + 1])
            if not text.startswith(prefix) or not text.startswith(through):
                raise DataError(
                    f"Example {example.id!r}: the chat template renders turn {index + 1} "
                    "differently on its own, so the answer cannot be located."
                )
            spans.append((len(prefix), len(through)))
        return spans

    def _render(self, turns: Sequence[Turn], *, generate: bool = False) -> str:
        messages = [{"role": turn.role, "content": _content(turn.text)} for turn in turns]
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        image_token = self.processor.image_token
        return text.replace(image_token, image_token * self.num_visual_tokens)

    def _encode(self, text: str, example: Example) -> Any:
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens=not (bos and text.startswith(bos)),
        )
        length = len(encoded["input_ids"])
        if length > self.max_length:
            raise DataError(
                f"Example {example.id!r} has {length} tokens but `train.max_length` is "
                f"{self.max_length}."
            )
        return encoded

    def _pad(self, ids: list[list[int]], labels: list[list[int]], *, side: str) -> Batch:
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id

        def stack(rows: list[list[int]], value: int) -> Tensor:
            fill = [[value] * (longest - len(row)) for row in rows]
            if side == "right":
                return torch.tensor([row + more for row, more in zip(rows, fill, strict=True)])
            return torch.tensor([more + row for row, more in zip(rows, fill, strict=True)])

        mask = stack([[1] * len(row) for row in ids], 0)
        return Batch(stack(ids, pad), mask, stack(labels, IGNORE_INDEX))


def _content(text: str) -> list[dict[str, str]]:
    """Split LLaVA's text with its image markers into a chat message's parts."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_MARKER)):
        if index > 0:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts
