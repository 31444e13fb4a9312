"""Encode and decode every message between server and clients.

Three message types: ``query`` (roster), ``train`` (evaluate the incoming personalised model, then
train it) and ``evaluate`` (the closing evaluation). This module alone knows the names of the
records; `pilot_flwr.flower.codec` packs tensors and reads single values. The only tensors in any
message are Θ_a, Θ_l, the task adapters of all tasks and the residual of exact aggregation.

`encode_error` alone decides what an error reply discloses: the client's log has the whole error,
the reply omits paths on its disk. In a private run every error reply is `PRIVATE_ERROR`.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TypeVar, get_args, get_type_hints

from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from pilot_flwr.errors import PilotError, UpdateError, WorkerDied
from pilot_flwr.flower.codec import (
    Allocate,
    decode_state,
    encode_state,
    number_of,
    record_of,
    value_of,
)
from pilot_flwr.formatting import bounded, headline, one_line
from pilot_flwr.metrics import METRICS
from pilot_flwr.protocol import (
    LOSSES,
    ClientKeyProof,
    EvaluationResult,
    GroupName,
    Instruction,
    Member,
    RunInfo,
    SessionResult,
    Spent,
    TrainingResult,
    Update,
)

TASK_ADAPTER = "task-adapter."
RESIDUAL = "residual"
_Introduction = TypeVar("_Introduction", RunInfo, Member, ClientKeyProof)


@contextlib.contextmanager
def refuse_unusable() -> Iterator[None]:
    """Convert any error while a foreign message is decoded into an `UpdateError`."""
    try:
        yield
    except UpdateError:
        raise
    except Exception as error:  # no content of a hostile message may end the run
        raise UpdateError(f"it cannot be read: {type(error).__name__}: {error}") from error


def _encode_fields(values: RunInfo | Member | ClientKeyProof) -> ConfigRecord:
    return ConfigRecord({name.replace("_", "-"): value for name, value in asdict(values).items()})


def _decode_fields(record: ConfigRecord, kind: type[_Introduction]) -> _Introduction:
    fields = get_type_hints(kind).items()
    return kind(**{name: value_of(record, name.replace("_", "-"), of) for name, of in fields})


def decode_run(content: RecordDict) -> RunInfo:
    """Decode the run, which every message from the server names."""
    return _decode_fields(record_of(content, "run", ConfigRecord), RunInfo)


# Roster query and reply.


def encode_query(
    run: RunInfo, server_round: int, *, train: bool = True, nonce: str = ""
) -> RecordDict:
    """Ask a node to identify itself; with `train` false, it needs no privacy budget.

    A client signs the `nonce`, to prove that it has its key.
    """
    query = ConfigRecord({"round": server_round, "train": train, "nonce": nonce})
    return RecordDict({"run": _encode_fields(run), "query": query})


def decode_query(content: RecordDict) -> tuple[int, bool, str]:
    """Decode the exchange of a query, whether the client would train in it, and the nonce."""
    query = record_of(content, "query", ConfigRecord)
    nonce = value_of(query, "nonce", str)
    return value_of(query, "round", int), value_of(query, "train", bool), nonce


def encode_member(
    member: Member, identity: Mapping[str, str], proof: ClientKeyProof | None = None
) -> RecordDict:
    """Answer a query; `identity` is that of `pilot_flwr.flower.compatibility`.

    A simulated client has no `proof`.
    """
    content = RecordDict({"member": _encode_fields(member)})
    content["identity"] = ConfigRecord(dict(identity))
    if proof is not None:
        content["proof"] = _encode_fields(proof)
    return content


def decode_member(content: RecordDict) -> Member:
    """Decode which client a node is."""
    return _decode_fields(record_of(content, "member", ConfigRecord), Member)


def decode_proof(content: RecordDict) -> ClientKeyProof:
    """Decode a node's proof of its client's key."""
    return _decode_fields(record_of(content, "proof", ConfigRecord), ClientKeyProof)


def decode_identity(content: RecordDict) -> dict[str, str]:
    """Decode the version, settings and base model of a node, as hashes."""
    values = record_of(content, "identity", ConfigRecord)
    return {key: value_of(values, key, str) for key in values}


# Instruction and reply.


def encode_instruction(
    instruction: Instruction, run: RunInfo, client: str, *, adapters: Mapping[str, ArrayRecord]
) -> RecordDict:
    """Encode one client's instruction; `adapters` are encoded once for all clients."""
    content = RecordDict({"run": _encode_fields(run), "lora": encode_state(instruction.lora)})
    if instruction.residual:
        content[RESIDUAL] = encode_state(instruction.residual)
    for task in instruction.adapters:
        content[TASK_ADAPTER + task] = adapters[task]
    content["instruction"] = ConfigRecord(
        {
            "client": client,
            "round": instruction.server_round,
            "stage": instruction.stage,
            "tasks": list(instruction.tasks),
            "train": instruction.train,
            "evaluate": instruction.evaluate,
        }
    )
    return content


