"""Compressed uploads in whole runs: bytes on the wire, errors at the client, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from flwr.app import MessageType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from inprocess import SMALL, Federation, edit
from quick_training import quick_training

from pilot_flwr.algorithm.quantization import LEVELS, compress, restore
from pilot_flwr.config.loading import load_config
from pilot_flwr.flower.codec import decode_state, encode_state
from pilot_flwr.flower.messages import decode_instruction
from pilot_flwr.model.resource_plan import make_plan

TASKS = f"{SMALL} data.tasks=[vqa,counting] evaluation.enabled=false"
TWO = f"{TASKS} data.clients_per_task=1 strategy.rounds=1"
DTYPES = ("float32", "bfloat16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}


@pytest.fixture(scope="module", autouse=True)
def untrained():
    """Training takes no time here: its result is random, but the same in every run."""
    with quick_training():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run `TWO` with one `model.sent_dtype`, once."""
    done = {}

    def call(dtype):
        if dtype not in done:
            overrides = f"{TWO} model.sent_dtype={dtype}"
            done[dtype] = Federation(tmp_path_factory.mktemp(dtype), overrides).run()
        return done[dtype]

    return call


def exchanges(federation, client):
    """What a client was sent, and the arrays that it sent, exchange by exchange."""
    instructions = {
        m.metadata.message_id: decode_instruction(m.content)[0]
        for m in federation.grid.messages
        if not m.metadata.reply_to_message_id and m.metadata.message_type == MessageType.TRAIN
    }
    for reply in federation.replies(MessageType.TRAIN):
        if reply.content["result"]["client"] == client:
            yield (
                instructions[reply.metadata.reply_to_message_id],
                decode_state(reply.content["lora"]),
                decode_state(reply.content["task-adapter.vqa"]),
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_counts_the_bytes_on_the_wire(run, dtype):
    plan = make_plan(run(dtype).config)
    trained = run(dtype).events("train")
    assert len(trained) == 4
    for event in trained:
        stage = plan.stages[event["stage"]]
        arrays = 160 * 2 * 100  # at most: names, shapes and places of codes and scales
        assert 0 <= event["bytes_up"] - stage.up_bytes <= arrays
        assert 0 <= event["bytes_down"] - stage.down_bytes <= arrays


@pytest.mark.parametrize("dtype", BITS)
def test_the_server_restores_uploads_from_the_tensors_that_it_sent(run, dtype):
    (first, lora, adapter), (second, *_) = exchanges(run(dtype), "vqa-0")
    for compressed, sent in ((lora, first.lora), (adapter, first.adapters["vqa"])):
        assert not compressed.keys() & sent.keys()
        assert {t.dtype for t in sent.values()} == {torch.bfloat16}
    # The only client of its task: the average is its own adapter.
    restored = restore(adapter, first.adapters["vqa"], BITS[dtype])
    assert all(torch.equal(t, second.adapters["vqa"][n]) for n, t in restored.items())


@pytest.mark.parametrize("dtype", BITS)
def test_errors_are_stored_added_to_the_next_change_and_never_sent(run, dtype):
    federation = run(dtype)
    store = federation.folder.path / "clients" / "vqa-0"
    assert {path.name for path in store.glob("private-*")} >= {
        "private-0001.safetensors",
        "private-0002.safetensors",
    }
    private = federation.private("vqa-0")
    assert private.errors.keys() == {"lora", "own_task_adapter"}
    sent = [
        t for _, *uploads in exchanges(federation, "vqa-0") for u in uploads for t in u.values()
    ]
    for state in private.errors.values():
        for error in state.values():
            assert error.dtype == torch.bfloat16
            assert not any(t.shape == error.shape and torch.equal(t, error) for t in sent)
    assert any(bool(t.any()) for t in private.errors["lora"].values())


@pytest.mark.parametrize("dtype", BITS)
def test_the_second_upload_makes_up_for_the_first_ones_errors(run, dtype, monkeypatch, tmp_path):
    """Against a run that forgets them: its second upload differs, its first does not."""
    import pilot_flwr.client.session as session

    monkeypatch.setattr(
        session, "compress", lambda trained, sent, error, bits: compress(trained, sent, {}, bits)
    )
    forgetful = Federation(tmp_path, f"{TWO} model.sent_dtype={dtype}").run()
    (_, lora, _), (_, later, _) = exchanges(run(dtype), "vqa-0")
    (_, same, _), (_, other, _) = exchanges(forgetful, "vqa-0")
    assert all(torch.equal(t, same[n]) for n, t in lora.items())
    assert any(not torch.equal(t, other[n]) for n, t in later.items())


def test_plain_uploads_leave_no_errors(run):
    assert run("bfloat16").private("vqa-0").errors == {}


METHODS = ("fedex_lora", "ditto train.epochs=2", "feddpa train.epochs=2", "feddat train.epochs=2")
MORE_METHODS = ("fedadam", "fedprox", "ffa_lora", "fedsa_lora", "centralised")


@pytest.mark.parametrize(
    "method", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_METHODS)]
)
def test_every_method_runs_with_compressed_uploads(tmp_path, method):
    overrides = f"{TWO} model.sent_dtype=int8 strategy={method}"
    federation = Federation(tmp_path, overrides).run()
    assert federation.events("failure") == []
    assert len(federation.events("train")) == (2 if method == "centralised" else 4)


