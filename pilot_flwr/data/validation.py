"""Validate a client's rows before it trains, and describe them for `pilot-flwr data check`.

`usable` checks a whole split once: structure, images (present, inside the folder, with a valid
header; with `WholeImages`, decodable) and length in tokens. The result is cached on the client's
disk while the files and the settings that it depends on are unchanged, so that later messages of a
run do not check again.

`check_split` takes a row through all that training does with it and collects figures. It decodes
images even where `data.check_images=header` lets a run read headers only.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pilot_flwr.data.client_files import Rows, Split
from pilot_flwr.data.collator import IGNORE_INDEX
from pilot_flwr.data.examples import Example
from pilot_flwr.data.images import ImageError, ImageFile
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.errors import DataError

Check = Callable[[Example], object]
"""Raises `DataError` for an example that cannot be used, for instance `Collator.tokenize`."""

_CHUNK = 256


class WholeImages:
    """Decode images, each file once however many rows share it."""

    def __init__(self, workers: int = 0) -> None:
        self._workers = workers
        self._whole: set[tuple[Path, str]] = set()

    def decode(self, examples: Iterable[Example]) -> None:
        """Decode the images of some examples that were not decoded before."""
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
        """Raise `ImageError`, which names the row, unless all images of an example decode."""
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
    """Return the usable examples; raise `DataError` if more than a share `allowed` are broken.

    Of examples in memory, which are not rows of a file, only the ids are checked.
    """
    if not isinstance(examples, LlavaExamples):
        _check_ids(examples, name)
        return examples
    verdict = folder / f"{_key(examples, settings)}.json"
    broken = _cached(verdict)
    if broken is None:
        broken, first = _find_broken(examples, check, images)
        if len(broken) > allowed * len(examples):
            raise _refusal(len(broken), len(examples), first, name, allowed)
        folder.mkdir(parents=True, exist_ok=True)
        verdict.write_text(json.dumps(broken), encoding="utf-8")
        progress(f"{name}: {len(examples)} rows checked, {len(broken)} left out as broken")
    return examples.select(np.setdiff1d(np.arange(len(examples)), broken)) if broken else examples


def _find_broken(
    examples: LlavaExamples, check: Check, images: WholeImages | None
) -> tuple[list[int], str]:
    """Return the positions of the broken rows, and the first one's error."""
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
    """Raise unless ids are unique: they are the feature cache's keys."""
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


