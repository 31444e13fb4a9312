"""Open the images in a client's folder that its rows name, and read their pixels.

A name in a row is untrusted. It must be relative to the image folder and belong to a plain file in
one of `FORMATS` that lies, after resolving links, in this folder or in another one that the data's
owner allows links to lead to. Errors name the row and never the image, whose name may identify a
person; `ImageError.path` has it, to show to the owner of the data.

Pixels are read as viewers show them: in RGB, with transparency on white and the EXIF orientation
applied. The official reading is that of LLaVA's code, which ignores transparency and orientation.
In both, 16-bit greys keep their upper 8 bits.
"""

import contextlib
import functools
import hashlib
import io
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from pilot_flwr.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Decoded formats, by Pillow's names; of several frames the first is used."""

MOST_PIXELS = 89_478_485
"""Largest image in pixels, padding included: Pillow's own bound against decompression bombs."""

MOST_STRETCHED = 100
"""Largest aspect ratio: processors that resize the shorter side make a thin image huge."""

_TOO_LARGE = f"has more than {MOST_PIXELS:,} pixels"

_BITS_PER_SAMPLE = 258  # in TIFF
_ORIENTATION = 0x0112  # in EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transpose that sets an image upright, by EXIF orientation."""

_OTHER_FORMATS = {
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIF",
    b"ftypmp4": "a video",
    b"ftypisom": "a video",
    b"%!ps": "PostScript",
    b"%pdf": "a PDF file",
    b"pk\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"8bps": "a Photoshop file",
}
"""Signatures, in lower case, of files that Pillow cannot or must not open."""

_FILTERS = threading.Lock()

Colour = tuple[int, int, int]
"""RGB, each from 0 to 255."""


class Header(NamedTuple):
    """An image's size as `ImageFile.read` returns it, and properties that change its pixels."""

    height: int
    width: int
    transparent: bool
    """It has an alpha channel or a transparent colour."""
    turned: bool
    """It has an EXIF orientation other than upright."""


class ImageError(DataError):
    """An image cannot be used; its name in the row is in `path` and not in the message."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def mean_colour(image_processor: Any) -> Colour:
    """Return the image processor's mean colour, truncated as LLaVA does for padding."""
    red, green, blue = (math.floor(255 * mean) for mean in image_processor.image_mean)
    return red, green, blue


def expand_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    """Pad an image to a square as LLaVA-1.5 does; an odd pixel goes below or to the right."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def to_rgb(image: Image.Image, *, official: bool = False) -> Image.Image:
    """Return an image in RGB: transparency on white, greys of 12 and 16 bits as their upper 8.

    With `official`, transparency is dropped and shows the colours below it.

    Raises
    ------
    ImageError
        If the grey values have no known range, so that Pillow would clip them.
    """
    transparent = image.info.get("transparency")
    if image.mode == "F":
        raise ImageError("has floating-point grey values; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        (bits, *_) = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        if bits > 16:  # nothing says which of the values is white
            raise ImageError(f"has grey values of {bits} bits; save it with 8 or 16 bits")
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65_535:
            raise ImageError("has grey values outside 0 to 65,535; save it with 8 or 16 bits")
        levels = values >> (bits - 8)
        if transparent is not None and not official:
            levels[values == transparent] = 255
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if isinstance(transparent, tuple) and max(transparent) > 255 and not official:
        raise ImageError("has a transparent colour of 16 bits; save it with 8 bits")
    if official:
        image.info.pop("transparency", None)  # Pillow would warn of a palette's
    elif image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings, such as those about corrupt EXIF data; errors name the row.

    Warning filters are process-wide, hence the lock.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if it is missing, unknown or unreadable."""
    try:
        with _quiet():
            found = image.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata raises many types
        return 1
    return found if found in _TURNS else 1


def _open(source: Path | io.BytesIO) -> Image.Image:
    try:
        return Image.open(source, formats=FORMATS)
    except ValueError as error:  # a PNG with more text than Pillow accepts
        if "MAX_TEXT" not in str(error):
            raise
    return Image.open(_without_text(source), formats=FORMATS)


def _without_text(source: Path | io.BytesIO) -> io.BytesIO:
    """Return a PNG file without its text chunks."""
    data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[place:end])
        place = end
    return io.BytesIO(b"".join(kept))


