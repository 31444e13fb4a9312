"""Everything that reads from outside, with odd inputs for it and the errors that it may raise.

A target is added as a row of `targets`. What it raises beside its own errors is a defect.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import strategies as st
from PIL import Image

from fuzz.inputs import ODD_VALUES, files, json_bytes, mutated_tree, texts
from pilot_flwr.algorithm.quantization import compress, restore
from pilot_flwr.algorithm.server_state import Aggregation
from pilot_flwr.client.node import find_site, site_config
from pilot_flwr.client.node_config import private_paths, read_node_config
from pilot_flwr.client.privacy_accountant import PrivacyAccount
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.config.loading import from_yaml, load_config, to_yaml
from pilot_flwr.config.overrides import expand
from pilot_flwr.config.schema import PilotConfig, PrivacyConfig
from pilot_flwr.data.images import ImageFile
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.llava import LlavaExamples, Reading
from pilot_flwr.errors import ConfigError, DataError, StateError, UpdateError
from pilot_flwr.flower import messages
from pilot_flwr.flower.codec import decode_state, encode_state
from pilot_flwr.protocol import (
    LOSSES,
    EvaluationResult,
    Instruction,
    Member,
    RunInfo,
    SessionResult,
    Spent,
    TrainingResult,
)
from pilot_flwr.run.aggregations import read_matrices, write_matrices
from pilot_flwr.run.checkpoint import _checksum, load_checkpoint, save_checkpoint
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import (
    Aggregated,
    AggregationMethod,
    ClientFailed,
    Evaluated,
    ExchangeClosed,
    ExchangeRepeated,
    LoraMixing,
    Resumed,
    RosterCalled,
    RosterEntry,
    Trained,
    parse_event,
)
from pilot_flwr.run.progress import Progress
from pilot_flwr.run.provenance import RunIdentity
from pilot_flwr.server.event_recorder import Announcer, is_alarm, read_announcement

Errors = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Target:
    """A reader, inputs for it, and what it may raise.

    Attributes
    ----------
    inputs : SearchStrategy
        Odd inputs.
    read : callable
        Reads one; the errors that it may raise are `errors`.
    weight : float
        Share of the inputs in a long run, to those of other targets: less for a slow reader.
    """

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], object]
    errors: Errors
    weight: float = 1.0


TASK = {"client": "a", "task": "t"}
EVENTS = [
    event.to_dict()
    for event in (
        RosterCalled(exchange=1, clients=(RosterEntry("a", "t", 9, 1),)),
        Trained(
            exchange=1,
            **TASK,
            stage=1,
            losses={"total": 0.5, "ce": None},
            examples=9,
            steps=2,
            seconds=1.0,
            gradients={"lora": 3},
            bytes_down=9,
            bytes_up=9,
            up={"lora": 9},
        ),
        Evaluated(exchange=0, **TASK, score=0.5, metric="gqa", examples=4, seconds=1.0),
        ClientFailed(exchange=1, client="a", phase="train", reason="no"),
        ExchangeRepeated(exchange=1, reason="too few", undone=1),
        Aggregated(
            exchange=1,
            seconds=0.1,
            clients=2,
            tasks={"t": ("a",)},
            file="aggregations/0001.safetensors",
            mixing=LoraMixing(1, 0, 0, (1,)),
            neighbors={"a": {"a": 1.0}},
            method=AggregationMethod("adaptive"),
        ),
        ExchangeClosed(exchange=1, exchanges=4, seconds=1.0),
        Resumed(exchange=1, attempt=1, passed_over=("x",)),
    )
]
"""One event of each kind that is shown, as the file has them."""


def targets(folder: Path) -> dict[str, Target]:
    """Return all targets by name; `folder` gets the files that some of them read."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        **message_targets(),
        **state_targets(folder),
        **data_targets(folder),
        **config_targets(),
        **told_targets(folder),
    }