def test_a_private_release_is_noised_before_it_is_compressed(tmp_path, monkeypatch):
    """So that neither the upload nor its errors hold the change itself."""
    import pilot_flwr.client.session as session

    released, compressed = [], []

    def noting_release(*arguments, **options):
        result = release(*arguments, **options)
        released.append(dict(result[0]))
        return result

    def noting_compress(trained, *rest):
        compressed.append(trained)
        return compress(trained, *rest)

    release = session.release
    monkeypatch.setattr(session, "release", noting_release)
    monkeypatch.setattr(session, "compress", noting_compress)
    overrides = f"{TWO} model.sent_dtype=int4 privacy.enabled=true"
    federation = Federation(tmp_path, overrides).run()
    assert federation.events("failure") == [] and len(released) == 4
    pairs = zip(released, zip(compressed[::2], compressed[1::2], strict=True), strict=True)
    for noisy, (adapter, lora) in pairs:
        for group, found in (("own_task_adapter", adapter), ("lora", lora)):
            assert all(found[name] is tensor for name, tensor in noisy[group].items())


def spoil_scales(value):
    def spoil(content):
        edit(
            content,
            "lora",
            lambda s: next(t for n, t in s.items() if n.endswith(":scales")).fill_(value),
        )

    return spoil


def send_plain(content):
    state = decode_state(content["lora"])
    names = [n.removesuffix(":codes") for n in state if n.endswith(":codes")]
    content["lora"] = encode_state({name: torch.ones(2) for name in names})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_scales(math.nan), "its scales must be finite and not negative"),
        (spoil_scales(-1.0), "its scales must be finite and not negative"),
        (spoil_scales(3e38), "its LoRA has values that are not finite"),
        (spoil_scales(1e6), "the norm of its update is above the exchange's bound: LoRA"),
        (send_plain, "its compressed tensors differ from those sent"),
    ],
    ids=["nan", "negative", "overflow", "norm", "plain"],
)
def test_a_bad_compressed_update_is_rejected_and_the_others_are_used(tmp_path, spoil, reason):
    overrides = f"{TASKS} data.clients_per_task=2 strategy.rounds=1 model.sent_dtype=int8"
    federation = Federation(tmp_path, f"{overrides} strategy.update_norm.action=reject")

    def on_reply(message, reply):
        first = message.metadata.group_id == "1"
        if first and "result" in reply.content and reply.content["result"]["client"] == "vqa-1":
            spoil(reply.content)
        return reply

    federation.grid.on_reply = on_reply
    federation.run()
    (failure,) = federation.events("failure")
    assert (failure["client"], failure["round"]) == ("vqa-1", 1) and reason in failure["reason"]
    assert "vqa-1" in {e["client"] for e in federation.events("train", round=2)}
    assert federation.strategy.state.rounds == 2


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 185e6), ("int4", 95e6)])
def test_the_upload_of_llava_7b(run, dtype, limit):
    """Names, headers and the other records of a message add at most 1,000 bytes per tensor."""
    small = make_plan(run(dtype).config)
    for reply, event in zip(
        run(dtype).replies(MessageType.TRAIN), run(dtype).events("train"), strict=True
    ):
        objects = get_all_nested_objects(reply.content).values()
        message = sum(len(part.deflate()) for part in objects)
        assert 0 < message - small.stages[event["stage"]].up_bytes <= 1000 * (4 * 7 * 2 + 4)
    plan = make_plan(load_config(f"model=llava-1.5-7b model.sent_dtype={dtype}"))
    plain = make_plan(load_config("model=llava-1.5-7b"))
    for number, stage in plan.stages.items():
        assert (
            stage.up_bytes + 1000 * (32 * 7 * 2 + 4) < limit < plain.stages[number].up_bytes / 1.9
        )
        assert stage.down_bytes == plain.stages[number].down_bytes


def test_the_settings_offer_every_level():
    config = load_config()
    offered = {replace(config.model, sent_dtype=dtype).upload_bits for dtype in DTYPES}
    assert offered == {0, *LEVELS}
