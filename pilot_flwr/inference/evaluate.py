"""Score models of a run: per client, per task, and the mean over tasks."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pilot_flwr.client.client_data import ClientData
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import Split
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import Client, check_references, task_metric
from pilot_flwr.errors import DataError
from pilot_flwr.inference.generate import Answerer, check_all, open_file
from pilot_flwr.inference.runs import Run, Selected, last_scores, load_model
from pilot_flwr.metrics import METRICS
from pilot_flwr.run import events
from pilot_flwr.run.events import Evaluated


@dataclass(frozen=True)
class Scored:
    """One model's score on one client's examples.

    Attributes
    ----------
    client, task : str
        Whose examples they are.
    model : str
        Name of the model.
    stage : int
        Its architecture.
    metric : str
        A key of `METRICS`.
    examples : int
        Number of examples.
    score : float
        From 0 to the metric's maximum.
    approximate : str
        Why the score is approximate; empty if it is exact.
    recorded : float or None
        The run's own last score of this client, if it is comparable.
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


@dataclass(frozen=True)
class EvaluationSet:
    """The examples that models are scored on, and the metric.

    Attributes
    ----------
    split : {"test", "train"}
        The client's split, as the run uses it.
    file : Path, optional
        A LLaVA JSON or JSONL file instead, all rows of it.
    images : Path, optional
        Folder of that file's images.
    metric : str
        A key of `METRICS`; empty for that of the client's task.
    """

    split: Split = "test"
    file: Path | None = None
    images: Path | None = None
    metric: str = ""


def evaluate_models(
    run: Run,
    models: Sequence[tuple[Client, Selected]],
    source: EvaluationSet,
    *,
    device: torch.device,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None] = lambda client, total, done: None,
) -> list[Scored]:
    """Score models, each on the examples of a client.

    Parameters
    ----------
    run : Run
        The run.
    models : sequence of (Client, Selected)
        Whose examples, and the model that answers them.
    source : EvaluationSet
        Which examples, and how they are scored.
    device : torch.device
        Where to compute.
    say : callable
        Gets lines for the user: rows left out, scores that are not comparable.
    progress : callable, optional
        Gets a client's id, the number of its examples and of its answers, after every batch.

    Returns
    -------
    list of Scored
        In the order of `models`.

    Raises
    ------
    DataError
        The examples cannot be read, or the metric cannot score against their references.
    """
    recorded = {event.client: event for event in last_scores(run)}
    same_settings = _deciding_settings(run.config) == _deciding_settings(run.recorded)
    if not same_settings:
        say("The settings have changed: the run's own scores are not shown beside these.")
    rows = []
    for client, selected in models:
        metric = source.metric or task_metric(run.config.data, client.task)
        answerer = Answerer(run.config, load_model(run, selected, device=device))
        examples = _examples(run, client, source, answerer, say)
        total = len(examples)
        answered = functools.partial(progress, client.id, total)
        score = score_examples(answerer, examples, metric, progress=answered)
        event = recorded.get(client.id) if same_settings and selected.client else None
        if source.file is not None or source.split != "test" or (event and event.metric != metric):
            event = None
        if event and event.examples != total:
            say(f"{client.id}: the run scored {event.examples} examples, not {total}.")
            event = None
        rows.append(
            Scored(
                client.id,
                client.task,
                selected.name,
                answerer.model.stage,
                metric,
                total,
                score,
                METRICS[metric].approximate(),
                event.score if event else None,
            )
        )
    return rows


def score_examples(
    answerer: Answerer,
    examples: Sequence[Example],
    metric: str,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Answer the examples and return the metric's mean.

    Parameters
    ----------
    answerer : Answerer
        The model.
    examples : sequence of Example
        Their last turn is not read by the model.
    metric : str
        A key of `METRICS`.
    progress : callable, optional
        Gets the number of answers after every batch.

    Returns
    -------
    float
        From 0 to the metric's maximum.

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
    """Return the mean score of each task; every example counts the same."""
    evaluated = [
        Evaluated(
            exchange=0,
            client=row.client,
            task=row.task,
            score=row.score,
            metric=row.metric,
            examples=row.examples,
            seconds=0.0,
        )
        for row in scored
    ]
    return events.task_scores(evaluated, exchange=0)


def mean_over_tasks(scored: Sequence[Scored]) -> float:
    """Return the mean of the tasks' scores; every task counts the same."""
    scores = task_scores(scored)
    mean = events.mean_over_tasks(scores, scores)
    assert mean is not None, "nothing was scored"
    return mean


def _deciding_settings(config: PilotConfig) -> object:
    """Return the settings that decide which examples there are and what counts as an answer."""
    return (
        replace(config.data, folder="", workers=0),
        replace(config.evaluation, batch_size=1),
        config.seed,
        config.train.max_length,
    )


def _examples(
    run: Run,
    client: Client,
    source: EvaluationSet,
    answerer: Answerer,
    say: Callable[[str], None],
) -> Sequence[Example]:
    """Return all rows of the file, or the rows of the split that the run used."""
    if source.file is not None:
        examples = open_file(run, client.task, answerer, source.file, source.images)
        check_all(examples, answerer)
        return examples
    with tempfile.TemporaryDirectory() as folder:
        data = ClientData(client, run.config, answerer.model, folder=Path(folder), progress=say)
        return data.examples(source.split)
