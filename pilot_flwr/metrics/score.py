"""A metric: a function of all predictions and their references, with its name and range."""

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Metric:
    """A metric by which a task can be scored.

    Parameters
    ----------
    title : str
        Its name in tables.
    score : callable
        Takes the predictions, and the references of each; returns their `Score`. Raises
        `DataError` if there is no prediction, if some prediction has no reference, or if there
        are not as many lists of references as predictions.
    maximum : float
        The largest possible figure; the smallest is 0.
    approximate : callable
        Returns why figures taken now are approximate, or an empty text if they are not.
    check : callable
        Raises `DataError`, without quoting them, if one prediction's references cannot be scored
        against; called before anything is predicted.
    """

    title: str
    score: Callable[[Sequence[str], References], Score]
    maximum: float = 1.0
    approximate: Callable[[], str] = lambda: ""
    check: Callable[[Sequence[str]], object] = lambda references: None


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
