"""Converters of captions (COCO, Karpathy) and boxes with an expression (RefCOCO and the like).

For training each caption is a row; at test each image is a row with all captions as references.
The request is LLaVA-1.5's for short captions.

A boxes file is a list of objects: `image` (file name), `width` and `height` in pixels,
`expression`, and `bbox` = [x, y, w, h] in pixels. LLaVA's boxes are ``[x1, y1, x2, y2]`` as shares
of width and height with two decimals; in LLaVA's data, of the square that an image is padded to.
"""

from collections.abc import Iterator
from typing import Any

from pilot_flwr.data.converters.common import (
    Entry,
    Row,
    Sources,
    Unusable,
    elements,
    field,
    texts,
    to_row,
)
from pilot_flwr.errors import DataError

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."

KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
"""Names in the file; ``restval`` usually belongs to the training split."""


def coco_entries(sources: Sources) -> Iterator[Entry]:
    """Yield the captions, at test by image, of COCO's ``captions_*.json``."""
    for path in sources.annotations:
        images = elements(path, "images")
        names = {str(image.get("id")): image.get("file_name") for image in images}
        captions: dict[str, list[Any]] = {}
        for item in elements(path, "annotations"):
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
    """Yield the captions, at test by image, of Karpathy's ``dataset_coco.json``."""
    for path in sources.annotations:
        for image in elements(path, "images"):
            if image.get("split") not in KARPATHY_SPLITS[sources.split]:
                continue
            key = str(image.get("cocoid"))
            origin = f"{path}, image {key}"
            entry = Entry(origin, key, image)
            name = field(entry, "filename")
            if image.get("filepath"):
                name = f"{field(entry, 'filepath')}/{name}"
            captions = texts(entry, "sentences", "raw")
            if sources.scored:
                yield from _of_image(origin, key, name, captions)
                continue
            for number, caption in enumerate(captions):
                fields = {"file_name": name, "captions": [caption]}
                yield Entry(f"{origin}, sentence {number + 1}", f"{key}-{number}", fields)


def _of_image(origin: str, key: str, name: Any, captions: list[Any]) -> Iterator[Entry]:
    """Yield an image with all its captions, and separately each empty one."""
    empty = [text for text in captions if isinstance(text, str) and not text.strip()]
    for text in empty:
        yield Entry(origin, key, {"file_name": name, "captions": [text]})
    if len(empty) < len(captions) or not captions:
        rest = [text for text in captions if not isinstance(text, str) or text.strip()]
        yield Entry(origin, key, {"file_name": name, "captions": rest})


def caption_row(entry: Entry, sources: Sources) -> Row:
    """Return the row of a caption, or of an image with all of its captions."""
    captions = texts(entry, "captions")
    image, answer = field(entry, "file_name"), captions[0]
    return to_row(
        entry, sources, image, question=CAPTION_REQUEST, answer=answer, references=captions
    )


BOX_REQUEST = "Please provide the bounding box coordinate of the region this sentence describes:"

LARGEST = 2**31
"""Coordinates in pixels are smaller."""

TOLERANCE = 1.0
"""Pixels by which a box may exceed its image; it is clipped to the image's edge."""


def box_entries(sources: Sources) -> Iterator[Entry]:
    """Yield the expressions; one without an id is numbered."""
    for number, path in enumerate(sources.annotations):
        for place, fields in enumerate(elements(path), start=1):
            key = fields.get("id")
            key = f"{number}-{place}" if key is None else str(key)
            yield Entry(f"{path}, entry {place}", key, fields)


def box_row(entry: Entry, sources: Sources) -> Row:
    """Return an expression's row; the reference has six decimals, the answer two.

    A box without area at two decimals cannot be trained on.
    """
    width, height = (_positive(entry, name) for name in ("width", "height"))
    edges = _edges(entry, width, height)
    if sources.padded:
        side = max(width, height)
        across, down = (side - width) // 2, (side - height) // 2  # as LLaVA's expand2square
        edges = [edges[0] + across, edges[1] + down, edges[2] + across, edges[3] + down]
        width = height = side
    shares = [edge / size for edge, size in zip(edges, [width, height] * 2, strict=True)]
    left, upper, right, lower = (round(share, 2) for share in shares)
    if not sources.scored and (left >= right or upper >= lower):
        raise Unusable(entry.origin, "`bbox` has no area at two decimals.")
    return to_row(
        entry,
        sources,
        field(entry, "image"),
        question=f"{BOX_REQUEST} {field(entry, 'expression')}",
        answer=_box(shares, 2),
        references=[_box(shares, 6)],
        columns=("category",),
    )


def _box(shares: list[float], decimals: int) -> str:
    return "[" + ", ".join(f"{share:.{decimals}f}" for share in shares) + "]"


def _positive(entry: Entry, name: str) -> int:
    value = entry.fields.get(name)
    if not isinstance(value, int) or not _is_pixels(value) or value < 1:
        raise Unusable(entry.origin, f"`{name}` must be a whole number of pixels.")
    return value


def _is_pixels(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # false for NaN


def _edges(entry: Entry, width: int, height: int) -> list[float]:
    """Return left, upper, right and lower edge in pixels, inside the image."""
    match entry.fields.get("bbox"):
        case [x, y, w, h] if all(map(_is_pixels, (x, y, w, h))):
            pass
        case _:
            raise Unusable(entry.origin, "`bbox` must be [x, y, width, height] in pixels.")
    edges = [x, y, x + w, y + h]
    limits = [width, height] * 2
    inside = [min(max(edge, 0.0), float(limit)) for edge, limit in zip(edges, limits, strict=True)]
    if any(abs(a - b) > TOLERANCE for a, b in zip(edges, inside, strict=True)):
        raise Unusable(entry.origin, "`bbox` exceeds the image.")
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise Unusable(entry.origin, "`bbox` has no area.")
    return inside