@functools.lru_cache(maxsize=1 << 18)
def _content(path: Path, size: int, modified: int) -> str:
    """Return a file's SHA-256, cached by size and modification time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=1 << 16)
def _header(image: "ImageFile", size: int, modified: int) -> "Header":
    """Return an image's header, cached by its file's size and modification time."""
    return image.read_header()


def _file_kind(image: "ImageFile") -> str:
    """Describe a file that cannot be read as an image; empty if its kind is unknown."""
    try:
        with image.open() as stream:
            begin = stream.read(512)
    except OSError as error:
        return error.strerror or ""
    if not begin:
        return "the file is empty"
    if begin.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: run `git lfs pull`"
    text = begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, as a failed download leaves it"
    if text.startswith((b"../", b"./")) and text.strip().isascii() and b"\n" not in text.strip():
        return "a path in a text file, as copying a link may leave it: copy the link's target"
    for signature, name in _OTHER_FORMATS.items():
        if signature in begin[4:16] or text.startswith(signature):
            return f"{name}, which is not supported; allowed are {', '.join(FORMATS)}"
    known = begin.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*", b"MM"))
    return "truncated or damaged" if known else "in no supported format"


@dataclass(frozen=True)
class ImageFile:
    """An image of a row, read on demand: a file, or `data` embedded in the row."""

    folder: Path
    name: str
    origin: str
    background: Colour | None = None
    official: bool = False
    linked_folders: tuple[Path, ...] = ()
    data: bytes | memoryview | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> object:
        """A key of the image's source, which rows may share."""
        if self.data is not None:
            return hashlib.sha256(self.data).digest()
        return self.folder, self.name

    def open(self) -> BinaryIO:
        """Open the undecoded image; raise `ImageError` or `OSError`."""
        return self.path().open("rb") if self.data is None else io.BytesIO(self.data)

    def read(self) -> Image.Image:
        """Return the decoded image in RGB."""
        with self._open() as image:
            orientation = 1 if self.official else _orientation(image)
            try:
                if image.format == "TIFF":  # Pillow rotates these, and rereads their EXIF data
                    with _quiet():
                        image.load()
                elif orientation > 1:
                    image = image.transpose(_TURNS[orientation])
                pixels = to_rgb(image, official=self.official)
                if self.background is not None:
                    pixels = expand_to_square(pixels, self.background)
            except ImageError as error:
                raise self._error(str(error)) from None
            except Exception as error:  # decoders raise all kinds on broken files
                cut = "truncated: the file ends before its image does; download or save it again"
                reason = cut if "truncated" in str(error) else type(error).__name__
                raise self._error(f"cannot be decoded ({reason})") from None
        return pixels

    def size(self) -> tuple[int, int]:
        """Return (height, width) of what `read` returns, from the file's header."""
        return self.header()[:2]

    def header(self) -> Header:
        """Read the file's header, again only if the file has changed."""
        return self.read_header() if self.data is not None else _header(self, *self._stamp()[1:])

    def read_header(self) -> Header:
        """Read the file's header."""
        with self._open() as image:
            width, height = image.size
            orientation, transparent = _orientation(image), image.has_transparency_data
            if orientation > 4 and not self.official and image.format != "TIFF":
                width, height = height, width
        if self.background is not None:
            width = height = max(width, height)
        return Header(height, width, transparent, orientation > 1)

    def identity(self) -> str:
        """Return a key of the file's content and the way it is read."""
        reading = f"{self.background}/{'official' if self.official else 'upright on white'}"
        if self.data is not None:
            return f"{hashlib.sha256(self.data).hexdigest()}/{reading}"
        try:
            content = _content(*self._stamp())
        except OSError as error:  # gone since
            raise self._error(f"cannot be opened ({error.strerror})") from None
        return f"{content}/{reading}"

    def _stamp(self) -> tuple[Path, int, int]:
        """Return the file, its size in bytes and its modification time in nanoseconds."""
        path = self.path()
        try:
            stat = path.stat()
        except OSError as error:  # gone since
            raise self._error(f"cannot be opened ({error.strerror})") from None
        return path, stat.st_size, stat.st_mtime_ns

    def path(self) -> Path:
        """Return the file, all links resolved."""
        if not self.name or "\0" in self.name:
            raise self._error("is empty or has a NUL in its name")
        windows = PureWindowsPath(self.name)  # knows both separators
        absolute = PurePosixPath(self.name).is_absolute() or windows.drive or windows.root
        if ".." in windows.parts or absolute:
            raise self._error("must be relative to the image folder and must not go up ('..')")
        try:
            folder = self.folder.resolve(strict=True)
            allowed = [folder, *(linked.resolve() for linked in self.linked_folders)]
            found = (folder / self.name).resolve(strict=True)
            plain = found.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
            reason = getattr(error, "strerror", None) or "not a valid file name"
            raise self._error(f"cannot be opened ({reason})") from None
        if not any(found.is_relative_to(place) for place in allowed):
            raise self._error(
                "is a link that leads out of the image folder; list the folders that links may "
                "lead to in `linked-folders` of a site's node config, or in `data.linked_folders` "
                "of a simulation"
            )
        if not plain:
            raise self._error("is not a file")
        return found

    def _open(self) -> Image.Image:
        source = self.path() if self.data is None else io.BytesIO(self.data)
        try:
            with _quiet():
                image = _open(source)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise self._error(_TOO_LARGE) from None
        except Exception as error:  # as in `read`; Pillow's texts have the file's path
            reason = _file_kind(self) or type(error).__name__
            raise self._error(f"cannot be read as an image ({reason})") from None
        shorter, longer = sorted(image.size)
        if longer * shorter > MOST_PIXELS:
            defect = _TOO_LARGE
        elif not shorter:
            defect = "has no pixels"
        elif self.background is not None and longer**2 > MOST_PIXELS:
            defect = f"{_TOO_LARGE} when padded to a square"
        elif longer > MOST_STRETCHED * shorter:
            defect = f"has one side more than {MOST_STRETCHED} times as long as the other"
        else:
            return image
        image.close()
        raise self._error(defect)

    def _error(self, defect: str) -> ImageError:
        return ImageError(f"{self.origin} {defect}.", self.name)
