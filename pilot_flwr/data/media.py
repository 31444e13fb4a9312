"""Detect images, videos and audio in a row that would be ignored.

Ignoring a field or a marker for an image would silently drop it, so both are errors:
`unread_field` finds the fields, `unread_marker` the markers of other tools. Numbers and booleans
are not images, and fields such as ``image_id`` or ``image_width`` only describe one.
"""

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from pilot_flwr.data.examples import IMAGE_MARKER

REMEDY = f"Images belong in `image` or `images` and are marked {IMAGE_MARKER}"

_MEDIA = frozenset(
    """
    image images img imgs picture pictures pic pics photo photos pixel pixels screenshot screenshots
    frame frames video videos audio audios
    """.split()
)
_HOLDS = "path paths file files name names filename filenames url urls uri data bytes list".split()
_DESCRIBES = frozenset(
    """
    alt aspect author caption captions category class classes count credit dataset date description
    dimensions duration format fps hash height id idx ids index label labels license md mode num
    quality question ratio resolution score sha shape size sizes source split subset tags title
    tokens type types width
    """.split()
)
_AROUND = frozenset(
    """
    a b begin bos break chunk content context embed embedding end eof eos feat feature features
    here id index input m mm ms newline number of pad patch patches placeholder placeholders row s
    sep soft start t token tokens unk
    """.split()
)
"""Words that other tools combine with a medium's name in a marker."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MARKER = re.compile(
    r"(?:<|&lt;)[\w |:=/-]{1,40}(?:>|&gt;)|\[/?[\w -]{1,24}\]|\{\{?[\w -]{1,24}\}?\}"
)
_HTML = re.compile(r"</?(img|image|picture|video|audio|frame)\s*/?>", re.IGNORECASE)
_FILE = re.compile(
    r"data:(image|video|audio)/.*|[^\n]{1,1000}\.(png|jpe?g|jfif|webp|bmp|gif|tiff?|p[bgnp]m|avif"
    r"|jp2|heic|heif|svg|dcm|dicom|nii|nii\.gz|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a)"
    r"([?#]\S{1,4000})?",
    re.IGNORECASE | re.DOTALL,
)
_NAMED = re.compile(
    r"!\[[^\]\n]{0,1000}\]\(\s{0,8}<?(?P<markdown>[^\s()<>]{1,1000})>?(?:\s[^()\n]{0,200})?\)"
    r"|(?:[<\[{]|&lt;)\|?\s{0,8}(?P<word>[a-z]{1,24})[\w-]{0,24}"
    r"(?:\s{0,8}[:=|]\s{0,8}|\s{1,8}(?!\w+\s*=))"
    r"[\"']?(?P<file>[^<>\[\]{}\"'\n]{1,1000}?)[\"']?\s{0,8}\|?(?:[>\]}]|&gt;)",
    re.IGNORECASE,
)
"""A marker with a file: ``![](a.png)``, ``<image:a.png>``, ``[img a.png]``; not HTML."""


def unread_field(fields: Mapping[str, Any], known: Iterable[str], *, pictures: bool) -> str | None:
    """Return a field outside `known` that holds an image or another medium, by name or value.

    With `pictures`, the row has images that are read, and other file names are taken as metadata.
    """
    known = frozenset(known)
    for name, value in fields.items():
        if name in known:
            continue
        values = [
            item
            for item in (value if isinstance(value, list) else [value])
            if item and not isinstance(item, bool | int | float)
        ]
        if values and _names_medium(name):
            return name
        if values and not pictures:
            if any(map(_is_medium, values)) or (_names_file(name) and any(map(_is_stem, values))):
                return name
            for item in values:
                if isinstance(item, dict) and (inner := unread_field(item, (), pictures=False)):
                    return f"{name}.{inner}"
    return None


def unread_marker(text: str, *, answer: bool) -> str | None:
    """Return a marker of a medium other than `IMAGE_MARKER`, such as ``<video>`` or ``<image_1>``.

    HTML elements and Markdown count as text in an answer, which may explain them; in a question
    they stand for a lost medium.
    """
    if not any(character in text for character in "<[{&"):
        return None
    for found in _MARKER.finditer(text):
        marker = html.unescape(found[0])
        element = _HTML.fullmatch(marker) or marker[0] != "<"
        if found[0] == IMAGE_MARKER or (answer and element):
            continue
        words = _words(marker)
        media = _MEDIA if marker[0] != "<" else _MEDIA | {"vision", "media", "speech"}
        if media & set(words) and media | _AROUND >= set(words):
            return marker
    for found in _NAMED.finditer(text):
        marker, word = html.unescape(found[0]), found["word"]
        if answer and marker[0] != "<":
            continue
        if (word is None or word.lower() in _MEDIA) and _is_medium(
            found["markdown"] or found["file"]
        ):
            return marker
    return None


def _names_medium(name: str) -> bool:
    words = _words(name)
    return any(map(_is_medium_word, words)) and not _DESCRIBES & set(words)


def _is_medium_word(word: str) -> bool:
    return word in _MEDIA or any(word == medium + end for medium in _MEDIA for end in _HOLDS)


def _names_file(name: str) -> bool:
    return "".join(_words(name)).endswith(("filename", "filenames", "filepath", "filepaths"))


def _is_stem(value: Any) -> bool:
    """Return whether a value is a file's name without its ending, as COCO's may be."""
    return isinstance(value, str) and "." not in PurePosixPath(value).name


def _is_medium(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_medium, value))
    if isinstance(value, dict):
        return bool(value.get("bytes")) or any(map(_is_medium, value.values()))
    return isinstance(value, str) and _FILE.fullmatch(value.strip()) is not None


def _words(name: str) -> list[str]:
    """Return the words of a name, in lower case: ``imagePath`` and ``IMAGE_path`` have two."""
    return [word.lower() for word in _WORD.findall(name)]
