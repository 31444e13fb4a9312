"""Which of a client's rows can be used, found before it trains.

A whole split is looked at once: structure, images (that they are there, in the folder, and have
a header; with `WholeImages`, that they are whole), length in tokens. The verdict is kept on the
client's disk for as long as the files of rows and the settings that it depends on stay as they
are, so that later messages of the run do not look again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pilot_flwr.data.examples import Example
from pilot_flwr.data.image_files import ImageError, ImageFile
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.errors import DataError

Check = Callable[[Example], object]
"""Raises `DataError` for an example that cannot be used, for instance `Collator.tokenize`."""

_CHUNK = 256


class WholeImages:
    """Which images can be decoded; each file once, however many rows share it.

    Parameters
    ----------
    workers : int
        Threads that decode; 0 decodes in the caller's.
    """

    def __init__(self, workers: int = 0) -> None:
        self._workers = workers
        self._whole: set[tuple[Path, str]] = set()

    def decode(self, examples: Iterable[Example]) -> None:
        """Decode the images of some examples that were not decoded before; `check` then knows."""
        new: dict[tuple[Path, str], ImageFile] = {}
        for example in examples:
            for image in example.images:
                if isinstance(image, ImageFile) and (key := _file(image)) not in self._whole:
                    new.setdefault(key, image)
        if self._workers:
            with ThreadPoolExecutor(self._workers) as pool:
                self._whole.update(filter(None, pool.map(_whole, new.values())))
        else:
            self._whole.update(filter(None, map(_whole, new.values())))

    def check(self, example: Example) -> None:
        """Raise `ImageError`, which names the row, unless all images of an example are whole."""
        for image in example.images:
            if not isinstance(image, ImageFile) or _file(image) not in self._whole:
                image.read()


def _file(image: ImageFile) -> tuple[Path, str]:
    return image.folder, image.name


def _whole(image: ImageFile) -> tuple[Path, str] | None:
    try:
        image.read()
    except ImageError:
        return None  # `check` reads it again, for each row that has it
    return _file(image)


def usable(
    examples: Sequence[Example],
    *,
    name: str,
    check: Check,
    allowed: float,
    settings: str,
    folder: Path,
    progress: Callable[[str], None],
    images: WholeImages | None = None,
) -> Sequence[Example]:
    """Return the examples that can be used; all of them, unless some may be left out.

    Examples that are in memory are not rows of a file: only their ids are checked.

    Parameters
    ----------
    examples : sequence of Example
        A client's split.
    name : str
        What errors call it, such as ``train split of client 'gqa-0'``.
    check : callable
        Raises for an example that cannot be used.
    allowed : float
        Share of the rows that may be left out.
    settings : str
        Everything that `check` depends on besides the example, and whether there are `images`.
    folder : Path
        Where verdicts are kept.
    progress : callable
        Gets a line if rows were looked at.
    images : WholeImages, optional
        Every image is decoded too; without it, only as far as `check` reads it.

    Raises
    ------
    DataError
        More rows than allowed cannot be used; names the first, and counts the others. Or two
        examples have one id.
    """
    if not isinstance(examples, LlavaExamples):
        _check_ids(examples, name)
        return examples
    verdict = folder / f"{_key(examples, settings)}.json"
    broken = _kept(verdict)
    if broken is None:
        broken, first = _look(examples, check, images)
        if len(broken) > allowed * len(examples):
            raise _refusal(len(broken), len(examples), first, name, allowed)
        folder.mkdir(parents=True, exist_ok=True)
        verdict.write_text(json.dumps(broken), encoding="utf-8")
        progress(f"{name}: {len(examples)} rows checked, {len(broken)} left out as broken")
    return examples.select(np.setdiff1d(np.arange(len(examples)), broken)) if broken else examples


def _look(
    examples: LlavaExamples, check: Check, images: WholeImages | None
) -> tuple[list[int], str]:
    """Return the positions of the rows that cannot be used, and what is wrong with the first."""
    broken, first = [], ""
    for start in range(0, len(examples), _CHUNK):
        positions = range(start, min(start + _CHUNK, len(examples)))
        found = [_read(examples, position) for position in positions]
        if images is not None:
            images.decode(row for row in found if isinstance(row, Example))
        for position, row in zip(positions, found, strict=True):
            try:
                if isinstance(row, DataError):
                    raise row
                check(row)
                if images is not None:
                    images.check(row)
            except DataError as error:
                broken.append(position)
                first = first or str(error)
    return broken, first


def _read(examples: LlavaExamples, position: int) -> Example | DataError:
    try:
        example: Example = examples[position]
    except DataError as error:
        return error
    return example


def _refusal(broken: int, total: int, first: str, name: str, allowed: float) -> DataError:
    if allowed == 0:
        others = f" {broken - 1} further rows" if broken > 2 else " One further row"
        more = f"{others} of the {name} cannot be used either." if broken > 1 else ""
        return DataError(first + more)
    return DataError(
        f"{broken} of {total} rows of the {name} cannot be used, but `data.allowed_broken` is "
        f"{allowed}. The first: {first}"
    )


def _check_ids(examples: Sequence[Example], name: str) -> None:
    """Ids must be unique: they are the feature cache's keys."""
    counts = Counter(example.id for example in examples)
    if twice := [repr(name) for name, count in counts.items() if count > 1]:
        raise DataError(
            f"In the {name}, {len(twice)} ids belong to more than one example but must be unique: "
            f"{', '.join(twice[:3])}."
        )


def _key(examples: LlavaExamples, settings: str) -> str:
    files = [(str(file.path), file.stamp) for file in examples.files]
    text = f"{files}/{examples.reading}/{settings}/".encode()
    return hashlib.sha256(text + examples.rows.tobytes()).hexdigest()


def _kept(path: Path) -> list[int] | None:
    """Return a kept verdict; one that cannot be read, as after a crash, counts as absent."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) else None
