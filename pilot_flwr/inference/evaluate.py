"""Score models of a run: per client, per task, and the mean over tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import check_references
from pilot_flwr.errors import DataError
from pilot_flwr.inference.generate import Answerer
from pilot_flwr.metrics.registry import METRICS


@dataclass(frozen=True)
class Scored:
    """One model's score on one client's examples.

    Attributes
    ----------
    client, task : str
        Whose examples they are.
    model : str
        Whose model it is.
    stage : int
        Its architecture.
    metric : str
        A key of `METRICS`.
    examples : int
        How many.
    score : float
        From 0 to the metric's maximum.
    approximate : str
        Why the score is approximate; empty if it is not.
    recorded : float or None
        The run's own last score of this client, if it is of the same kind.
    """

    client: str
    task: str
    model: str
    stage: int
    metric: str
    examples: int
    score: float
    approximate: str
    recorded: float | None = None


def score_examples(
    answerer: Answerer,
    examples: Sequence[Example],
    metric: str,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Answer the examples and return the metric's mean.

    Raises
    ------
    DataError
        There is no example, or one whose references the metric cannot score against.
    """
    if not examples:
        raise DataError("There is no example to score.")
    for example in examples:  # before the work, not after it
        check_references(metric, example)
    answers = answerer(examples, progress=progress)
    return METRICS[metric].score(answers, [example.answers for example in examples]).mean


def task_scores(scored: Sequence[Scored]) -> dict[str, float]:
    """Return the mean score of each task, every example counting the same."""
    means = {}
    for task in dict.fromkeys(row.task for row in scored):
        rows = [row for row in scored if row.task == task]
        examples = sum(row.examples for row in rows)
        means[task] = sum(row.score * row.examples for row in rows) / examples
    return means


def mean_over_tasks(scored: Sequence[Scored]) -> float:
    """Return the mean of the tasks' scores, every task counting the same."""
    means = task_scores(scored)
    return sum(means.values()) / len(means)
