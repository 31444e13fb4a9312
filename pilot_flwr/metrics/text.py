"""Metrics that compare an answer's text with its references, one prediction at a time.

To add one, write a function of a prediction and its references, and add its row to `METRICS` in
`pilot_flwr.metrics.table`.
"""

from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if a reference is the prediction but for case and white space, else 0."""
    return float(_plain(prediction) in map(_plain, references))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
