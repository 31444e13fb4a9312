"""Find the test rows that a client also trains on: the same images and the same question.

Images are the same if their pixels are, as the model sees them: a renamed, moved or losslessly
re-encoded copy is the same image. JPEG files are compared with each other by their bytes, since
re-encoding changes the pixels and decoding all of a large data set takes hours. Questions are
compared without markers, case and white space. A test row's question may be any question of a
training row, as LLaVA's files join an image's questions in one row; the questions of a test row
with several must begin a training row.

Images are opened only where questions match, and read only where their sizes match too.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pilot_flwr.data.examples import IMAGE_MARKER, Example, ImageSource
from pilot_flwr.data.images import ImageFile
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.errors import ConfigError, DataError

_JPEG = b"\xff\xd8\xff"


class Overlap(NamedTuple):
    """`rows` of `total` test rows are training rows too; `first` names one such pair."""

    rows: int
    total: int
    first: str = ""

    def exceeds(self, allowed: float) -> bool:
        """Return whether more than a share `allowed` of the test rows are training rows."""
        return self.rows > allowed * self.total

    def __str__(self) -> str:
        example = f", such as {self.first}" if self.first else ""
        return (
            f"{self.rows} of {self.total} test rows are training rows too (same images and "
            f"question){example}"
        )


def check_overlap(overlap: Overlap, key: str, allowed: float) -> None:
    """Raise `ConfigError` if the overlap exceeds the setting `key`, which is `allowed`."""
    if overlap.exceeds(allowed):
        raise ConfigError(
            f"{overlap}. Remove them from one of the files, or raise `{key}`, the allowed share of "
            f"test rows, which is {allowed:g}."
        )


class _Row(NamedTuple):
    """A row's name, and its images by their numbers in the list of all."""

    origin: str
    images: tuple[int, ...]


class _Place(NamedTuple):
    """The place of an embedded image: the rows, the row's position, the image's number there."""

    rows: LlavaExamples
    position: int
    number: int


_Group = tuple[list[_Row], list[_Row]]
"""Test rows and training rows that match so far."""


def find_overlap(train: Sequence[LlavaExamples], test: LlavaExamples, *, workers: int) -> Overlap:
    """Count the rows of `test` that are also in `train`; broken rows are ignored."""
    images = _Images(workers)
    groups = images.narrow(_same_questions(train, test, images), images.facts)
    lossless = [group for group in groups if not images.all_jpeg(group)]
    jpeg = [group for group in groups if images.all_jpeg(group)]
    jpeg = images.narrow(images.narrow(jpeg, images.lengths), images.file_digests)
    same = [*images.narrow(lossless, images.pixel_digests), *jpeg]
    first = min(((test[0].origin, train[0].origin) for test, train in same), default=("", ""))
    rows = sum(len(test) for test, _ in same)
    return Overlap(rows, len(test), " and ".join(first) if rows else "")