def decode_instruction(content: RecordDict) -> tuple[Instruction, str]:
    """Decode an instruction and the id of its addressee."""
    values = record_of(content, "instruction", ConfigRecord)
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
        raise UpdateError("`tasks` must be a list of strings")
    has_residual = RESIDUAL in content
    instruction = Instruction(
        server_round=server_round,
        stage=stage,
        tasks=tuple(tasks),
        adapters=adapters,
        lora=decode_state(record_of(content, "lora", ArrayRecord)),
        train=value_of(values, "train", bool),
        evaluate=value_of(values, "evaluate", bool),
        residual=decode_state(record_of(content, RESIDUAL, ArrayRecord)) if has_residual else {},
    )
    return instruction, value_of(values, "client", str)


def encode_result(
    result: SessionResult,
    instruction: Instruction,
    client: str,
    task: str,
    *,
    allocate: Allocate = bytearray,
) -> RecordDict:
    """Encode the outcome of a session, for `decode_update` and `decode_result`."""
    server_round = instruction.server_round
    content = RecordDict(
        {
            "result": ConfigRecord({"client": client, "task": task, "round": server_round}),
            "session": MetricRecord({"started": result.started, "seconds": result.seconds}),
        }
    )
    if (evaluation := result.evaluation) is not None:
        values = asdict(evaluation)
        how = {name: values.pop(name) for name in ("metric", "approximate")}
        content["evaluation"] = MetricRecord(values)
        content["evaluation-metric"] = ConfigRecord(how)
    if (spent := result.spent) is not None:
        content["privacy"] = MetricRecord(asdict(spent))
    if (training := result.training) is not None:
        content["lora"] = encode_state(result.lora, allocate=allocate)
        content[TASK_ADAPTER + task] = encode_state(result.adapter, allocate=allocate)
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
    """Decode a client's contribution to the aggregation."""
    values = record_of(content, "result", ConfigRecord)
    task = value_of(values, "task", str)
    return Update(
        client=value_of(values, "client", str),
        task=task,
        server_round=value_of(values, "round", int),
        num_examples=_num_examples(record_of(content, "training", MetricRecord)),
        adapter=decode_state(record_of(content, TASK_ADAPTER + task, ArrayRecord)),
        lora=decode_state(record_of(content, "lora", ArrayRecord)),
    )


def decode_result(content: RecordDict) -> SessionResult:
    """Decode everything in a reply but its tensors; every number is finite and in range."""
    records = content.metric_records
    session = record_of(content, "session", MetricRecord)
    spent = None
    if "privacy" in records:
        spent = Spent(
            epsilon=number_of(records["privacy"], "epsilon", low=0),
            delta=number_of(records["privacy"], "delta", low=0, high=1),
            releases=int(number_of(records["privacy"], "releases", low=1)),
        )
    training = None
    if "training" in records:
        training = _decode_training(records["training"], private=spent is not None)
    return SessionResult(
        training=training,
        evaluation=_decode_evaluation(content) if "evaluation" in records else None,
        spent=spent,
        started=number_of(session, "started"),
        seconds=number_of(session, "seconds"),
    )


def _num_examples(training: MetricRecord) -> int:
    examples = number_of(training, "examples", low=1)
    if examples != int(examples):
        raise UpdateError(f"metric `examples` is {examples} but must be a whole number")
    return int(examples)


