"""Images in a client's folder: which file a row may name, and how its pixels are read.

A name in a row is untrusted. It is relative to the image folder and must stay inside it, links
resolved, and must name a plain file in one of `FORMATS`. Errors name the row and never the image,
whose name may identify a person; `ImageError.path` has it, for the owner's own screen.

Pixels are read as LLaVA reads them: converted to RGB, transparency dropped, and an EXIF
orientation *not* applied.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from pilot_flwr.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Decoded formats, by Pillow's names; of several frames the first is used."""

MOST_PIXELS = 89_478_485
"""Largest image in pixels, padding included: Pillow's own bound against decompression bombs."""

MOST_STRETCHED = 100
"""Largest aspect ratio: processors that resize the shorter side make a thin image huge."""

Colour = tuple[int, int, int]
"""RGB, each from 0 to 255."""


class ImageError(DataError):
    """An image cannot be used.

    Attributes
    ----------
    path : str
        The image's name in the row; not part of the message.
    """

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


@dataclass(frozen=True)
class ImageFile:
    """An image of a row, read on demand."""

    folder: Path
    name: str
    origin: str
    background: Colour | None = None

    def read(self) -> Image.Image:
        """Return the decoded image in RGB."""
        with self._open() as image:
            try:
                image.load()
                # Pillow warns of palettes with transparency unless they are given alpha first.
                transparent = image.mode == "P" and "transparency" in image.info
                pixels = image.convert("RGBA") if transparent else image
                pixels = pixels.convert("RGB")
                if self.background is not None:
                    pixels = expand_to_square(pixels, self.background)
            except Exception as error:  # decoders raise all kinds on broken files
                raise self._error(f"cannot be decoded ({type(error).__name__})") from None
        return pixels

    def size(self) -> tuple[int, int]:
        """Return (height, width) of what `read` returns, from the file's header."""
        with self._open() as image:
            width, height = image.size
        if self.background is not None:
            width = height = max(width, height)
        return height, width

    def identity(self) -> str:
        """Return path, size, modification time and padding colour as one key."""
        path = self.path()
        try:
            stat = path.stat()
        except OSError as error:  # gone since
            raise self._error(f"cannot be opened ({error.strerror})") from None
        return f"{path}/{stat.st_size}/{stat.st_mtime_ns}/{self.background}"

    def path(self) -> Path:
        """Return the file, all links resolved."""
        if not self.name or "\0" in self.name:
            raise self._error("is empty or has a NUL in its name")
        if ".." in _parts(self.name) or _is_absolute(self.name):
            raise self._error("must be relative to the image folder and must not go up ('..')")
        try:
            folder = self.folder.resolve(strict=True)
            found = (folder / self.name).resolve(strict=True)
            plain = found.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
            what = getattr(error, "strerror", None) or "not a valid file name"
            raise self._error(f"cannot be opened ({what})") from None
        if not found.is_relative_to(folder):
            raise self._error("is a link that leads out of the image folder")
        if not plain:
            raise self._error("is not a file")
        return found

    def _open(self) -> Image.Image:
        path = self.path()
        try:
            image = Image.open(path, formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise self._too_large() from None
        except Exception as error:  # as in `read`; Pillow's texts have the file's path
            raise self._error(f"cannot be read as an image ({type(error).__name__})") from None
        if wrong := self._wrong_size(*image.size):
            image.close()
            raise wrong
        return image

    def _wrong_size(self, width: int, height: int) -> ImageError | None:
        longer, shorter = max(width, height), min(width, height)
        if longer * shorter > MOST_PIXELS:
            return self._too_large()
        if not shorter:
            return self._error("has no pixels")
        if self.background is not None and longer**2 > MOST_PIXELS:
            return self._error(f"has more than {MOST_PIXELS:,} pixels when padded to a square")
        if longer > MOST_STRETCHED * shorter:
            return self._error(
                f"has one side more than {MOST_STRETCHED} times as long as the other"
            )
        return None

    def _too_large(self) -> ImageError:
        return self._error(f"has more than {MOST_PIXELS:,} pixels")

    def _error(self, what: str) -> ImageError:
        return ImageError(f"{self.origin} {what}.", self.name)


def _parts(name: str) -> Sequence[str]:
    return PureWindowsPath(name).parts  # of both separators


def _is_absolute(name: str) -> bool:
    windows = PureWindowsPath(name)
    return PurePosixPath(name).is_absolute() or bool(windows.drive or windows.root)
