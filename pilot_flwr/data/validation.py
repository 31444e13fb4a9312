"""Which of a client's rows can be used, found before it trains.

A whole split is looked at once: structure, images (that they are there, in the folder, and have
a header; with `WholeImages`, that they are whole), length in tokens. The verdict is kept on the
client's disk for as long as the files of rows and the settings that it depends on stay as they
are, so that later messages of the run do not look again.

Everything about a client's rows that can be known before a training, and figures about them.

A row is taken through what training does with it: structure, images, tokens, and the references of
a test row through its metric's rule. Images are decoded even where the look that a client takes
before it trains (`pilot_flwr.data.validation`) reads headers only.
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

from pilot_flwr.data.client_files import Split
from pilot_flwr.data.collator import IGNORE_INDEX
from pilot_flwr.data.examples import Example
from pilot_flwr.data.images import ImageError, ImageFile
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.data.partition import Rows
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


Tokenize = Callable[[Example], tuple[list[int], list[int]]]
"""Token ids and labels (or none) of an example; raises `DataError`."""

Unscored = Callable[[Example], object]
"""Raises `DataError` for references that a metric cannot score against."""

_LONGEST_ANSWER = 60


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row: `kind` is row, image, pixels, tokens or references.

    ``pixels`` is an image whose header is fine, so that it has to be decoded to find out. `image`
    is its name in the row, for the owner's eyes.
    """

    origin: str
    kind: str
    message: str
    image: str = ""


@dataclass
class SplitReport:
    """What was found in a client's split; lists have a figure per usable row.

    `decodes` is whether the run itself decodes images before it trains
    (``data.check_images=decode``), so that it leaves out what is broken behind its header as it
    leaves out other broken rows.
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
        """Whether a run would stop at this split."""
        pixels = any(problem.kind == "pixels" for problem in self.problems)
        late = pixels and not self.decodes
        return bool(self.error) or late or len(self.problems) > self.allowed * self.rows

    def summary(self) -> dict[str, object]:
        """Return all figures in JSON types."""
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
    report: SplitReport,
    *,
    tokenize: Tokenize | None,
    images: WholeImages | None,
    workers: int,
    references: Unscored | None = None,
) -> SplitReport:
    """Look at every row of a split and write into its report.

    Parameters
    ----------
    examples : LlavaExamples
        The split.
    report : SplitReport
        Without figures.
    tokenize : callable, optional
        Without it tokens are not looked at.
    images : WholeImages, optional
        Decode images; without it, only their headers are read.
    workers : int
        Threads that read headers.
    references : callable, optional
        Looks at an example's references.

    Returns
    -------
    SplitReport
        The same one.
    """
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
                    problem = _behind(row, origin, images, references)
                    problem = problem or _count(row, origin, report, tokenize)
                else:
                    problem = row
                if problem is not None:
                    report.problems.append(problem)
    return report


def shared_rows(splits: Sequence[tuple[str, LlavaExamples]]) -> Iterator[tuple[str, str, int]]:
    """Yield pairs of splits, by name, that have rows in common, and how many.

    Parameters
    ----------
    splits : sequence of tuple
        Name and examples.
    """
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


def _behind(
    example: Example, origin: str, images: WholeImages | None, references: Unscored | None
) -> Problem | None:
    """Look behind the headers of a row's images, and at its references."""
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
    example: Example, origin: str, report: SplitReport, tokenize: Tokenize | None
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
