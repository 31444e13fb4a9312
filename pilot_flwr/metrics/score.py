"""A metric: a function of all predictions and their references, with its name and range."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pilot_flwr.errors import DataError

References = Sequence[Sequence[str]]
"""The reference answers of each prediction."""


class Score(NamedTuple):
    """A metric's figure for a test split, `mean`, and for `each` prediction.

    For BLEU, which is defined on a corpus, `mean` is the corpus' figure and not the mean of `each`.
    """

    mean: float
    each: list[float]


@dataclass(frozen=True)
class Metric:
    """A metric of a task's answers.

    Parameters
    ----------
    title : str
        The name in tables.
    score : callable
        Return the `Score` of predictions and their references. Raises `DataError` as
        `check_pairs` does.
    maximum : float
        The largest possible figure; the smallest is 0.
    approximate : callable
        Return why figures are approximate on this machine, or an empty text if they are exact.
    check : callable
        Raise `DataError`, without quoting them, for one example's references that the metric
        cannot use; called before anything is predicted.
    """

    title: str
    score: Callable[[Sequence[str], References], Score]
    maximum: float = 1.0
    approximate: Callable[[], str] = lambda: ""
    check: Callable[[Sequence[str]], object] = lambda references: None


def per_prediction(
    function: Callable[[str, Sequence[str]], float],
) -> Callable[[Sequence[str], References], Score]:
    """Return a scorer that averages `function` over the predictions."""

    def score(predictions: Sequence[str], references: References) -> Score:
        check_pairs(predictions, references)
        each = list(map(function, predictions, references))
        return Score(sum(each) / len(each), each)

    return score


def check_pairs(predictions: Sequence[str], references: References) -> None:
    """Raise `DataError` unless there are predictions, each with a list of references."""
    if not predictions:
        raise DataError("There is no prediction to score.")
    if len(predictions) != len(references):
        raise DataError(
            f"There are {len(predictions)} predictions but references for {len(references)}."
        )
    for number, answers in enumerate(references, start=1):
        if isinstance(answers, str):
            raise DataError(f"The references of prediction {number} must be a list of texts.")
        if not answers:
            raise DataError(f"Prediction {number} has no reference to be scored against.")
