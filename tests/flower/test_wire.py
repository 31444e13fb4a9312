import json
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.errors import UpdateError
from pilot_flwr.flower import messages
from pilot_flwr.flower.codec import decode_state, encode_state, num_bytes
from pilot_flwr.protocol import (
    LOSSES,
    EvaluationResult,
    Instruction,
    Member,
    RunInfo,
    SessionResult,
    TrainingResult,
)

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int8, torch.uint8, torch.bool),
]
RUN = RunInfo("demo-1", "/runs/demo", "token")


@given(
    st.dictionaries(
        st.text("abc.:_0é", min_size=1, max_size=12),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    )
)
def test_states_come_back_bit_for_bit(layout):
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(shape, generator=generator) * 100).to(dtype)
        for name, (dtype, shape) in layout.items()
    }
    decoded = decode_state(encode_state(state))
    assert list(decoded) == list(state)
    for name, tensor in state.items():
        assert decoded[name].dtype == tensor.dtype
        assert decoded[name].shape == tensor.shape
        assert torch.equal(decoded[name], tensor)


def test_one_array_has_the_parameters_and_a_short_header():
    state = {f"layers.{i}.w": torch.zeros(1000).bfloat16() for i in range(50)}
    (array,) = encode_state(state).values()
    assert 2000 * 50 < len(array.data) < (2000 + 100) * 50


def test_special_values_survive_bfloat16():
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 3.0e38]).bfloat16()
    decoded = decode_state(encode_state({"w": values}))["w"]
    assert torch.equal(decoded.view(torch.int16), values.view(torch.int16))


def test_the_caller_chooses_the_memory_and_reading_copies_nothing():
    memory = []

    def allocate(size):
        memory.append(bytearray(size))
        return memory[0]

    record = encode_state({"w": torch.arange(5.0)}, allocate=allocate)
    read = decode_state(record)["w"]
    decode_state(record)["w"][0] = 7.0
    assert read.tolist() == [7.0, 1.0, 2.0, 3.0, 4.0]
    assert len(memory) == 1 and bytes(memory[0]).endswith(read.numpy().tobytes())


def test_immutable_bytes_are_read_without_a_warning():
    record = encode_state({"w": torch.ones(3)})
    record["tensors"].data = bytes(record["tensors"].data)
    assert decode_state(record)["w"].tolist() == [1.0, 1.0, 1.0]


