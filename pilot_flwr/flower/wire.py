"""What travels between server and clients, as Flower messages.

Three message types: ``query`` (roster), ``train`` (evaluate the incoming personalised model,
then train) and ``evaluate`` (the last evaluation). This module alone knows the records' names.
Only Θ_a, Θ_l and T consensus task adapters are ever tensors in a message.
Tensors are packed by `pilot_flwr.flower.codec`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, RecordDict

from pilot_flwr.client.turn import Order
from pilot_flwr.errors import UpdateError
from pilot_flwr.flower.codec import (
    arrays_of,
    config_of,
    decode_state,
    encode_state,
    value_of,
)
from pilot_flwr.server.state import Member

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
    """Answer who one is, and of what version (`pilot_flwr.flower.identity`)."""
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


def encode_order(
    order: Order, run: RunInfo, client: str, *, adapters: Mapping[str, ArrayRecord]
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


def decode_order(content: RecordDict) -> tuple[Order, str]:
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
    order = Order(
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
