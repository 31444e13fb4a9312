"""What travels between server and clients, as Flower messages.

Three message types: ``query`` (roster), ``train`` (evaluate the incoming personalised model,
then train) and ``evaluate`` (the last evaluation). This module alone knows the records' names.
Only Θ_a, Θ_l and T consensus task adapters are ever tensors in a message.

A tensor's name ends in ``:bfloat16`` if its two bytes are a bfloat16's bit pattern, because
Flower's arrays do not have that type: what was trained in bfloat16 is sent in bfloat16.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, MetricRecord, RecordDict

from pilot_flwr.errors import UpdateError
from pilot_flwr.parameters import State
from pilot_flwr.server_state import Member, Update
from pilot_flwr.training import LOSSES
from pilot_flwr.turn import Order, TurnResult

_T = TypeVar("_T")
_ADAPTER = "task-adapter."
_BFLOAT16 = ":bfloat16"


@dataclass(frozen=True)
class RunInfo:
    """What every message says of its run.

    Attributes
    ----------
    name : str
        Tells this run's private states from those of other runs.
    folder : str
        The run folder on the server; only clients simulated on the same machine use it.
    """

    name: str
    folder: str


def encode_state(state: State) -> ArrayRecord:
    """Pack named tensors; bfloat16 as its bit pattern."""
    record = ArrayRecord()
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            record[name + _BFLOAT16] = Array(tensor.view(torch.int16).numpy())
        else:
            record[name] = Array(tensor.numpy())
    return record


def decode_state(record: ArrayRecord) -> State:
    """Unpack what `encode_state` packed.

    Raises
    ------
    UpdateError
        An array cannot be read, or its name and type contradict each other.
    """
    state: State = {}
    for name, array in record.items():
        try:
            tensor = torch.from_numpy(array.numpy())
        except (TypeError, ValueError, EOFError, OSError) as error:
            raise UpdateError(f"array `{name}` cannot be read: {error}") from error
        if name.endswith(_BFLOAT16):
            if tensor.dtype != torch.int16:
                raise UpdateError(f"array `{name}` has type {tensor.dtype}, not a bit pattern")
            name, tensor = name.removesuffix(_BFLOAT16), tensor.view(torch.bfloat16)
        state[name] = tensor
    return state


def num_bytes(content: RecordDict) -> dict[str, int]:
    """Bytes of the serialised arrays in a message: ``lora`` and ``task_adapters``."""
    sizes = {"lora": 0, "task_adapters": 0}
    for name, record in content.array_records.items():
        size = sum(len(array.data) for array in record.values())
        sizes["lora" if name == "lora" else "task_adapters"] += size
    return sizes


def encode_query(run: RunInfo) -> RecordDict:
    """Ask a node who it is."""
    return RecordDict({"run": _run_record(run)})


def encode_member(member: Member) -> RecordDict:
    """Answer who one is."""
    values: dict[str, ConfigRecordValues] = {
        "client": member.client,
        "task": member.task,
        "examples": member.examples,
        "stage-trained": member.stage_trained,
    }
    return RecordDict({"member": ConfigRecord(values)})


def decode_member(content: RecordDict) -> Member:
    """Read a node's answer.

    Raises
    ------
    UpdateError
        A value is missing or of the wrong type.
    """
    values = _config(content, "member")
    return Member(
        client=_value(values, "client", str),
        task=_value(values, "task", str),
        examples=_value(values, "examples", int),
        stage_trained=_value(values, "stage-trained", int),
    )


def encode_order(
    order: Order, run: RunInfo, client: str, *, adapters: Mapping[str, ArrayRecord]
) -> RecordDict:
    """Pack one client's order; `adapters` are already packed, as many clients share them."""
    content = RecordDict({"run": _run_record(run), "lora": encode_state(order.lora)})
    for task in order.adapters:
        content[_ADAPTER + task] = adapters[task]
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