def packed(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def row(dtype="F32", shape=(2,), place=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


HOSTILE = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "a pickle": pickle.dumps([print]),
    "a header of exabytes": b"\xff" * 16,
    "a header beyond the end": (100).to_bytes(8, "little") + b"{}",
    "a header of megabytes": packed(b"[" + b"1," * 2**23 + b"1]"),
    "no JSON": packed(b"nonsense"),
    "no UTF-8": packed(b"\xff\xfe"),
    "deep JSON": packed(b"[" * 100_000),
    "no object": packed([1]),
    "a row that is not an object": packed({"w": 3}),
    "an unknown dtype": packed({"w": row("OBJECT")}),
    "a dtype that is not a string": packed({"w": row(["F32"])}),
    "no shape": packed({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "a shape that is a number": packed({"w": row() | {"shape": 2}}),
    "a negative shape": packed({"w": row(shape=(-2,))}),
    "two negative sizes": packed({"w": row(shape=(-1, -2))}),
    "a fraction": packed({"w": row(shape=(2.0,))}),
    "a truth value": packed({"w": row("F64", (True,))}),
    "a shape of terabytes": packed({"w": row(shape=(10**13,))}),
    "a product beyond 64 bits": packed({"w": row(shape=(2**62, 2**62))}),
    "a number of 5,000 digits": packed({"w": row(shape=(0, int("9" * 4000)))}),
    "a thousand dimensions": packed({"w": row(shape=(1,) * 1000)}),
    "less than the shape": packed({"w": row(shape=(3,))}),
    "more than the shape": packed({"w": row(shape=(1,))}),
    "three places": packed({"w": row(place=(0, 8, 8))}),
    "a place before": packed({"w": row(place=(-8, 0))}),
    "a place beyond": packed({"w": row(place=(8, 16))}),
    "an overlap": packed({"v": row(), "w": row()}),
    "a gap": packed({"v": row(shape=(1,), place=(0, 4)), "w": row(shape=(1,), place=(8, 12))}),
    "bytes at the end": packed({"w": row()}, b"\0" * 9),
    "bytes without tensors": packed({}),
    "a name twice": packed(b'{"w": 1, "w": ' + json.dumps(row()).encode() + b"}"),
    "an odd place": packed({"a": row("U8", (1,), (0, 1)), "w": row(place=(1, 9))}, b"\0" * 9),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_unreadable_arrays_are_refused_before_any_allocation(what):
    record = encode_state({})
    record["tensors"].data = HOSTILE[what]
    tracemalloc.start()
    try:
        with pytest.raises(UpdateError, match="array `tensors` cannot be read: ") as error:
            decode_state(record)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 400


def test_the_safetensors_library_reads_what_is_written_and_the_reverse():
    state = {"b": torch.ones(3, dtype=torch.uint8), "a": torch.randn(2, 2), "s": torch.tensor(2.0)}
    record = encode_state(state)
    theirs = safetensors.torch.load(bytes(record["tensors"].data))
    record["tensors"].data = safetensors.torch.save(state, metadata={"format": "pt"})
    ours = decode_state(record)
    for found in (theirs, ours):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord(),
        ArrayRecord({"w": Array(np.zeros(2, np.float32))}),
        ArrayRecord({"tensors": Array(np.zeros(2, np.float32))}),
    ],
    ids=["none", "another name", "numpy's format"],
)
def test_arrays_in_another_form_are_refused(record):
    with pytest.raises(UpdateError, match="the arrays must be one array, `tensors` in safetensors"):
        decode_state(record)


def test_orders_come_back():
    adapters = {"vqa": {"w": torch.randn(2)}, "ocr": {"w": torch.randn(2)}}
    order = Instruction(3, 2, ("vqa", "ocr"), adapters, {"a": torch.randn(4)}, train=False)
    packed = {task: encode_state(state) for task, state in adapters.items()}
    content = messages.encode_instruction(order, RUN, "vqa-0", adapters=packed)
    decoded, client = messages.decode_instruction(content)
    assert client == "vqa-0"
    assert messages.decode_run(content) == RUN
    for field in ("server_round", "stage", "tasks", "train", "evaluate"):
        assert getattr(decoded, field) == getattr(order, field)
    assert torch.equal(decoded.adapters["ocr"]["w"], adapters["ocr"]["w"])
    assert torch.equal(decoded.lora["a"], order.lora["a"])


def test_results_come_back():
    training = TrainingResult(dict.fromkeys(LOSSES, 0.5), 6, 90, 1.5, {"lora": 10, "base": 0})
    result = SessionResult(
        {"w": torch.ones(2)},
        {"a": torch.ones(3)},
        training,
        EvaluationResult(1.25, "cider_d", 60, 0.5, approximate=True, cut=7),
        started=100.0,
        seconds=2.0,
    )
    order = Instruction(3, 2, ("vqa",), {}, {})
    content = messages.encode_result(result, order, "vqa-0", "vqa")
    update = messages.decode_update(content)
    assert (update.client, update.task, update.server_round) == ("vqa-0", "vqa", 3)
    assert update.num_examples == 90
    assert torch.equal(update.adapter["w"], result.adapter["w"])
    decoded = messages.decode_result(content)
    assert decoded == replace(result, adapter={}, lora={})
    sizes = num_bytes(content)
    assert 8 < sizes["task_adapters"] < 8 + 100 and 12 < sizes["lora"] < 12 + 100


def test_members_come_back():
    member, identity = Member("vqa-0", "vqa", 90, 1), {"app": "0.1.0", "base.weights": ""}
    content = messages.encode_member(member, identity)
    assert messages.decode_member(content) == member
    assert messages.decode_identity(content) == identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": "many"}, "`examples` is 'many' but must be of type int"),
        ({"examples": True}, "`examples` is True but must be of type int"),
        ({"client": 3}, "`client` is 3 but must be of type str"),
    ],
)
def test_a_member_with_odd_values_is_refused(change, message):
    content = messages.encode_member(Member("vqa-0", "vqa", 90, 1), {})
    content["member"].update(change)
    with pytest.raises(UpdateError, match=message):
        messages.decode_member(content)


@pytest.mark.parametrize(
    "decode",
    [
        messages.decode_member,
        messages.decode_identity,
        messages.decode_instruction,
        messages.decode_update,
    ],
)
@given(st.dictionaries(st.sampled_from(["instruction", "result", "member", "lora"]), st.booleans()))
def test_foreign_messages_give_typed_errors_only(decode, names):
    content = RecordDict(
        {n: ConfigRecord({"client": "x"}) if kind else ArrayRecord() for n, kind in names.items()}
    )
    with pytest.raises(UpdateError):
        decode(content)