def _decode_training(values: MetricRecord, *, private: bool) -> TrainingResult:
    """Decode a training; with a `private` upload, a client may withhold all losses."""
    withheld = private and not any(f"loss.{name}" in values for name in LOSSES)
    return TrainingResult(
        losses={} if withheld else {name: number_of(values, f"loss.{name}") for name in LOSSES},
        steps=int(number_of(values, "steps")),
        examples=_num_examples(values),
        seconds=number_of(values, "seconds"),
        gradients={
            group: int(number_of(values, f"gradients.{group}", low=0))
            for group in get_args(GroupName)
            if f"gradients.{group}" in values
        },
    )


def _decode_evaluation(content: RecordDict) -> EvaluationResult:
    numbers = content.metric_records["evaluation"]
    how = record_of(content, "evaluation-metric", ConfigRecord)
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


# Error replies.

OWN_ERROR = 1001
"""Code of an error reply with a text of this app."""

_DEAD_WORKER = re.compile(  # Ray's exceptions, as Flower's simulation engine passes them on
    r"<class 'ray\.exceptions\.(?:RayActorError|ActorDiedError|ActorUnavailableError|"
    r"WorkerCrashedError|NodeDiedError|OutOfMemoryError|LocalRayletDiedError)'>"
)
_URL = r"(?P<url>https?://[^\s'\"<>]+)"
_ABSOLUTE = r"(?<![\w/>.~])(?:file:)?~?/+[\w.~-][^\s'\"`,;:()\[\]{}<>]*"
_QUOTED = r"(?P<quote>['\"`])(?:file:)?~?/+[\w.~-](?:(?!(?P=quote)).)*(?P=quote)"


PRIVATE_ERROR = "This client failed. In a private run only its own log has the reason."
"""Text of every error reply of a real site in a run with `privacy.enabled`."""


def encode_error(error: Exception, private: Mapping[str, str] | None) -> Error:
    """Return the part of an error that a client discloses to the server.

    A typed error keeps its text, without paths. The text of any other exception may quote
    anything, so a site sends its type and, of an `OSError`, the system's reason.

    `private` maps the site's paths to their replacements; None in a simulation, where server and
    client share one machine and nothing is withheld.
    """
    kind = type(error).__name__
    if isinstance(error, PilotError):
        text = str(error) if private is None else without_paths(str(error), private)
    elif private is None:
        text = f"{kind}: {headline(str(error))}"
    else:
        number = error.errno if isinstance(error, OSError) else None
        reason = f" ({os.strerror(number)})" if number else ""
        text = f"{kind}{reason}; see the client's own log."
    return Error(OWN_ERROR, text)


def decode_error(error: Error, *, simulated: bool) -> str:
    """Return the meaningful line of an error reply; its sender chose all of it, the code included.

    Raises `WorkerDied` if a Ray worker process of a simulation died: Flower keeps sending messages
    to it, so the run cannot continue. Real sites have no Ray, so there the text means nothing.
    """
    text = bounded((error.reason or "").strip())
    if simulated and error.code != OWN_ERROR and _DEAD_WORKER.match(text):
        raise WorkerDied(
            "A Ray worker process died while it ran a client (often: out of memory). Flower "
            "does not replace it, so the run stops here; the last complete exchange is in "
            f"checkpoint/. Ray reports: {headline(text)}"
        )
    return one_line(text if error.code == OWN_ERROR else headline(text))


def without_paths(text: str, private: Mapping[str, str]) -> str:
    """Replace paths: each key of `private` by its value, any other absolute path by ``<path>``.

    An unquoted path that `private` lacks ends at its first blank; what follows remains.
    """
    spelled = {
        form: key
        for path, key in private.items()
        for form in (path, repr(path)[1:-1], ascii(path)[1:-1])
    }
    longest_first = sorted(spelled, key=len, reverse=True)
    known = "|".join(map(re.escape, longest_first)) or r"(?!)"
    known = rf"(?:{known})(?![\w-])"
    pattern = rf"{_URL}|(?P<known>{known})|(?!.{known}){_QUOTED}|{_ABSOLUTE}"

    def replacement(match: re.Match[str]) -> str:
        if match["url"]:
            return match["url"]
        quote = match["quote"] or ""
        return spelled[match["known"]] if match["known"] else f"{quote}<path>{quote}"

    return re.sub(pattern, replacement, text)
