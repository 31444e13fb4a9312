"""Read a row's conversation, in any supported form, as turns.

=============================== ===============================================================
`conversations` or `messages`   turns ``{"from": "human" | "gpt", "value": text}`` or
                                ``{"role": "user" | "assistant", "content": text or parts}``
`prompt` and `completion`       texts, or lists of such turns, as TRL writes them
`question_id` and `text`        a question of LLaVA's evaluation files, without an answer
=============================== ===============================================================

A message part is text, an image (``image`` or ``image_url``), or a placeholder for the next entry
of the row's `images`. Anything else is an error, which names the field as in the file. To support
another form, extend `_items`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pilot_flwr.data.examples import IMAGE_MARKER, Turn
from pilot_flwr.data.media import REMEDY, unread_field, unread_marker
from pilot_flwr.errors import DataError

UNANSWERED = Turn("assistant", "?")
"""Stands for the answer that a question lacks; generation ignores the last turn."""

FORMS = "`conversations`, `messages`, or `prompt` with `completion`"

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES: dict[Any, Any] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_OTHER = {"human": "gpt", "user": "assistant", "gpt": "human", "assistant": "user"}
"""The other role, in the same vocabulary."""

_PICTURES = ("image", "image_url", "url", "path", "base64")
"""Fields of a message part that hold its image."""

_UNTRAINED = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking")
_MASKS = (
    *("weight", "loss_weight", "loss_mask", "loss_scale", "loss", "train", "training"),
    *("trainable", "train_detail", "mask", "masked"),
)
"""Fields by which other tools weight an answer in the loss or leave it out."""

_SYSTEM = ("system", "developer")


class Conversation(NamedTuple):
    """Turns, their fields in the row, and the images of their parts, each with its field.

    For an image in the row's `images`, the value is its index there or None. The field of
    `UNANSWERED` is empty.
    """

    turns: list[Turn]
    fields: list[str]
    pictures: list[tuple[str, Any]]


class _Item(NamedTuple):
    """One turn as in the file: its field, its role, and its text or parts."""

    field: str
    word: str
    content: Any
    speaker: str = ""


def read_conversation(row: Mapping[str, Any], origin: str, *, answered: bool) -> Conversation:
    """Return a row's turns; raise `DataError` unless they alternate and end with an answer.

    Unless `answered`, the last answer may be absent, empty or null.
    """
    items = _items(row, origin)
    if not answered and _ROLES[items[-1].word] == "assistant" and _is_blank(items[-1].content):
        items.pop()
    found = Conversation([], [], [])
    for number, item in enumerate(items):
        expected = "assistant" if number % 2 else "user"
        if _ROLES[item.word] != expected:
            other = f"but must be {_OTHER[item.word]}: roles alternate, question first"
            raise DataError(f"{origin}: `{item.speaker or item.field}` is {item.word} {other}.")
        text = _text(item, origin, found.pictures)
        if marker := unread_marker(text, answer=expected == "assistant"):
            raise DataError(
                f"{origin}: `{item.field}` has {marker!r}, which is not a supported marker. "
                f"{REMEDY}; to use it as text, write it differently, such as "
                f"{marker[0] + ' ' + marker[1:]!r}."
            )
        found.turns.append(Turn(_ROLES[item.word], text))
        found.fields.append(item.field)
    if len(found.turns) % 2:
        if answered:
            last = items[-1]
            raise DataError(
                f"{origin}: `{last.field}` is the last turn, but an answer "
                f"({_OTHER[last.word]}) must follow it."
            )
        found.turns.append(UNANSWERED)
        found.fields.append("")
    if not found.turns:
        raise DataError(f"{origin} has no question.")
    return found


def is_text(value: Any) -> bool:
    """Return whether a tokenizer accepts a value: JSON can escape an unpaired surrogate."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def kind_of(value: Any) -> str:
    """Return in words what a JSON value is, without the value."""
    if value is None:
        return "null or missing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text" if is_text(value) else "text with an unpaired surrogate"
    if value == []:
        return "an empty list"
    names = {dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), "a value of another type")


def _items(row: Mapping[str, Any], origin: str) -> list[_Item]:
    """Return the turns of the one form that a row has."""
    keys = ("conversations", "messages", "prompt", "completion")
    forms = [key for key in keys if row.get(key) is not None]
    if forms[:1] != ["prompt"] and len(forms) > 1:
        raise DataError(f"{origin} has both `{forms[0]}` and `{forms[1]}`; remove one.")
    if forms and forms[0] in ("conversations", "messages"):
        return _turns(row[forms[0]], forms[0], origin)
    if row.get("prompt") is not None:
        items = _side(row["prompt"], "prompt", "user", origin)
        if row.get("completion") not in (None, []):
            items += _side(row["completion"], "completion", "assistant", origin)
        return items
    if row.get("question_id") is not None and row.get("text") is not None:
        return [_Item("text", "user", row["text"])]
    raise DataError(f"{origin}: `conversations` is missing; a row has {FORMS}.")