def _cached(path: Path) -> list[int] | None:
    """Return a cached result, None if it is absent or unreadable (after a crash)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) else None


Tokenize = Callable[[Example], tuple[list[int], list[int]]]
"""Token ids and labels (or none) of an example; raises `DataError`."""

Unscored = Callable[[Example], object]
"""Raises `DataError` for references that a metric cannot score against."""

_LONGEST_ANSWER = 60


@dataclass(frozen=True)
class Problem:
    """A defect of a row; `kind` is row, image, pixels, tokens or references.

    ``pixels`` is an image with a valid header that does not decode. `image` is its name in the row,
    for the owner's screen.
    """

    origin: str
    kind: str
    message: str
    image: str = ""


@dataclass
class SplitStatistics:
    """Figures of a client's split; lists have one per usable row.

    `decodes` is whether the run itself decodes images before training
    (``data.check_images=decode``), and so skips undecodable ones like other broken rows.
    """

    client: str
    task: str
    split: Split
    rows: int = 0
    allowed: float = 0.0
    decodes: bool = True
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    error: str = ""

    @property
    def usable(self) -> int:
        """Rows without a problem."""
        return self.rows - len(self.problems)

    @property
    def stops(self) -> bool:
        """Whether a run would fail at this split."""
        pixels = any(problem.kind == "pixels" for problem in self.problems)
        late = pixels and not self.decodes
        return bool(self.error) or late or len(self.problems) > self.allowed * self.rows

    def summary(self) -> dict[str, object]:
        """Return all figures as JSON types."""
        common, times = self.answers.most_common(1)[0] if self.answers else ("", 0)
        kinds = Counter(problem.kind for problem in self.problems)
        return {
            "client": self.client,
            "task": self.task,
            "split": self.split,
            "rows": self.rows,
            "usable": self.usable,
            "problems": dict(kinds),
            "stops": self.stops,
            "error": self.error,
            "images": self.images,
            "turns_mean": _mean(self.turns),
            "tokens_median": statistics.median(self.tokens) if self.tokens else None,
            "tokens_max": max(self.tokens, default=None),
            "labelled_tokens_mean": _mean(self.labelled),
            "labelled_tokens_min": min(self.labelled, default=None),
            "labelled_tokens_max": max(self.labelled, default=None),
            "answers": sum(self.answers.values()),
            "different_answers": len(self.answers),
            "most_frequent_answer": common,
            "most_frequent_answer_share": times / self.usable if self.usable else None,
        }


def check_split(
    examples: LlavaExamples,
    report: SplitStatistics,
    *,
    tokenize: Tokenize | None,
    images: WholeImages | None,
    workers: int,
    references: Unscored | None = None,
) -> SplitStatistics:
    """Check every row of a split and fill in its report."""
    report.rows = len(examples)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(examples), _CHUNK):
            positions = range(start, min(start + _CHUNK, len(examples)))
            found = list(pool.map(lambda position: _read_example(examples, position), positions))
            if images is not None:
                images.decode(row for row in found if isinstance(row, Example))
            for position, row in zip(positions, found, strict=True):
                if isinstance(row, Example):
                    origin = examples.origin(position)
                    problem = _decode_and_score(row, origin, images, references)
                    problem = problem or _count(row, origin, report, tokenize)
                else:
                    problem = row
                if problem is not None:
                    report.problems.append(problem)
    return report


def shared_rows(splits: Sequence[tuple[str, LlavaExamples]]) -> Iterator[tuple[str, str, int]]:
    """Yield pairs of splits that share rows, by name, and the number of rows."""
    places = [(name, _places(examples)) for name, examples in splits]
    for index, (name, mine) in enumerate(places):
        for other, theirs in places[index + 1 :]:
            common = sum(
                len(np.intersect1d(rows, theirs[path]))
                for path, rows in mine.items()
                if path in theirs
            )
            if common:
                yield name, other, common


def _places(examples: LlavaExamples) -> dict[str, Rows]:
    """Return the row numbers by file."""
    places: dict[str, list[int]] = {}
    for position in range(len(examples)):
        file, number = examples.place(position)
        places.setdefault(str(file.path), []).append(number)
    return {path: np.asarray(rows, np.int64) for path, rows in places.items()}


def _read_example(examples: LlavaExamples, position: int) -> Example | Problem:
    """Read a row and its images' headers."""
    origin = examples.origin(position)
    try:
        example: Example = examples[position]
    except DataError as error:
        return Problem(origin, "row", str(error))
    for image in example.images:
        try:
            image.size()
        except ImageError as error:
            return Problem(origin, "image", str(error), error.path)
    return example


def _decode_and_score(
    example: Example, origin: str, images: WholeImages | None, references: Unscored | None
) -> Problem | None:
    """Decode a row's images and check its references."""
    try:
        if images is not None:
            images.check(example)
    except ImageError as error:
        return Problem(origin, "pixels", str(error), error.path)
    try:
        if references is not None:
            references(example)
    except DataError as error:
        return Problem(origin, "references", str(error))
    return None


def _count(
    example: Example, origin: str, report: SplitStatistics, tokenize: Tokenize | None
) -> Problem | None:
    if tokenize is not None:
        try:
            ids, labels = tokenize(example)
        except DataError as error:
            return Problem(origin, "tokens", str(error))
        report.tokens.append(len(ids))
        if labels:
            report.labelled.append(sum(label != IGNORE_INDEX for label in labels))
    report.images += len(example.images)
    report.turns.append(len(example.turns))
    report.answers[example.answers[0][:_LONGEST_ANSWER]] += 1
    return None


def _mean(values: Sequence[int]) -> float | None:
    return round(statistics.fmean(values), 2) if values else None
