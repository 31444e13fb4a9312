"""Scores of generated answers: pure functions of (prediction, reference), each in [0, 1].

To add a metric, write a function and add its row to `METRICS`.
"""

from collections.abc import Callable


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if both texts are equal but for case and white space, else 0."""
    return float(_plain(prediction) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}
"""Metric by the name under which a task asks for it."""