def _side(found: Any, key: str, word: str, origin: str) -> list[_Item]:
    return [_Item(key, word, found)] if isinstance(found, str) else _turns(found, key, origin)


def _turns(found: Any, key: str, origin: str) -> list[_Item]:
    if not isinstance(found, list) or not found:
        raise DataError(f"{origin}: `{key}` is {kind_of(found)} but must be a list of turns.")
    return [_turn(item, f"{key}[{number}]", origin) for number, item in enumerate(found)]


def _turn(found: Any, where: str, origin: str) -> _Item:
    if not isinstance(found, dict):
        raise DataError(f"{origin}: `{where}` is {kind_of(found)} but must be an object.")
    item = {key: value for key, value in found.items() if value is not None}
    chat = "role" in item or "content" in item
    if chat and ("from" in item or "value" in item):
        raise DataError(f"{origin}: `{where}` mixes `from`, `value` with `role`, `content`.")
    speaker, content = ("role", "content") if chat else ("from", "value")
    word = item.get(speaker)
    if not isinstance(word, str) or word not in _ROLES:
        raise _wrong_speaker(f"{where}.{speaker}", word, chat, origin)
    _check_fields(item, (speaker, content), where, origin)
    if _ROLES[word] == "assistant":
        _check_weights(item, where, origin)
    return _Item(f"{where}.{content}", word, item.get(content), f"{where}.{speaker}")


def _wrong_speaker(field: str, word: Any, chat: bool, origin: str) -> DataError:
    allowed = "user or assistant" if chat else "human or gpt"
    if word in _SYSTEM:
        return DataError(
            f"{origin}: `{field}` is {word} but must be {allowed}; `model.system_prompt` sets a "
            "system prompt for all rows."
        )
    return DataError(f"{origin}: `{field}` must be {allowed}; other roles are not supported.")


def _check_fields(item: Mapping[str, Any], known: tuple[str, ...], where: str, origin: str) -> None:
    """Raise for a field of a turn or a part that would be lost."""
    if item.keys() <= {*known}:
        return
    if lost := unread_field(item, known, pictures=False):
        raise DataError(
            f"{origin}: `{where}.{lost}` is not read. {REMEDY}; remove what is not needed."
        )
    if lost := next((name for name in _UNTRAINED if item.get(name)), None):
        raise DataError(
            f"{origin}: `{where}.{lost}` is not read: tool calls and reasoning are not supported. "
            "Remove it, or write it into the turn's text."
        )


def _check_weights(item: Mapping[str, Any], where: str, origin: str) -> None:
    """Raise for an answer that another tool would weight or leave out; `mask` has two meanings."""
    for name in _MASKS:
        if name in item and (item[name] != 1 or name.startswith("mask")):
            raise DataError(
                f"{origin}: `{where}.{name}` is not supported: every answer is trained on, with "
                "weight 1. Remove the field, or the row."
            )


def _is_blank(content: Any) -> bool:
    """Return whether a turn has no text and no image."""
    if isinstance(content, list):
        return all(map(_is_blank, content))
    if isinstance(content, dict):
        held = [value for key, value in content.items() if key != "type"]
        return content.get("type", "text") == "text" and all(map(_is_blank, held))
    return content is None or not str(content).strip()


def _text(item: _Item, origin: str, pictures: list[tuple[str, Any]]) -> str:
    """Return a turn's text with a marker for each image, which is appended to `pictures`."""
    content = item.content
    if isinstance(content, list) and item.field.endswith("content") and content:
        parts = [
            _part(part, f"{item.field}[{number}]", origin, pictures)
            for number, part in enumerate(content)
        ]
        return "\n".join(parts)
    if not is_text(content):
        allowed = "text or a list of parts" if item.field.endswith("content") else "text"
        raise DataError(f"{origin}: `{item.field}` is {kind_of(content)} but must be {allowed}.")
    return str(content)


def _part(found: Any, where: str, origin: str, pictures: list[tuple[str, Any]]) -> str:
    """Return the text of a message part: its own, or the marker of its image."""
    if is_text(found):
        return str(found)
    if not isinstance(found, dict):
        raise DataError(f"{origin}: `{where}` is {kind_of(found)} but must be an object.")
    part = {key: value for key, value in found.items() if value is not None and value != ""}
    named = [key for key in ("text", "image", "image_url") if key in part]
    kind = part.get("type", named[0] if len(named) == 1 else None)
    if kind == "text":
        _check_fields(part, ("type", "text"), where, origin)
        text = found.get("text")
        if not is_text(text):
            raise DataError(f"{origin}: `{where}.text` is {kind_of(text)} but must be text.")
        return str(text)
    if kind not in ("image", "image_url"):
        raise DataError(f"{origin}: `{where}.type` must be text, image or image_url.")
    own = [key for key in _PICTURES if key in part]
    _check_fields(part, ("type", *own), where, origin)
    if "text" in part or len(own) > 1:
        raise DataError(f"{origin}: `{where}` must hold one image and no text.")
    key = own[0] if own else "index"
    pictures.append((f"{where}.{key}", part.get(key)))
    return IMAGE_MARKER
