"""What a metric is: a function of all predictions and their references, and what it is called.

And what the mean over tasks is, which everything that shows one takes from here.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pilot_flwr.errors import DataError

References = Sequence[Sequence[str]]
"""Per prediction, the answers that it is scored against."""


class Score(NamedTuple):
    """A metric's figure for a test split: `mean`, and `each` prediction's own figure.

    For BLEU, which is defined on a corpus, `mean` is the corpus' figure and not the mean of `each`.
    """

    mean: float
    each: list[float]


def any_references(references: Sequence[str]) -> None:
    """Accept the references of a prediction, for a metric that any will do for."""


def exact() -> str:
    """Return the empty reason of a metric whose figure is never an approximation."""
    return ""


def mean_of_all(scores: Mapping[str, float], tasks: Collection[str]) -> float | None:
    """Return the mean over tasks, every task counting the same, and None if one has no score.

    A mean over the tasks that happen to have a score would rise when the hardest one fails.

    Parameters
    ----------
    scores : mapping
        Task → score.
    tasks : collection of str
        All tasks of the run.
    """
    if not tasks or not scores.keys() >= set(tasks):
        return None
    return math.fsum(scores[task] for task in tasks) / len(tasks)


@dataclass(frozen=True)
class Metric:
    """A row of the table of metrics.

    Parameters
    ----------
    title : str
        What tables call it.
    score : callable
        Takes the predictions, and the references of each; returns their `Score`. Raises
        `DataError` if there is no prediction, if some prediction has no reference, or if there
        are not as many lists of references as predictions.
    maximum : float
        The largest possible figure; the smallest is 0.
    approximate : callable
        Returns why figures taken now are approximate, or an empty text if they are not.
    check : callable
        Raises `DataError`, without a text of theirs, if one prediction's references are not what
        the metric can score against; so this is known before anything is predicted.
    """

    title: str
    score: Callable[[Sequence[str], References], Score]
    maximum: float = 1.0
    approximate: Callable[[], str] = exact
    check: Callable[[Sequence[str]], object] = any_references


def per_prediction(
    function: Callable[[str, Sequence[str]], float],
) -> Callable[[Sequence[str], References], Score]:
    """Return the scorer whose figure is the mean of `function` over the predictions."""

    def score(predictions: Sequence[str], references: References) -> Score:
        check_pairs(predictions, references)
        each = [
            function(prediction, answers)
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return Score(sum(each) / len(each), each)

    return score


def check_pairs(predictions: Sequence[str], references: References) -> None:
    """Raise `DataError` unless every prediction has references, and there is a prediction."""
    if not predictions:
        raise DataError("There is no prediction to score.")
    if len(predictions) != len(references):
        raise DataError(
            f"There are {len(predictions)} predictions but references for {len(references)}."
        )
    for number, answers in enumerate(references, start=1):
        if isinstance(answers, str):
            raise DataError(
                f"The references of prediction {number} are one text but must be a list of texts."
            )
        if not answers:
            raise DataError(f"Prediction {number} has no reference to be scored against.")
