"""Everything about a client's rows that can be known before a training, and figures about them.

A row is taken through what training does with it: structure, images, tokens, and the references of
a test row through its metric's rule. Images are decoded even where the look that a client takes
before it trains (`pilot_flwr.data.screening`) reads headers only.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pilot_flwr.data.collator import IGNORE_INDEX
from pilot_flwr.data.examples import Example
from pilot_flwr.data.files import Split
from pilot_flwr.data.image_files import ImageError
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.data.partition import Rows
from pilot_flwr.data.screening import WholeImages
from pilot_flwr.errors import DataError

Tokenize = Callable[[Example], tuple[list[int], list[int]]]
"""Token ids and labels (or none) of an example; raises `DataError`."""

Unscored = Callable[[Example], object]
"""Raises `DataError` for references that a metric cannot score against."""

_CHUNK = 256
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
            found = list(pool.map(lambda position: _look(examples, position), positions))
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


def _look(examples: LlavaExamples, position: int) -> Example | Problem:
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
