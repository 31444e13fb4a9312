"""Validate a client's rows before it trains, and describe them for `pilot-flwr data check`.

`usable` checks a whole split once: structure, images (present, inside the folder, with a valid
header; with `WholeImages`, decodable) and length in tokens. The result is cached on the client's
disk until the files or the relevant settings change, so that later messages of a run skip the
check.

`check_split` takes each row through the same steps as training and collects figures. It decodes
images even where `data.check_images=header` lets a run read headers only.
"""

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pilot_flwr.data.client_files import Split
from pilot_flwr.data.collator import IGNORE_INDEX
from pilot_flwr.data.examples import Example
from pilot_flwr.data.images import Header, ImageError, ImageFile
from pilot_flwr.data.llava import LlavaExamples
from pilot_flwr.data.overlap import Overlap
from pilot_flwr.errors import DataError
from pilot_flwr.formatting import count

Check = Callable[[Example], object]
"""Raises `DataError` for an unusable example, for instance `Collator.tokenize`."""

Checks = Mapping[str, Check]
"""Checks by the kind of problem that they find."""

Tokenize = Callable[[Example], tuple[list[int], list[int]]]
"""Token ids and labels (or none) of an example; raises `DataError`."""

_CHUNK = 256
_LONGEST_ANSWER = 60


class WholeImages:
    """Decode images, each file once however many rows share it."""

    def __init__(self, workers: int = 0) -> None:
        self._workers = max(workers, 1)
        self._whole: set[object] = set()

    def decode(self, examples: Iterable[Example]) -> None:
        """Decode the images of some examples that were not decoded before."""
        images = (image for example in examples for image in example.images)
        files = {image.key: image for image in images if isinstance(image, ImageFile)}
        new = {key: image for key, image in files.items() if key not in self._whole}
        with ThreadPoolExecutor(self._workers) as pool:
            decodes = pool.map(_decodes, new.values())
            self._whole.update(key for key, whole in zip(new, decodes, strict=True) if whole)

    def check(self, example: Example) -> None:
        """Raise `ImageError`, which names the row, unless all images of an example decode."""
        for image in example.images:
            if not isinstance(image, ImageFile) or image.key not in self._whole:
                image.read()


def _decodes(image: ImageFile) -> bool:
    try:
        image.read()
    except ImageError:
        return False  # `check` reads it again, for each of its rows
    return True


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

    Examples in memory, which are not rows of a file, are only checked for unique ids.
    """
    if not isinstance(examples, LlavaExamples):
        _check_ids(examples, name)
        return examples
    cache = folder / f"{examples.digest(settings)}.json"
    broken = _cached(cache)
    if broken is None:
        problems = list(_problems(examples, {}, {"tokens": check}, images))
        broken = [position for position, _ in problems]
        if len(broken) > allowed * len(examples):
            raise _refusal(len(broken), len(examples), problems[0][1].message, name, allowed)
        folder.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(broken), encoding="utf-8")
        progress(f"{name}: {len(examples)} rows checked, {len(broken)} left out as broken")
    return examples.select(np.setdiff1d(np.arange(len(examples)), broken)) if broken else examples


def _refusal(broken: int, total: int, first: str, name: str, allowed: float) -> DataError:
    if allowed == 0:
        others = f" {count(broken - 1, 'further row')} of the {name} cannot be used either."
        return DataError(first + others if broken > 1 else first)
    return DataError(
        f"{broken} of {total} rows of the {name} cannot be used, but `data.allowed_broken` is "
        f"{allowed}. The first: {first}"
    )


def _check_ids(examples: Sequence[Example], name: str) -> None:
    """Raise unless ids are unique."""
    counts = Counter(example.id for example in examples)
    if twice := [repr(name) for name, count in counts.items() if count > 1]:
        ids = ", ".join(twice[:3])
        raise DataError(f"In the {name}, {len(twice)} ids belong to more than one example: {ids}.")


def _cached(path: Path) -> list[int] | None:
    """Return a cached result, None if it is absent or unreadable (after a crash)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) else None


@dataclass(frozen=True)
class Problem:
    """A defect of a row; `kind` is row, image, pixels, tokens or references.

    ``pixels`` is an image with a valid header that does not decode. `image` is the image's name,
    shown only to the owner of the data.
    """

    origin: str
    kind: str
    message: str
    image: str = ""


