"""Open the images in a client's folder that its rows name, and read their pixels.

A name in a row is untrusted. It must be relative to the image folder, stay inside it with all links
resolved, and belong to a plain file in one of `FORMATS`. Errors name the row and never the image,
whose name may identify a person; `ImageError.path` has it, to show to the owner of the data.

Pixels are read as LLaVA reads them: converted to RGB, transparency dropped, and an EXIF
orientation *not* applied.
"""

import math
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

_TOO_LARGE = f"has more than {MOST_PIXELS:,} pixels"

Colour = tuple[int, int, int]
"""RGB, each from 0 to 255."""


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
        windows = PureWindowsPath(self.name)  # knows both separators
        absolute = PurePosixPath(self.name).is_absolute() or windows.drive or windows.root
        if ".." in windows.parts or absolute:
            raise self._error("must be relative to the image folder and must not go up ('..')")
        try:
            folder = self.folder.resolve(strict=True)
            found = (folder / self.name).resolve(strict=True)
            plain = found.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
            reason = getattr(error, "strerror", None) or "not a valid file name"
            raise self._error(f"cannot be opened ({reason})") from None
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
            raise self._error(_TOO_LARGE) from None
        except Exception as error:  # as in `read`; Pillow's texts have the file's path
            raise self._error(f"cannot be read as an image ({type(error).__name__})") from None
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
