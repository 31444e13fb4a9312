from dataclasses import replace

import numpy as np
import pytest
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

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
RUN = RunInfo("demo-1", "/runs/demo", "token")


@given(
    st.dictionaries(
        st.text("abc.:_0", min_size=1, max_size=12).filter(lambda n: not n.endswith(":bfloat16")),
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
    assert decoded.keys() == state.keys()
    for name, tensor in state.items():
        assert decoded[name].dtype == tensor.dtype
        assert decoded[name].shape == tensor.shape
        assert torch.equal(decoded[name], tensor)


def test_bfloat16_costs_two_bytes():
    full = encode_state({"w": torch.zeros(1000)})
    half = encode_state({"w": torch.zeros(1000).bfloat16()})
    assert list(half) == ["w:bfloat16"]
    assert len(full["w"].data) - len(half["w:bfloat16"].data) == 2000


def test_special_values_survive_bfloat16():
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 3.0e38]).bfloat16()
    decoded = decode_state(encode_state({"w": values}))["w"]
    assert torch.equal(decoded.view(torch.int16), values.view(torch.int16))


def test_a_name_that_says_bfloat16_must_be_a_bit_pattern():
    record = ArrayRecord({"w:bfloat16": Array(np.zeros(2, np.float32))})
    with pytest.raises(UpdateError, match="not a bit pattern"):
        decode_state(record)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x93NUMPY\x01\x00v\x00{"])
def test_unreadable_arrays_are_refused(data):
    record = ArrayRecord(
        {"w": Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)}
    )
    with pytest.raises(UpdateError, match="array `w` cannot be read"):
        decode_state(record)


@pytest.mark.parametrize("shape", ["(10000000000000,)", "(1,)", "(3, 3)"])
def test_a_header_that_promises_more_or_less_is_refused_before_any_allocation(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 8
    array = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)
    with pytest.raises(UpdateError, match="its header says float32"):
        decode_state(ArrayRecord({"w": array}))


def test_a_pickled_array_is_never_unpickled():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=buffer.getvalue())
    with pytest.raises(UpdateError, match="Python objects"):
        decode_state(ArrayRecord({"w": array}))


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
    assert sizes["task_adapters"] - 8 == sizes["lora"] - 12  # the same header


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
