"""Converters of captions: COCO's own files, and Karpathy's split of COCO.

For training each caption is a row; at test each image is a row, whose references are all of its
captions. A caption has no question, so the request is LLaVA-1.5's own for short captions.
"""

from collections.abc import Iterator
from typing import Any

from pilot_flwr.data.conversion import (
    Entry,
    Row,
    Sources,
    as_fields,
    elements,
    field,
    texts,
    to_row,
)
from pilot_flwr.errors import DataError

REQUEST = "Provide a one-sentence caption for the provided image."

KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
"""Names in the file; ``restval`` is what the field trains on besides ``train``."""


def coco_entries(sources: Sources) -> Iterator[Entry]:
    """Yield captions, or images with theirs, of COCO's ``captions_*.json``."""
    for path in sources.annotations:
        images = map(as_fields, elements(path, "images"))
        names = {str(image.get("id")): image.get("file_name") for image in images}
        captions: dict[str, list[Any]] = {}
        for item in map(as_fields, elements(path, "annotations")):
            image, key = str(item.get("image_id")), item.get("id")
            origin = f"{path}, annotation {key}"
            if image not in names:
                raise DataError(f"{origin}: image {image} is not among `images`.")
            if sources.scored:
                captions.setdefault(image, []).append(item.get("caption"))
            else:
                fields = {"file_name": names[image], "captions": [item.get("caption")]}
                yield Entry(origin, f"{image}-{key}", fields)
        if sources.scored:
            for image, name in names.items():
                yield from _of_image(f"{path}, image {image}", image, name, captions.get(image, []))


def karpathy_entries(sources: Sources) -> Iterator[Entry]:
    """Yield captions, or images with theirs, of Karpathy's ``dataset_coco.json``."""
    for path in sources.annotations:
        for image in map(as_fields, elements(path, "images")):
            if image.get("split") not in KARPATHY_SPLITS[sources.split]:
                continue
            key = str(image.get("cocoid"))
            origin = f"{path}, image {key}"
            whole = Entry(origin, key, image)
            name = field(whole, "filename")
            if image.get("filepath"):
                name = f"{field(whole, 'filepath')}/{name}"
            captions = texts(whole, "sentences", "raw")
            if sources.scored:
                yield from _of_image(origin, key, name, captions)
                continue
            for number, caption in enumerate(captions):
                fields = {"file_name": name, "captions": [caption]}
                yield Entry(f"{origin}, sentence {number + 1}", f"{key}-{number}", fields)


def _of_image(origin: str, key: str, name: Any, captions: list[Any]) -> Iterator[Entry]:
    """Yield an image with all its captions, and each empty one apart: it is no reference."""
    empty = [text for text in captions if isinstance(text, str) and not text.strip()]
    for text in empty:
        yield Entry(origin, key, {"file_name": name, "captions": [text]})
    if len(empty) < len(captions) or not captions:
        rest = [text for text in captions if not isinstance(text, str) or text.strip()]
        yield Entry(origin, key, {"file_name": name, "captions": rest})


def caption_row(entry: Entry, sources: Sources) -> Row:
    """Return the row of a caption, or of an image with all of its captions."""
    captions = texts(entry, "captions")
    references = captions if sources.scored else None
    return to_row(entry, field(entry, "file_name"), REQUEST, captions[0], references)