def cached_overlap(
    train: Sequence[LlavaExamples], test: LlavaExamples, folder: Path, *, workers: int
) -> Overlap:
    """Return `find_overlap`, cached in a folder until the row files change."""
    parts = "".join(part.digest("overlap") for part in (*train, test))
    path = folder / f"overlap-{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"
    try:
        return Overlap(*json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent, or torn by a crash
        found = find_overlap(train, test, workers=workers)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _same_questions(
    train: Sequence[LlavaExamples], test: LlavaExamples, images: "_Images"
) -> list[_Group]:
    """Group the rows by the questions that occur in both splits."""
    asked = {_questions(example)[-1] for _, example in _readable(test)}
    groups: dict[tuple[str, ...], _Group] = defaultdict(lambda: ([], []))
    for part in train:
        for position, example in _readable(part):
            for question in asked.intersection(_questions(example)):
                row = _Row(part.origin(position), images.add(part, position, example.images))
                groups[question][1].append(row)
    for position, example in _readable(test):
        if (question := _questions(example)[-1]) in groups:
            row = _Row(test.origin(position), images.add(test, position, example.images))
            groups[question][0].append(row)
    return list(groups.values())


def _readable(examples: LlavaExamples) -> Iterator[tuple[int, Example]]:
    for position in range(len(examples)):
        try:
            example: Example = examples[position]
        except DataError:
            continue
        yield position, example


def _questions(example: Example) -> list[tuple[str, ...]]:
    """Return each question alone, and each beginning of several; the last one is the row's."""
    texts = [turn.text.replace(IMAGE_MARKER, " ") for turn in example.turns if turn.role == "user"]
    plain = [" ".join(text.split()).casefold() for text in texts]
    return [*((text,) for text in plain), *(tuple(plain[:n]) for n in range(2, len(plain) + 1))]


class _Images:
    """The images of all rows, each once, read by `workers` threads.

    An image embedded in a row is read from the row again whenever it is needed.
    """

    def __init__(self, workers: int) -> None:
        self._workers = max(workers, 1)
        self._numbers: dict[object, int] = {}
        self._sources: list[ImageSource | _Place] = []
        self._jpeg: set[int] = set()

    def add(
        self, rows: LlavaExamples, position: int, images: Iterable[ImageSource]
    ) -> tuple[int, ...]:
        """Return the numbers of a row's images."""
        found = []
        for index, image in enumerate(images):
            key = image.key if isinstance(image, ImageFile) else id(image)
            if key not in self._numbers:
                self._numbers[key] = len(self._sources)
                embedded = isinstance(image, ImageFile) and image.data is not None
                self._sources.append(_Place(rows, position, index) if embedded else image)
            found.append(self._numbers[key])
        return tuple(found)

    def narrow(self, groups: Sequence[_Group], read: Callable[[int], object]) -> list[_Group]:
        """Split groups by the values of `read` for their images; drop one-sided groups."""

        def attempt(number: int) -> object | None:
            try:
                return read(number)
            except (DataError, OSError):  # a broken image matches nothing
                return None

        numbers = {n for group in groups for side in group for row in side for n in row.images}
        with ThreadPoolExecutor(self._workers) as pool:
            found = dict(zip(numbers, pool.map(attempt, numbers), strict=True))
        parts: dict[Any, _Group] = defaultdict(lambda: ([], []))
        for index, group in enumerate(groups):
            for side, rows in enumerate(group):
                for row in rows:
                    values = tuple(found[n] for n in row.images)
                    if None not in values:
                        parts[index, values][side].append(row)
        return [group for group in parts.values() if all(group)]

    def all_jpeg(self, group: _Group) -> bool:
        """Return whether the images of a group, opened before, are JPEG files."""
        return all(self._jpeg.issuperset(row.images) for side in group for row in side)

    def facts(self, number: int) -> object:
        """Return an image's height and width."""
        source = self._source(number)
        if isinstance(source, ImageFile):
            with source.open() as file:
                if file.read(len(_JPEG)) == _JPEG:
                    self._jpeg.add(number)
        return source.size()

    def lengths(self, number: int) -> object:
        """Return the size of an image's file."""
        with self._open(number) as file:
            return file.seek(0, os.SEEK_END)

    def file_digests(self, number: int) -> object:
        """Return a digest of an image's file."""
        with self._open(number) as file:
            return hashlib.blake2b(file.read(), digest_size=16).digest()

    def pixel_digests(self, number: int) -> object:
        """Return a digest of an image's pixels."""
        return hashlib.blake2b(self._source(number).read().tobytes(), digest_size=16).digest()

    def _open(self, number: int) -> BinaryIO:
        source = self._source(number)
        assert isinstance(source, ImageFile), "only files are JPEG files"
        return source.open()

    def _source(self, number: int) -> ImageSource:
        source = self._sources[number]
        if not isinstance(source, _Place):
            return source
        example: Example = source.rows[source.position]
        return example.images[source.number]
