"""What travels between server and clients, as Flower messages.

Three message types: ``query`` (roster), ``train`` (evaluate the incoming personalised model,
then train) and ``evaluate`` (the last evaluation). This module alone knows the records' names.
Only Θ_a, Θ_l and T consensus task adapters are ever tensors in a message.
Tensors are packed by `pilot_flwr.flower.codec`.

What a client's reply to an order says: tensors, losses, scores, times.

The other direction, and what the records are called, is in `pilot_flwr.flower.messages`. Only Θ_a and
Θ_l are ever tensors in a reply.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, MetricRecord, RecordDict

from pilot_flwr.algorithm.parameter_groups import GROUPS
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
from pilot_flwr.metrics.registry import METRICS
from pilot_flwr.protocol import (
    LOSSES,
    EvaluationResult,
    Instruction,
    Member,
    Report,
    SessionResult,
    Update,
)

TASK_ADAPTER = "task-adapter."
RESIDUAL = "residual"


@dataclass(frozen=True)
class RunInfo:
    """What every message says of its run.

    Attributes
    ----------
    name : str
        Tells this run's private states from those of other runs.
    folder : str
        The run folder on the server; only clients simulated on the same machine use it.
    token : str
        What `folder` holds as a proof that client and server see the same folder.
    """

    name: str
    folder: str
    token: str


@contextlib.contextmanager
def refuse_unusable() -> Iterator[None]:
    """Turn whatever goes wrong while a message from outside is read into an `UpdateError`."""
    try:
        yield
    except UpdateError:
        raise
    except Exception as error:  # a hostile message must not end the run, whatever is in it
        raise UpdateError(f"it cannot be read: {type(error).__name__}: {error}") from error


def encode_query(run: RunInfo, server_round: int, *, train: bool = True) -> RecordDict:
    """Ask a node who it is, what it holds from before an exchange, and whether it can train in it.

    With `train` false no upload will follow, so that no privacy budget is needed.
    """
    query = ConfigRecord({"round": server_round, "train": train})
    return RecordDict({"run": _run_record(run), "query": query})


def decode_query(content: RecordDict) -> tuple[int, bool]:
    """Read the exchange that a query is about, and whether the client would train in it.

    Raises
    ------
    UpdateError
        The value is missing or of the wrong type.
    """
    query = config_of(content, "query")
    return value_of(query, "round", int), value_of(query, "train", bool)


def encode_member(member: Member, identity: Mapping[str, str]) -> RecordDict:
    """Answer who one is, and of what version (`pilot_flwr.flower.compatibility`)."""
    values: dict[str, ConfigRecordValues] = {
        "client": member.client,
        "task": member.task,
        "examples": member.examples,
        "stage-trained": member.stage_trained,
    }
    return RecordDict({"member": ConfigRecord(values), "identity": ConfigRecord(dict(identity))})


def decode_member(content: RecordDict) -> Member:
    """Read a node's answer.

    Raises
    ------
    UpdateError
        A value is missing or of the wrong type.
    """
    values = config_of(content, "member")
    return Member(
        client=value_of(values, "client", str),
        task=value_of(values, "task", str),
        examples=value_of(values, "examples", int),
        stage_trained=value_of(values, "stage-trained", int),
    )


def decode_identity(content: RecordDict) -> dict[str, str]:
    """Read of what version a node is.

    Raises
    ------
    UpdateError
        A value is missing or of the wrong type.
    """
    values = config_of(content, "identity")
    return {key: value_of(values, key, str) for key in values}


def encode_instruction(
    order: Instruction, run: RunInfo, client: str, *, adapters: Mapping[str, ArrayRecord]
) -> RecordDict:
    """Pack one client's order; `adapters` are already packed, as many clients share them."""
    content = RecordDict({"run": _run_record(run), "lora": encode_state(order.lora)})
    if order.residual:
        content[RESIDUAL] = encode_state(order.residual)
    for task in order.adapters:
        content[TASK_ADAPTER + task] = adapters[task]
    content["order"] = ConfigRecord(
        {
            "client": client,
            "round": order.server_round,
            "stage": order.stage,
            "tasks": list(order.tasks),
            "train": order.train,
            "evaluate": order.evaluate,
        }
    )
    return content


def decode_instruction(content: RecordDict) -> tuple[Instruction, str]:
    """Read an order and the id of the client that it is for.

    Raises
    ------
    UpdateError
        A value or tensor is missing or of the wrong type.
    """
    values = config_of(content, "order")
    adapters = {
        name.removeprefix(TASK_ADAPTER): decode_state(record)
        for name, record in content.array_records.items()
        if name.startswith(TASK_ADAPTER)
    }
    stage, server_round = (value_of(values, name, int) for name in ("stage", "round"))
    if stage not in (1, 2):
        raise UpdateError(f"`stage` is {stage} but must be 1 or 2")
    if server_round < 1:
        raise UpdateError(f"`round` is {server_round} but must be at least 1")
    tasks = value_of(values, "tasks", list)
    if not all(isinstance(task, str) for task in tasks):
        raise UpdateError("`tasks` must be texts")
    order = Instruction(
        server_round=server_round,
        stage=stage,
        tasks=tuple(tasks),
        adapters=adapters,
        lora=decode_state(arrays_of(content, "lora")),
        train=value_of(values, "train", bool),
        evaluate=value_of(values, "evaluate", bool),
        residual=decode_state(arrays_of(content, RESIDUAL)) if RESIDUAL in content else {},
    )
    return order, value_of(values, "client", str)


def decode_run(content: RecordDict) -> RunInfo:
    """Read which run a message belongs to.

    Raises
    ------
    UpdateError
        A value is missing or of the wrong type.
    """
    values = config_of(content, "run")
    return RunInfo(*(value_of(values, name, str) for name in ("name", "folder", "token")))


def _run_record(run: RunInfo) -> ConfigRecord:
    return ConfigRecord({"name": run.name, "folder": run.folder, "token": run.token})


def encode_result(result: SessionResult, order: Instruction, client: str, task: str) -> RecordDict:
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
