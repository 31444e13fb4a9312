"""Score models of a run: per client, per task, and the mean over tasks."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from pilot_flwr.client.client_data import ClientData
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.client_files import Split
from pilot_flwr.data.examples import Example
from pilot_flwr.data.federation import Client, check_references, task_metric
from pilot_flwr.errors import DataError
from pilot_flwr.inference.generate import Answerer, check_all, open_answerer, open_file
from pilot_flwr.inference.runs import Run, Selected, last_scores
from pilot_flwr.metrics import METRICS
from pilot_flwr.run.events import Evaluated
from pilot_flwr.run.history import mean_over_tasks, task_scores


class ScoredAnswer(NamedTuple):
    """A model's answer to an example, and its score."""

    id: str
    answer: str
    references: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class Scored:
    """The score of a model (`Selected.name`) on a client's examples."""

    client: str
    task: str
    model: str
    stage: int
    metric: str
    examples: int
    score: float
    approximate: str
    """Why the score is approximate; empty if it is exact."""
    recorded: float | None = None
    """The run's last score of this client, if comparable."""
    answers: tuple[ScoredAnswer, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """The examples to score on, and the metric."""

    split: Split = "test"
    """The client's split, as in the run."""
    file: Path | None = None
    """A file of rows to use instead, with its folder of `images`."""
    images: Path | None = None
    metric: str = ""
    """Empty for the metric of the client's task."""


def evaluate_models(
    run: Run,
    models: Sequence[tuple[Client, Selected]],
    source: EvaluationSet,
    *,
    device: torch.device,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> list[Scored]:
    """Score models in their order, each on the examples of a client.

    Parameters
    ----------
    run, source, device : Run, EvaluationSet, torch.device
        The run, the examples and metric, and the device to compute on.
    models : sequence of (Client, Selected)
        The client whose examples to use, and the model.
    say : callable
        Prints a line for the user: skipped rows, scores that are not comparable.
    progress : callable
        Called after every batch with client, number of examples and number of answers.

    Raises
    ------
    DataError
        The examples cannot be read, there are none, or the metric cannot score their references.
    """
    same_settings = _deciding_settings(run.config) == _deciding_settings(run.recorded)
    if not same_settings:
        say("The settings have changed: the run's own scores are not shown beside these.")
    comparable = same_settings and source.file is None and source.split == "test"
    recorded = {event.client: event for event in last_scores(run)} if comparable else {}
    rows = []
    for client, selected in models:
        metric = source.metric or task_metric(run.config.data, client.task)
        answerer = open_answerer(run, selected, device=device, say=say)
        examples = _examples(run, client, source, answerer, say)
        if not examples:
            raise DataError("There is no example to score.")
        for example in examples:  # before the work, not after it
            check_references(metric, example)
        total = len(examples)
        answers = answerer(examples, progress=functools.partial(progress, client.id, total))
        references = [tuple(example.answers) for example in examples]
        score = METRICS[metric].score(answers, references)
        names = [example.id for example in examples]
        event = recorded.get(client.id) if selected.client else None
        if event and event.metric == metric and event.examples != total:
            say(f"{client.id}: the run scored {event.examples} examples, not {total}.")
        same = event is not None and (event.metric, event.examples) == (metric, total)
        rows.append(
            Scored(
                client.id,
                client.task,
                selected.name,
                answerer.model.stage,
                metric,
                total,
                score.mean,
                METRICS[metric].approximate(),
                event.score if event and same else None,
                tuple(map(ScoredAnswer, names, answers, references, score.each)),
            )
        )
    return rows


def mean_scores(scored: Sequence[Scored]) -> tuple[dict[str, float], float]:
    """Compute every task's mean over its examples, and the mean over tasks."""
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
    by_task = task_scores(evaluated, exchange=0)
    mean = mean_over_tasks(by_task, by_task)
    assert mean is not None, "nothing was scored"
    return by_task, mean


def _deciding_settings(config: PilotConfig) -> object:
    """Return the settings that select examples and answers."""
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
    """Return all rows of the file, or the rows that the run used of the split."""
    if source.file is not None:
        examples = open_file(run, client.task, answerer, source.file, source.images)
        check_all(examples, answerer)
        return examples
    with tempfile.TemporaryDirectory() as folder:
        data = ClientData(client, run.config, answerer.model, folder=Path(folder), progress=say)
        return data.examples(source.split)