def decode_order(content: RecordDict) -> tuple[Order, str]:
    """Read an order and the id of the client that it is for.

    Raises
    ------
    UpdateError
        A value or tensor is missing or of the wrong type.
    """
    values = _config(content, "order")
    adapters = {
        name.removeprefix(_ADAPTER): decode_state(record)
        for name, record in content.array_records.items()
        if name.startswith(_ADAPTER)
    }
    order = Order(
        server_round=_value(values, "round", int),
        stage=_value(values, "stage", int),
        tasks=tuple(_value(values, "tasks", list)),
        adapters=adapters,
        lora=decode_state(_arrays(content, "lora")),
        train=_value(values, "train", bool),
        evaluate=_value(values, "evaluate", bool),
    )
    return order, _value(values, "client", str)


def decode_run(content: RecordDict) -> RunInfo:
    """Read which run a message belongs to.

    Raises
    ------
    UpdateError
        A value is missing or of the wrong type.
    """
    values = _config(content, "run")
    return RunInfo(_value(values, "name", str), _value(values, "folder", str))


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
            }
        )
        content["evaluation-metric"] = ConfigRecord({"metric": result.evaluation.metric})
    if result.training is not None:
        training = result.training
        content["lora"] = encode_state(result.lora)
        content[_ADAPTER + task] = encode_state(result.adapter)
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
    values = _config(content, "result")
    task = _value(values, "task", str)
    training = _metrics(content, "training")
    return Update(
        client=_value(values, "client", str),
        task=task,
        server_round=_value(values, "round", int),
        num_examples=int(training.get("examples", 0)),
        adapter=decode_state(_arrays(content, _ADAPTER + task)),
        lora=decode_state(_arrays(content, "lora")),
    )


def training_metrics(content: RecordDict) -> dict[str, float]:
    """Read the numbers of a local training, flat: ``loss.ce``, ``gradients.lora``, ``steps`` ….

    Raises
    ------
    UpdateError
        One is missing or not finite.
    """
    needed = ("steps", "seconds", *(f"loss.{name}" for name in LOSSES))
    return _finite(content, "training", needed)


def turn_times(content: RecordDict) -> dict[str, float]:
    """Read when a turn started (seconds since 1970) and how many seconds it took."""
    return _metrics(content, "turn")


def evaluation_metrics(content: RecordDict) -> tuple[dict[str, float], str] | None:
    """Read score, examples and seconds of an evaluation and its metric's name, if there is one.

    Raises
    ------
    UpdateError
        One is missing or not finite.
    """
    if "evaluation" not in content.metric_records:
        return None
    name = _value(_config(content, "evaluation-metric"), "metric", str)
    return _finite(content, "evaluation", ("score", "examples", "seconds")), name


def _run_record(run: RunInfo) -> ConfigRecord:
    return ConfigRecord({"name": run.name, "folder": run.folder})


def _config(content: RecordDict, name: str) -> ConfigRecord:
    if name not in content.config_records:
        raise UpdateError(f"the message has no record `{name}`")
    return content.config_records[name]


def _arrays(content: RecordDict, name: str) -> ArrayRecord:
    if name not in content.array_records:
        raise UpdateError(f"the message has no arrays `{name}`")
    return content.array_records[name]


def _metrics(content: RecordDict, name: str) -> dict[str, float]:
    if name not in content.metric_records:
        raise UpdateError(f"the message has no metrics `{name}`")
    values = content.metric_records[name]
    return {key: value for key, value in values.items() if isinstance(value, (int, float))}


def _finite(content: RecordDict, name: str, needed: Iterable[str]) -> dict[str, float]:
    numbers = _metrics(content, name)
    for metric in needed:
        if not math.isfinite(numbers.get(metric, math.nan)):
            raise UpdateError(f"metric `{metric}` is {numbers.get(metric)} but must be finite")
    return numbers


def _value(values: ConfigRecord, name: str, kind: type[_T]) -> _T:
    value = values.get(name)
    if type(value) is not kind:
        raise UpdateError(f"`{name}` is {value!r} but must be of type {kind.__name__}")
    return value