def message_targets() -> dict[str, Target]:
    """Return the decoders of messages in both directions; nothing catches what they raise."""
    state = {"w": torch.ones(2, 3), "b": torch.ones(3).bfloat16()}
    order = Instruction(3, 2, ("vqa", "ocr"), {"vqa": state, "ocr": state}, state)
    packed = {task: encode_state(s) for task, s in order.adapters.items()}
    run = RunInfo("demo-1", "/runs/demo", "token")
    training = TrainingResult(dict.fromkeys(LOSSES, 0.5), 6, 90, 1.5, {"lora": 10})
    result = SessionResult(
        state,
        state,
        training,
        EvaluationResult(0.5, "exact_match", 60, 0.5),
        Spent(1.0, 1e-5, 1),
    )
    member = messages.encode_member(Member("vqa-0", "vqa", 90, 1), {"app": "0.1"})
    packed_change = compress({n: t.float() + 1 for n, t in state.items()}, state, {}, 4)[0]
    compressed = replace(result, adapter=packed_change, lora=packed_change)
    contents = {
        "order": messages.encode_instruction(order, run, "vqa-0", adapters=packed),
        "update": messages.encode_result(result, order, "vqa-0", "vqa"),
        "compressed": messages.encode_result(compressed, order, "vqa-0", "vqa"),
        "member": member,
        "query": messages.encode_query(run, 3),
    }
    odd = {name: odd_messages(content) for name, content in contents.items()}
    refused = (UpdateError,)
    arrays = [bytes(array.data) for array in encode_state(state).values()]
    return {
        "array": Target(files(arrays), read_array, refused),
        "order": Target(odd["order"], messages.decode_instruction, refused),
        "run": Target(odd["query"], messages.decode_run, refused),
        "query": Target(odd["query"], messages.decode_query, refused),
        "member": Target(odd["member"], messages.decode_member, refused),
        "identity": Target(odd["member"], messages.decode_identity, refused),
        "update": Target(odd["update"], messages.decode_update, refused),
        "report": Target(odd["update"], messages.decode_result, refused),
        "compressed update": Target(
            odd["compressed"],
            lambda content: restore(messages.decode_update(content).lora, state, 4),
            refused,
        ),
    }


def read_array(data: bytes) -> object:
    """Read one array of a message."""
    array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
    return decode_state(ArrayRecord({"tensors": array}))


def odd_messages(valid: RecordDict) -> st.SearchStrategy[RecordDict]:
    """Return a message with odd values, names, kinds of records and arrays."""
    tree = {
        name: dict(record) if not isinstance(record, ArrayRecord) else None
        for name, record in valid.items()
    }
    arrays = {n: r for n, r in valid.items() if isinstance(r, ArrayRecord)}
    bytes_of = [bytes(a.data) for record in arrays.values() for a in record.values()]
    damaged = files(bytes_of) if bytes_of else st.just(b"")
    stypes = st.sampled_from(["safetensors", "safetensors", "numpy.ndarray", ""])

    def build(values: Any, names: list[str], data: bytes, stype: str) -> RecordDict:
        content = RecordDict()
        for name, record in values.items() if isinstance(values, dict) else ():
            if isinstance(record, dict):
                content[str(name)] = record_of(record, type(valid.get(name, ConfigRecord())))
        for name, record in arrays.items():
            kept = ArrayRecord()
            for key, array in record.items():
                kept[key] = array
            if name in names:
                first = next(iter(kept))
                kept[first] = Array(dtype="float32", shape=(2,), stype=stype, data=data)
            content[name] = kept
        if "gone" in names and arrays:
            del content[next(iter(arrays))]
        return content

    choices = st.lists(st.sampled_from([*arrays, "gone", "none"]), max_size=2)
    return st.builds(build, mutated_tree([tree]), choices, damaged, stypes)


def record_of(values: Mapping[str, Any], kind: type) -> ConfigRecord | MetricRecord:
    """Return the values that Flower's record takes, put there past its own checks of them.

    What Flower would not let a message carry is kept all the same where it can be: the readers
    must not rely on it.
    """
    record = kind() if kind in (ConfigRecord, MetricRecord) else ConfigRecord()
    for key, value in values.items():
        record.__dict__["_data"][str(key)] = value
    return record


