"""Tokenize examples, with labels on the assistant's tokens alone.

The processor's chat template renders a conversation; no template is hard-coded. The rendered text
shows where an answer ends. If no special token follows it there, the tokenizer's end token is
appended, as in LLaVA's training format. The tokenizer's offsets then give the tokens of answers.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pilot_flwr.data.examples import IMAGE_MARKER, Example, Turn
from pilot_flwr.errors import ConfigError, DataError

IGNORE_INDEX = -100
"""Label of a token that carries no loss, as in `torch.nn.functional.cross_entropy`."""

_PROBE = (Turn("user", "a"), Turn("assistant", "b"))
"""A conversation that shows how a template renders turns."""

CACHED_RENDERINGS = 1 << 14
"""Renderings cached per processor: conversations recur every epoch."""

_CACHE: WeakKeyDictionary[Any, dict[tuple[str, tuple[Turn, ...], bool], "Rendered"]] = (
    WeakKeyDictionary()
)


class Rendered(NamedTuple):
    """A conversation as text, and the spans of its answers with their end tokens."""

    text: str
    answers: list[tuple[int, int]]


class Batch(NamedTuple):
    """Token tensors of B examples, padded to one length L: int64, shape (B, L).

    A label is the token itself where the loss counts, else `IGNORE_INDEX`. `token_types` marks the
    tokens of images for models that need it, under its name in their forward pass.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_types: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`."""
        types = {name: tensor.to(device) for name, tensor in self.token_types.items()}
        ids, mask, labels = (tensor.to(device) for tensor in self[:3])
        return Batch(ids, mask, labels, types)


class Collator:
    """Renders examples with the processor's chat template, tokenizes and pads them.

    An example above `max_length` is refused, or with `cut` a training example is cut there and its
    id noted in `cut_examples`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int,
        system_prompt: str = "",
        cut: bool = False,
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.system_prompt = system_prompt
        self.cut = cut
        self.cut_examples: set[str] = set()
        added = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        special = added | set(map(str, self.tokenizer.all_special_tokens))
        self._special = sorted(special - {processor.image_token})
        for token in sorted({*special, processor.image_token, IMAGE_MARKER}):
            if token in system_prompt:
                raise ConfigError(
                    f"`model.system_prompt` has {token!r} but must be text without control tokens "
                    "of the model and without image markers."
                )
        self._cache = _CACHE.setdefault(processor, {})

    def train_batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize whole conversations, padded on the right."""
        rows = [self.tokenize(example) for example in examples]
        return self._pad([ids for ids, _ in rows], [labels for _, labels in rows], side="right")

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize all turns but the last, ready to generate, padded on the left."""
        rows = [self.prompt(example) for example in examples]
        return self._pad(rows, [[IGNORE_INDEX] * len(ids) for ids in rows], side="left")

    def prompt(self, example: Example) -> list[int]:
        """Return token ids of all turns but the last; raise `DataError` if there are too many."""
        text = self._conversation(example, example.prompt, generate=True).text
        ids: list[int] = self._encode(text, example)["input_ids"]
        return ids

    def tokenize(self, example: Example) -> tuple[list[int], list[int]]:
        """Return token ids and labels of one example, each a list of L integers."""
        text, answers = self._conversation(example, example.turns)
        encoded = self._encode(text, example, whole=self.cut)
        labels = []
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            inside = any(first <= start and end <= last for first, last in answers)
            overlaps = any(start < last and first < end for first, last in answers)
            if overlaps and not inside:
                # By position alone: errors go to the server, and the text is the client's.
                raise DataError(
                    f"{example.name}: the token at characters {start} to {end} of the rendered "
                    "conversation straddles the edge of an answer, so its label is undefined."
                )
            labels.append(token if inside and end > start else IGNORE_INDEX)
        if len(labels) > self.max_length:
            self._check_cut(example, encoded["input_ids"], labels)
        return encoded["input_ids"][: self.max_length], labels[: self.max_length]

    def _check_cut(self, example: Example, ids: list[int], labels: list[int]) -> None:
        """Note an example that is cut; raise `DataError` if its images or all answers would go."""
        kept = labels[: self.max_length]
        lost = ""
        if self.processor.image_token_ids.intersection(ids[self.max_length :]):
            lost = "an image"
        elif all(label == IGNORE_INDEX for label in kept):
            lost = "every answer"
        if lost:
            raise DataError(
                f"{example.name} has {len(ids)} tokens and would lose {lost} if it were cut at "
                f"`train.max_length`, which is {self.max_length}."
            )
        self.cut_examples.add(example.id)

    def end_token_id(self) -> int:
        """Return the id of the token that ends every answer and stops generation."""
        text, ((_, end),) = self._render(_PROBE)
        ends = [token for token in self._special if text[:end].endswith(token)]
        return int(self.tokenizer.convert_tokens_to_ids(max(ends, key=len)))

    def _conversation(
        self, example: Example, turns: Sequence[Turn], *, generate: bool = False
    ) -> Rendered:
        """Render turns of an example, each image token as the tokens of its image."""
        self._check_text(example, turns)
        try:
            rendered = self._render(turns, generate=generate)
        except DataError as error:
            raise DataError(f"{example.name}: {error}") from None
        image_token = self.processor.image_token
        pieces = rendered.text.split(image_token)
        if len(pieces) - 1 != len(example.images):
            raise DataError(
                f"{example.name}: the chat template renders {len(pieces) - 1} image tokens for "
                f"{len(example.images)} images."
            )
        try:
            images = self.processor.image_texts([image.size() for image in example.images])
        except ValueError:
            raise DataError(
                f"{example.name}: the model's image processor refuses an image of this shape."
            ) from None
        text, answers = pieces[0], rendered.answers
        for piece, image in zip(pieces[1:], images, strict=True):
            place, added = len(text), len(image) - len(image_token)
            text += image + piece
            answers = [(a + added, b + added) if a > place else (a, b) for a, b in answers]
        return Rendered(text, answers)

    def _check_text(self, example: Example, turns: Sequence[Turn]) -> None:
        """Raise `DataError` for a control token in a text, which could forge a turn."""
        control = {*self._special, self.processor.image_token} - {IMAGE_MARKER}
        for number, turn in enumerate(turns):
            if token := next((t for t in sorted(control) if t in turn.text), None):
                raise DataError(
                    f"{example.name}: {example.field(number)} has {token!r}, which is a control "
                    "token of the model. Remove it or write it differently, such as "
                    f"{token[0] + ' ' + token[1:]!r}."
                )

    def _encode(self, text: str, example: Example, *, whole: bool = False) -> Any:
        """Tokenize a rendered example; raise `DataError` if it is too long, unless `whole`."""
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens=not (bos and text.startswith(bos)),
            verbose=False,  # the error below names the example
        )
        length = len(encoded["input_ids"])
        if length > self.max_length and not whole:
            raise DataError(
                f"{example.name} has {length} tokens but `train.max_length` is {self.max_length}."
            )
        return encoded

    def _pad(self, ids: list[list[int]], labels: list[list[int]], *, side: str) -> Batch:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad

        def stack(rows: list[list[int]], value: int) -> Tensor:
            return pad_sequence(list(map(torch.tensor, rows)), True, value, side)

        mask = stack([[1] * len(row) for row in ids], 0)
        types = [self.processor.token_types(row) for row in ids]
        marked = [row for row in types if row is not None]
        named = {self.processor.token_types_name: stack(marked, 0)} if marked else {}
        return Batch(stack(ids, pad), mask, stack(labels, IGNORE_INDEX), named)

    def _render(self, turns: Sequence[Turn], *, generate: bool = False) -> Rendered:
        """Render turns, one image token for each image, an end token after each answer."""
        key = (self.system_prompt, tuple(turns), generate)
        if (cached := self._cache.get(key)) is not None:
            return cached
        whole = self._prompt_text(turns) if generate else self._apply(turns)
        text, answers, done = "", [], 0
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start, end, after = self._answer_span(turns, index, whole)
            text += whole[done:start]
            begin = len(text)
            text += whole[start:end]
            if after is None:  # the template has no end token; white space would follow
                text += str(self.tokenizer.eos_token)
                done = end + len(whole[end:]) - len(whole[end:].lstrip())
            else:
                text += whole[end:after]
                done = after
            answers.append((begin, len(text)))
        rendered = Rendered(text + whole[done:], answers)
        if len(self._cache) < CACHED_RENDERINGS:
            self._cache[key] = rendered
        return rendered

    def _answer_span(
        self, turns: Sequence[Turn], index: int, whole: str
    ) -> tuple[int, int, int | None]:
        """Return where an answer starts and ends, and where the end token after it ends."""
        through = self._apply(turns[: index + 1])
        end, after = self._before_end_tokens(through)
        answer = turns[index].text.strip()
        if not whole.startswith(through) or not through[:end].endswith(answer):
            raise DataError(
                f"the chat template renders turn {index + 1} differently on its own, so the "
                "answer cannot be located."
            )
        if self._prompts_are_beginnings:
            return len(self._apply(turns[:index], generate=True)), end, after
        return end - len(answer), end, after

    def _before_end_tokens(self, text: str) -> tuple[int, int | None]:
        """Return where `text` ends without its final special tokens, and where the first ends."""
        end, after = len(text.rstrip()), None
        while token := next((t for t in self._special if text[:end].endswith(t)), None):
            after = end
            end = len(text[: end - len(token)].rstrip())
        return end, after

    @functools.cached_property
    def _prompts_are_beginnings(self) -> bool:
        """True if an answered turn begins with the generation prompt, without final white space.

        LLaVA-OneVision's prompt ends in ``assistant`` and a newline, but before an answer there is
        a blank between the two; LLaVA-Interleave has one newline more before an answer, and
        tokenizers merge both into one token.
        """
        prompt = self._apply(_PROBE[:1], generate=True)
        return self._apply(_PROBE).startswith(prompt) and not prompt[-1:].isspace()

    def _prompt_text(self, turns: Sequence[Turn]) -> str:
        """Render a generation's prompt: exactly the text that precedes an answer in training."""
        if self._prompts_are_beginnings:
            return self._apply(turns, generate=True)
        answered = self._apply([*turns, _PROBE[1]])
        return answered[: self._before_end_tokens(answered)[0] - len(_PROBE[1].text)]

    def _apply(self, turns: Sequence[Turn], *, generate: bool = False) -> str:
        texts = [("system", self.system_prompt)] if self.system_prompt else []
        texts += [(turn.role, turn.text) for turn in turns]
        image = self.processor.image_token
        messages = [{"role": role, "content": _content(text, image)} for role, text in texts]
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=generate)
        return text


def _content(text: str, image_token: str) -> list[dict[str, str]]:
    """Return LLaVA's text with image markers as the parts of a chat message.

    Templates put images first: markers at the front become image parts. Text with a marker in the
    middle stays one part, with the image token in place of the marker.
    """
    rest, markers = text, 0
    while rest.lstrip().startswith(IMAGE_MARKER):
        rest = rest.lstrip().removeprefix(IMAGE_MARKER)
        markers += 1
    if IMAGE_MARKER in rest:
        rest, markers = text, 0
    parts = [{"type": "image"}] * markers
    plain = rest.strip().replace(IMAGE_MARKER, image_token)
    return [*parts, {"type": "text", "text": plain}] if plain else parts
