"""A conversation as the text that a model sees, by the processor's own chat template.

Where an answer ends is read off the template; if no special token follows it there, the
tokenizer's end token is put behind it, as LLaVA's own training format has it. Nothing about one
template is hard-coded.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pilot_flwr.data.examples import IMAGE_MARKER, Turn
from pilot_flwr.errors import DataError

_PROBE = (Turn("user", "a"), Turn("assistant", "b"))
"""A conversation that shows how a template treats any."""

MOST_KEPT = 1 << 14
"""Renderings that are kept per processor: a client's conversations come back every epoch."""

_KEPT: WeakKeyDictionary[Any, dict[tuple[str, tuple[Turn, ...], bool], "Rendered"]] = (
    WeakKeyDictionary()
)


class Rendered(NamedTuple):
    """A conversation as text, and where its answers with their end tokens are in it."""

    text: str
    answers: list[tuple[int, int]]


class ChatTemplate:
    """Renders conversations.

    Parameters
    ----------
    processor
        A processor of transformers: tokenizer, chat template, image token.
    system_prompt : str
        Begins every conversation, if not empty.
    """

    def __init__(self, processor: Any, *, system_prompt: str = "") -> None:
        self.processor = processor
        self.system_prompt = system_prompt
        special = _special_tokens(processor.tokenizer)
        self._special = sorted(special - {processor.image_token})
        self._kept = _KEPT.setdefault(processor, {})

    def end_token_id(self) -> int:
        """Return the id of the token that ends every answer: where generation has to stop."""
        text, ((_, end),) = self.render(_PROBE)
        ends = [token for token in self._special if text[:end].endswith(token)]
        return int(self.processor.tokenizer.convert_tokens_to_ids(max(ends, key=len)))

    def render(self, turns: Sequence[Turn], *, generate: bool = False) -> Rendered:
        """Render turns, one image token for each image, an end token after each answer.

        Parameters
        ----------
        turns : sequence of Turn
            The conversation.
        generate : bool
            Whether the answer to the last turn comes next.

        Raises
        ------
        DataError
            The template changes an answer or what is around it, so that it cannot be located.
        """
        key = (self.system_prompt, tuple(turns), generate)
        rendered = self._kept.get(key)
        if rendered is None:
            rendered = self._render(turns, generate=generate)
            if len(self._kept) < MOST_KEPT:
                self._kept[key] = rendered
        return rendered

    def _render(self, turns: Sequence[Turn], *, generate: bool) -> Rendered:
        whole = self._prompt(turns) if generate else self._apply(turns)
        text, answers, done = "", [], 0
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start, end, after = self._answer_span(turns, index, whole)
            text += whole[done:start]
            begin = len(text)
            text += whole[start:end]
            if after is None:  # the template has no end token; white space would follow
                text += str(self.processor.tokenizer.eos_token)
                done = end + len(whole[end:]) - len(whole[end:].lstrip())
            else:
                text += whole[end:after]
                done = after
            answers.append((begin, len(text)))
        return Rendered(text + whole[done:], answers)

    def _answer_span(
        self, turns: Sequence[Turn], index: int, whole: str
    ) -> tuple[int, int, int | None]:
        """Return where an answer begins and ends, and where the end token after it ends."""
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
        """Return the end of `text` without white space and special tokens, and of the first one."""
        end, after = len(text.rstrip()), None
        while token := next((t for t in self._special if text[:end].endswith(t)), None):
            after = end
            end = len(text[: end - len(token)].rstrip())
        return end, after

    @functools.cached_property
    def _prompts_are_beginnings(self) -> bool:
        """Whether an answered turn begins with the generation prompt, and not in white space.

        LLaVA-OneVision's prompt ends in ``assistant`` and a newline, where an answer has a blank
        between the two; LLaVA-Interleave's answers have one newline more, and tokenizers make one
        token of both.
        """
        prompt = self._apply(_PROBE[:1], generate=True)
        return self._apply(_PROBE).startswith(prompt) and not prompt[-1:].isspace()

    def _prompt(self, turns: Sequence[Turn]) -> str:
        """Render what generation starts from: exactly what training has before an answer."""
        if self._prompts_are_beginnings:
            return self._apply(turns, generate=True)
        answered = self._apply([*turns, _PROBE[1]])
        return answered[: self._before_end_tokens(answered)[0] - len(_PROBE[1].text)]

    def _apply(self, turns: Sequence[Turn], *, generate: bool = False) -> str:
        texts = [("system", self.system_prompt)] if self.system_prompt else []
        texts += [(turn.role, turn.text) for turn in turns]
        image = self.processor.image_token
        messages = [{"role": role, "content": _content(text, image)} for role, text in texts]
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        return text


def _special_tokens(tokenizer: Any) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(map(str, tokenizer.all_special_tokens))


def _content(text: str, image_token: str) -> list[dict[str, str]]:
    """Return LLaVA's text with its image markers as a chat message's parts.

    Templates put images first. So markers at the front become image parts, and text in whose
    midst an image stands stays one text, with the image token where the marker is.
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