@dataclass
class SplitStatistics:
    """Figures of a client's split; lists have one per usable row.

    Of the `images` of usable rows, `transparent` ones have an alpha channel or a transparent
    colour, `turned` ones an EXIF orientation other than upright.
    If `decodes` (``data.check_images=decode``), the run decodes images before training and skips
    undecodable ones like other broken rows. A test split has its `overlap` with the training split.
    """

    client: str
    task: str
    split: Split
    rows: int = 0
    allowed: float = 0.0
    decodes: bool = True
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    transparent: int = 0
    turned: int = 0
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    error: str = ""
    overlap: Overlap = Overlap(0, 0)
    allowed_overlap: float = 0.0

    @property
    def usable(self) -> int:
        """Rows without a problem."""
        return self.rows - len(self.problems)

    @property
    def stops(self) -> bool:
        """True if a run would fail at this split."""
        late = not self.decodes and any(problem.kind == "pixels" for problem in self.problems)
        broken = late or len(self.problems) > self.allowed * self.rows
        return bool(self.error) or broken or self.overlap.exceeds(self.allowed_overlap)

    def summary(self) -> dict[str, object]:
        """Return all figures as JSON types."""
        split = ("client", "task", "split", "rows", "usable", "stops", "error")
        names = (*split, "images", "transparent", "turned")
        common, times = self.answers.most_common(1)[0] if self.answers else ("", 0)
        return {
            **{name: getattr(self, name) for name in names},
            "overlap": self.overlap.rows,
            "problems": dict(Counter(problem.kind for problem in self.problems)),
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


def _mean(values: Sequence[int]) -> float | None:
    return round(statistics.fmean(values), 2) if values else None


def check_split(
    examples: LlavaExamples,
    figures: SplitStatistics,
    *,
    tokenize: Tokenize | None,
    images: WholeImages | None,
    workers: int,
    references: Check | None = None,
) -> SplitStatistics:
    """Check every row of a split and fill in its figures.

    `references` raises `DataError` for references that the task's metric cannot score against.
    """
    headers: dict[str, Header] = {}

    def read_headers(example: Example) -> None:
        for image in example.images:
            if isinstance(image, ImageFile):
                headers[image.origin] = image.header()

    def add(example: Example) -> None:
        if tokenize is not None:
            ids, labels = tokenize(example)
            figures.tokens.append(len(ids))
            if labels:
                figures.labelled.append(sum(label != IGNORE_INDEX for label in labels))
        figures.images += len(example.images)
        found = [headers.pop(i.origin) for i in example.images if isinstance(i, ImageFile)]
        figures.transparent += sum(header.transparent for header in found)
        figures.turned += sum(header.turned for header in found)
        figures.turns.append(len(example.turns))
        figures.answers[example.answers[0][:_LONGEST_ANSWER]] += 1

    checks: Checks = {"tokens": add}  # the last one, so that it counts usable rows
    if references is not None:
        checks = {"references": references, **checks}
    figures.rows = len(examples)
    with ThreadPoolExecutor(workers) as pool:
        found = _problems(examples, {"image": read_headers}, checks, images, pool.map)
        figures.problems += [problem for _, problem in found]
    return figures


def _problems(
    examples: LlavaExamples,
    header_checks: Checks,
    checks: Checks,
    images: WholeImages | None,
    apply: Callable[..., Iterable[Example | Problem]] = map,
) -> Iterator[tuple[int, Problem]]:
    """Yield position and first problem of each broken row; `apply` reads rows and headers."""

    def read(position: int) -> Example | Problem:
        origin = examples.origin(position)
        try:
            example: Example = examples[position]
        except DataError as error:
            return Problem(origin, "row", str(error))
        return _find_problem(example, origin, header_checks) or example

    if images is not None:
        checks = {"pixels": images.check, **checks}
    for start in range(0, len(examples), _CHUNK):
        positions = range(start, min(start + _CHUNK, len(examples)))
        rows = list(apply(read, positions))
        if images is not None:
            images.decode(row for row in rows if isinstance(row, Example))
        for position, row in zip(positions, rows, strict=True):
            if isinstance(row, Problem):
                yield position, row
            elif problem := _find_problem(row, examples.origin(position), checks):
                yield position, problem


def _find_problem(example: Example, origin: str, checks: Checks) -> Problem | None:
    for kind, check in checks.items():
        try:
            check(example)
        except DataError as error:
            return Problem(origin, kind, str(error), getattr(error, "path", ""))
    return None


def shared_rows(splits: Sequence[tuple[str, LlavaExamples]]) -> Iterator[tuple[str, str, int]]:
    """Yield the names of each pair of splits that share rows, and the number of shared rows."""
    rows = [(name, _rows_by_file(examples)) for name, examples in splits]
    for (name, mine), (other, theirs) in itertools.combinations(rows, 2):
        common = sum(len(mine[path] & theirs[path]) for path in mine.keys() & theirs.keys())
        if common:
            yield name, other, common


def _rows_by_file(examples: LlavaExamples) -> dict[Path, set[int]]:
    found: dict[Path, set[int]] = {}
    for position in range(len(examples)):
        file, number = examples.place(position)
        found.setdefault(examples.files[file].path, set()).add(number)
    return found
