"""What a client's reply to an order says: tensors, losses, scores, times.

The other direction, and what the records are called, is in `pilot_flwr.flower.wire`. Only Θ_a and
Θ_l are ever tensors in a reply.
"""

from dataclasses import dataclass

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from pilot_flwr.client.evaluation import EvaluationResult
from pilot_flwr.client.training import LOSSES
from pilot_flwr.client.turn import Order, TurnResult
from pilot_flwr.errors import UpdateError
from pilot_flwr.flower.codec import (
    arrays_of,
    config_of,
    decode_state,
    encode_state,
    metrics_of,
    num_bytes,
    number_of,
    value_of,
)
from pilot_flwr.flower.wire import TASK_ADAPTER
from pilot_flwr.metrics.table import METRICS
from pilot_flwr.model.parameters import GROUPS
from pilot_flwr.server.state import Update


@dataclass(frozen=True)
class Report:
    """What a reply says besides its tensors; every number is finite and in range.

    Attributes
    ----------
    training : dict or None
        ``steps``, ``seconds`` and ``loss.<name>``, if the client trained. A client that makes
        its upload private may keep the losses to itself: all of them, or none.
    gradients : dict
        Group → number of its parameters that received a gradient.
    evaluation : EvaluationResult or None
        Score of the incoming model, if it was evaluated.
    times : dict
        ``started`` (seconds since 1970) and ``turn_seconds`` of the whole turn.
    sizes : dict
        Bytes of the reply's arrays, see `num_bytes`.
    privacy : dict or None
        ``epsilon``, ``delta`` and ``releases`` of the run so far, if the upload was made private.
    """

    training: dict[str, float] | None
    gradients: dict[str, int]
    evaluation: EvaluationResult | None
    times: dict[str, float]
    sizes: dict[str, int]
    privacy: dict[str, float] | None = None


def encode_result(result: TurnResult, order: Order, client: str, task: str) -> RecordDict:
    """Pack what a turn gives back."""
    content = RecordDict(
        {
            "result": ConfigRecord({"client": client, "task": task, "round": order.server_round}),
            "turn": MetricRecord({"started": result.started, "turn_seconds": result.seconds}),
        }
    )
    if result.evaluation is not None:
        content["evaluation"] = MetricRecord(
            {
                "score": result.evaluation.score,
                "examples": result.evaluation.examples,
                "seconds": result.evaluation.seconds,
                "cut": result.evaluation.cut,
            }
        )
        content["evaluation-metric"] = ConfigRecord(
            {
                "metric": result.evaluation.metric,
                "approximate": result.evaluation.approximate,
            }
        )
    if result.spent is not None:
        content["privacy"] = MetricRecord(
            {
                "epsilon": result.spent.epsilon,
                "delta": result.spent.delta,
                "releases": result.spent.releases,
            }
        )
    if result.training is not None:
        training = result.training
        content["lora"] = encode_state(result.lora)
        content[TASK_ADAPTER + task] = encode_state(result.adapter)
        content["training"] = MetricRecord(
            {
                "examples": training.examples,
                "steps": training.steps,
                "seconds": training.seconds,
                **{f"loss.{name}": value for name, value in training.losses.items()},
                **{f"gradients.{group}": n for group, n in training.gradients.items()},
            }
        )
    return content


def decode_update(content: RecordDict) -> Update:
    """Read a client's update.

    Raises
    ------
    UpdateError
        A value or tensor is missing, unreadable or of the wrong type.
    """
    values = config_of(content, "result")
    task = value_of(values, "task", str)
    examples = number_of(metrics_of(content, "training"), "examples", low=1)
    if examples != int(examples):
        raise UpdateError(f"metric `examples` is {examples} but must be a whole number")
    return Update(
        client=value_of(values, "client", str),
        task=task,
        server_round=value_of(values, "round", int),
        num_examples=int(examples),
        adapter=decode_state(arrays_of(content, TASK_ADAPTER + task)),
        lora=decode_state(arrays_of(content, "lora")),
    )


def decode_report(content: RecordDict) -> Report:
    """Read everything in a reply but its tensors.

    Raises
    ------
    UpdateError
        A number is missing, not finite or out of range.
    """
    trained = "training" in content.metric_records
    training = content.metric_records.get("training", MetricRecord())
    privacy = _privacy(content)
    losses = tuple(f"loss.{name}" for name in LOSSES)
    if privacy and not any(name in training for name in losses):
        losses = ()
    needed = ("steps", "seconds", *losses)
    return Report(
        training={name: number_of(training, name) for name in needed} if trained else None,
        gradients={
            group: int(number_of(training, f"gradients.{group}", low=0))
            for group in GROUPS
            if f"gradients.{group}" in training
        },
        evaluation=_evaluation(content),
        times={
            name: number_of(metrics_of(content, "turn"), name)
            for name in ("started", "turn_seconds")
        },
        sizes=num_bytes(content),
        privacy=privacy,
    )


def _privacy(content: RecordDict) -> dict[str, float] | None:
    if "privacy" not in content.metric_records:
        return None
    numbers = metrics_of(content, "privacy")
    return {
        "epsilon": number_of(numbers, "epsilon", low=0),
        "delta": number_of(numbers, "delta", low=0, high=1),
        "releases": int(number_of(numbers, "releases", low=1)),
    }


def _evaluation(content: RecordDict) -> EvaluationResult | None:
    if "evaluation" not in content.metric_records:
        return None
    numbers, how = metrics_of(content, "evaluation"), config_of(content, "evaluation-metric")
    metric = value_of(how, "metric", str)
    if metric not in METRICS:
        raise UpdateError(f"`metric` is {metric!r} but must be one of {', '.join(METRICS)}")
    return EvaluationResult(
        score=number_of(numbers, "score", low=0, high=METRICS[metric].maximum),
        metric=metric,
        approximate=value_of(how, "approximate", bool),
        examples=int(number_of(numbers, "examples", low=1)),
        seconds=number_of(numbers, "seconds"),
        cut=int(number_of(numbers, "cut", low=0)),
    )