def state_targets(folder: Path) -> dict[str, Target]:
    """Return readers of files that client or server wrote, and that somebody has changed."""
    state = {"w": torch.ones(2, 3), "b": torch.ones(3).bfloat16()}
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    saved = save_checkpoint(
        checkpoints,
        server_round=3,
        adapters={"vqa": state},
        loras={"vqa-0": state},
        tasks=("vqa",),
        task_of={"vqa-0": "vqa"},
        run=RunIdentity("demo-1", "abc"),
        events=7,
    )
    store = PrivateStore(folder / "private", "vqa-0", "vqa")
    private = {"client_adapter": state, "router": {"w": torch.ones(2)}}
    store.save(PrivateState(2, ("vqa", "ocr"), private), server_round=3)
    tensors = saved / "lora" / "vqa-0.safetensors"
    account = folder / "account.json"
    spend = PrivacyAccount(account, "c")
    spend.spend(PrivacyConfig(enabled=True), run="r", server_round=1)
    events = folder / "run"
    events.mkdir(exist_ok=True)
    lines = b"".join(json.dumps(event).encode() + b"\n" for event in EVENTS)
    json_of = json.loads((saved / "state.json").read_text())
    square = np.array([[0.25, 0.75], [0.5, 0.5]])
    done = Aggregation(["a", "b"], {}, square, 1 - np.eye(2))
    file = write_matrices(events, 1, done)
    mixed = Aggregated(exchange=1, seconds=0.1, clients=2, file=file)
    matrices = events / str(file)
    kept = {
        path: path.read_bytes() for path in (store.path(3), tensors, saved / "state.json", matrices)
    }

    def after(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
        def run(data: bytes) -> object:
            path.write_bytes(data)
            try:
                return read()
            finally:
                if path in kept:
                    path.write_bytes(kept[path])

        return run

    def whole_checkpoint() -> object:
        checkpoint = load_checkpoint(saved)
        return [checkpoint.adapter(t) for t in checkpoint.tasks], checkpoint.lora("vqa-0")

    refused = (StateError,)
    return {
        "private state": Target(
            st.one_of(files([kept[store.path(3)]]), tensor_files(kept[store.path(3)])),
            after(store.path(3), lambda: (store.stage(before=4), store.load(before=4))),
            refused,
        ),
        "checkpoint, tensors": Target(
            files([kept[tensors]]), after(tensors, whole_checkpoint), refused
        ),
        "checkpoint, state": Target(
            st.one_of(
                files([kept[saved / "state.json"]]),
                mutated_tree([json_of]).map(with_checksum).map(json_bytes),
            ),
            after(saved / "state.json", whole_checkpoint),
            refused,
        ),
        "privacy account": Target(
            st.one_of(
                files([account.read_bytes()]),
                mutated_tree([json.loads(account.read_text())]).map(json_bytes),
            ),
            after(account, spend.releases),
            refused,
        ),
        "matrices": Target(
            st.one_of(files([kept[matrices]]), tensor_files(kept[matrices])),
            after(matrices, lambda: read_matrices(events, mixed)),
            refused,
        ),
        "events": Target(
            files([lines]), after(events / "metrics.jsonl", lambda: read_events(events)), refused
        ),
    }


def with_checksum(content: Any) -> Any:
    """Return a changed ``state.json`` with the checksum of what it says now."""
    return content | {"checksum": _checksum(content)} if isinstance(content, dict) else content


def tensor_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return safetensors whose header is JSON, and wrong."""
    size = int.from_bytes(valid[:8], "little")
    header, body = json.loads(valid[8 : 8 + size]), valid[8 + size :]

    def packed(tree: Any) -> bytes:
        text = json_bytes(tree)
        return len(text).to_bytes(8, "little") + text + body

    def told(values: Any) -> bytes:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        return packed(header | {"__metadata__": texts})

    return st.one_of(
        mutated_tree([header]).map(packed), mutated_tree([header["__metadata__"]]).map(told)
    )


def data_targets(folder: Path) -> dict[str, Target]:
    """Return readers of a site's own rows and images: every row, an image's header and pixels."""
    rows = [
        {
            "id": "1",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A digit."},
            ],
            "references": ["a digit"],
            "task": "vqa",
        },
        {"id": 2, "image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "é"}]},
    ]
    lines = b"\n".join(map(json_bytes, rows)) + b"\n"
    path, images = folder / "rows.json", folder / "images"
    images.mkdir(exist_ok=True)

    def read_rows(data: bytes) -> object:
        path.write_bytes(data)
        examples = LlavaExamples([RowFile(path)], Reading(images, "Answer."))
        read = []
        for position in range(len(examples)):
            try:
                read.append(examples[position])
            except DataError as error:
                read.append(error)
        return read

    def read_image(data: bytes) -> object:
        (images / "a.png").write_bytes(data)
        image = ImageFile(images, "a.png", "row 1", (0, 0, 0))
        return image.size(), image.read().size

    return {
        "rows, array": Target(
            st.one_of(files([json_bytes(rows)]), mutated_tree([rows]).map(json_bytes)),
            read_rows,
            (DataError,),
        ),
        "rows, lines": Target(
            st.one_of(files([lines]), mutated_tree(rows).map(lambda t: json_bytes(t) + b"\n")),
            read_rows,
            (DataError,),
        ),
        "image": Target(files(sample_images()), read_image, (DataError,), weight=0.5),
        "image name": Target(
            st.one_of(st.text(max_size=30), st.sampled_from(list(map(str, ODD_VALUES)))),
            lambda name: ImageFile(images, name, "row 1").size(),
            (DataError,),
        ),
    }


def sample_images() -> list[bytes]:
    """Return one small image of every common format."""
    found = []
    image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    for name in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP"):
        stream = io.BytesIO()
        image.save(stream, format=name)
        found.append(stream.getvalue())
    return found


def config_targets() -> dict[str, Target]:
    """Return readers of settings from a server, of those in a run folder, and of a node config."""
    node = {
        "client-id": "vqa-0",
        "task": "vqa",
        "state-folder": "/state",
        "train-file": "/a.json;/b.json",
        "test-file": "~/c.json",
        "image-folder": "/images",
        "device": "cpu",
        "model-path": "/model",
        "micro-batch": 4,
        "max-epsilon": 8.0,
        "min-noise-multiplier": 1,
        "partition-id": 0,
        "num-partitions": 9,
    }
    modest = {k: v for k, v in node.items() if k not in ("max-epsilon", "min-noise-multiplier")}
    words = [
        "experiment=demo",
        "strategy.rounds=1",
        "data.tasks=[vqa,counting]",
        "+data.files={vqa:{metric:gqa}}",
        "model.path=x",
        "seed",
        "~seed",
        "++name",
        "privacy.enabled=true",
        "train",
        "a@b",
    ]
    config = PilotConfig()
    yaml = to_yaml(config).encode()

    def read_node(values: dict[str, Any]) -> object:
        private_paths(values)
        settings = read_node_config(values)
        site_config(settings, config, simulated=True)
        return find_site(settings, config, run_name="r", run_folder="/r", simulated=False)

    def typed(values: Any) -> dict[str, Any]:
        return {str(k): v for k, v in values.items() if isinstance(v, bool | int | float | str)}

    refused = (ConfigError,)
    return {
        "node config": Target(mutated_tree([node, modest]).map(typed), read_node, refused),
        "overrides": Target(texts(words), load_config, refused, weight=0.1),
        "config.yaml": Target(
            files([yaml]).map(lambda data: data.decode("utf-8", "replace")),
            from_yaml,
            refused,
            weight=0.1,
        ),
    }


def told_targets(folder: Path) -> dict[str, Target]:
    """Return readers of a federation's own file, and of what a server says of a run."""
    path = folder / "federation.yaml"
    federation = {
        "tasks": ["gqa", "counting"],
        "clients_per_task": 2,
        "folder": "../data",
        "files": {
            task: {"train": [f"{task}.json"], "images": "x", "metric": "exact_match"}
            for task in ("gqa", "counting")
        },
        "partition": {"kind": "dirichlet", "alpha": 0.5},
    }
    text = yaml.safe_dump(federation).encode()
    odd_yaml = [text, b"tasks: [a]\nx: 2001-12-14\ny: !!binary aGk=\n", b"tasks: &t [a, b]\nb: *t"]

    def read_federation(data: bytes) -> object:
        path.write_bytes(data)
        return expand([f"data={path}"])

    result = {"status": "completed", "error": None, "failures": [], "seconds": 3.5}
    lines: list[str] = []
    Announcer(lines.append).end(folder, result)
    said = f"INFO :      {lines[-1]}".encode()

    def show(event: Any) -> object:
        try:
            read = parse_event(json_bytes(event))
        except ValueError:  # counted as unreadable
            return None
        progress = Progress()
        return [progress.lines(read), progress.lines(read)]

    return {
        "federation file": Target(
            st.one_of(files(odd_yaml), mutated_tree([federation]).map(yaml_bytes)),
            read_federation,
            (ConfigError,),
            weight=0.1,
        ),
        "line of a log": Target(
            files([said]).map(lambda data: data.decode("utf-8", "replace")),
            lambda line: (read_announcement(line), is_alarm(line)),
            (),
        ),
        "live output": Target(mutated_tree(EVENTS), show, ()),
    }


def yaml_bytes(tree: Any) -> bytes:
    """Return YAML, or JSON of what YAML cannot say, which is nearly the same."""
    try:
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return json_bytes(tree)
