"""FedAdam against Flower's own, and its state in a checkpoint."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam
from flwr.supercore.task_identity import TaskIdentity

from pilot_flwr.algorithm.aggregation import weighted_average
from pilot_flwr.algorithm.server_optimizer import Moments, adam_step
from pilot_flwr.algorithm.server_state import InitialState, ServerState
from pilot_flwr.config.loading import load_config
from pilot_flwr.protocol import Update
from pilot_flwr.run.atomic import TensorFile, spool_tensors
from pilot_flwr.run.checkpoint import load_checkpoint, save_checkpoint
from pilot_flwr.run.provenance import RunIdentity
from pilot_flwr.server.resume import restored

SHAPES = {"q.lora_A": (2, 5), "q.lora_B": (4, 2)}
SETTINGS = {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2}


def draw(generator, scale=1.0):
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def flowers_step(strategy, server_round, current, replies):
    """One round of Flower's FedAdam; `replies` are (state, examples)."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
    strategy.current_arrays = {name: tensor.numpy() for name, tensor in current.items()}
    messages = []
    for node, (state, examples) in enumerate(replies):
        arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})
        metrics = MetricRecord({"num-examples": examples})
        order = Message(RecordDict(), node + 1, MessageType.TRAIN)
        order.metadata.__dict__["_message_id"] = str(node)
        messages.append(Message(RecordDict({"a": arrays, "m": metrics}), reply_to=order))
    arrays, _ = strategy.aggregate_train(server_round, messages)
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def test_the_steps_are_those_of_flowers_fedadam():
    generator = torch.Generator().manual_seed(1)
    mine = theirs = draw(generator)
    flower = FedAdam(
        eta=SETTINGS["learning_rate"],
        beta_1=SETTINGS["beta_1"],
        beta_2=SETTINGS["beta_2"],
        tau=SETTINGS["tau"],
    )
    moments = None
    for server_round in (1, 2, 3):
        updates = [draw(generator, 0.1) for _ in range(3)]
        replies = [
            ({name: theirs[name] + update[name] for name in SHAPES}, examples)
            for update, examples in zip(updates, (5, 10, 85), strict=True)
        ]
        average = weighted_average([state for state, _ in replies], [n for _, n in replies])
        mine, moments = adam_step(mine, average, moments, **SETTINGS)
        theirs = flowers_step(flower, server_round, theirs, replies)
        for name in SHAPES:
            # The moments are kept in float32.
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-8)
    assert moments.steps == 3


def test_a_step_by_hand():
    """β1 = .5, β2 = .75: m = .2, v = .04, and η_1 = η √(1 − .75²) / (1 − .5²)."""
    current, average = {"x": torch.zeros(1)}, {"x": torch.full((1,), 0.4)}
    new, moments = adam_step(
        current, average, None, learning_rate=0.3, beta_1=0.5, beta_2=0.75, tau=0.1
    )
    rate = 0.3 * 0.4375**0.5 / 0.75
    assert float(new["x"]) == pytest.approx(rate * 0.2 / (0.2 + 0.1), rel=1e-6)
    assert float(moments.first["x"]) == pytest.approx(0.2)
    assert float(moments.second["x"]) == pytest.approx(0.04)


def test_without_memory_and_with_a_large_tau_a_step_goes_part_of_the_way_to_the_average():
    current, average = (
        draw(torch.Generator().manual_seed(1)),
        draw(torch.Generator().manual_seed(2)),
    )
    new, _ = adam_step(current, average, None, learning_rate=3e5, beta_1=0, beta_2=0, tau=1e6)
    for name in SHAPES:
        expected = current[name] + 0.3 * (average[name] - current[name])
        torch.testing.assert_close(new[name], expected, rtol=1e-5, atol=1e-5)


def test_the_result_has_the_dtype_of_what_was_sent():
    current = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    new, moments = adam_step(current, {"w": torch.ones(3, dtype=torch.bfloat16)}, None, **SETTINGS)
    assert new["w"].dtype == torch.bfloat16
    assert moments.first["w"].dtype == moments.second["w"].dtype == torch.float32


METHOD = load_config("strategy=fedadam").strategy


def server():
    generator = torch.Generator().manual_seed(0)
    lora = {name: tensor.float() for name, tensor in draw(generator).items()}
    return ServerState(("x", "y"), InitialState({"w": torch.zeros(3, 2)}, lora))


def updates(server_round):
    generator = torch.Generator().manual_seed(server_round)
    return [
        Update(
            client,
            client[0],
            server_round,
            examples,
            {"w": torch.randn(3, 2, generator=generator)},
            {name: tensor.float() for name, tensor in draw(generator).items()},
        )
        for client, examples in (("x-0", 3), ("x-1", 5), ("y-0", 2))
    ]


@pytest.mark.parametrize("rule", ["adaptive", "task", "global"])
def test_a_resumed_server_steps_on_bit_by_bit(tmp_path, rule):
    config = load_config(f"strategy=fedadam strategy.lora={rule}").strategy
    whole = server()
    whole.aggregate(updates(1), config)
    path = save_checkpoint(
        tmp_path,
        server_round=1,
        adapters=whole.adapters,
        loras=whole.loras,
        tasks=whole.tasks,
        task_of=whole.task_of,
        run=RunIdentity(),
        events=0,
        moments={target: moments.pack() for target, moments in whole.moments.items()},
    )
    again = restored(load_checkpoint(path), whole.tasks, whole.initial)
    for state in (whole, again):
        state.aggregate(updates(2), config)
    assert len(whole.loras) == 3
    for kind in ("adapters", "loras"):
        for name, tensors in getattr(whole, kind).items():
            for key, tensor in tensors.items():
                assert torch.equal(getattr(again, kind)[name][key], tensor)
    assert again.moments.keys() == whole.moments.keys()
    assert {moments.steps for moments in again.moments.values()} == {2}


def test_the_server_steps_every_average_by_itself():
    state, before = server(), server()
    state.aggregate(updates(1), METHOD)
    assert sorted(state.moments) == ["adapter.all-tasks", "lora.all-tasks"]
    average = weighted_average([u.lora for u in updates(1)], [3, 5, 2])
    options = {k: getattr(METHOD.server_optimizer, k) for k in SETTINGS}
    expected, _ = adam_step(before.initial.lora, average, None, **options)
    for client in ("x-0", "x-1", "y-0"):
        for name, tensor in expected.items():
            np.testing.assert_array_equal(state.loras[client][name], tensor)


@pytest.mark.parametrize("rule", ["adaptive", "task"])
def test_states_that_are_kept_elsewhere_are_the_same_bit_by_bit(tmp_path, rule):
    """Nothing that grows with the clients stays in memory: all of it is handed to `keep`."""
    config = load_config(f"strategy=fedadam strategy.lora={rule}").strategy
    plain, mapped = server(), server()
    for number in (1, 2):
        plain.aggregate(updates(number), config)
        mapped.aggregate(
            updates(number),
            config,
            allocate=lambda client, layout: pytest.fail("a mixture is nobody's LoRA"),
            keep=lambda state: spool_tensors(state, tmp_path),
        )
    assert (
        plain.loras.keys() == mapped.loras.keys() and plain.moments.keys() == mapped.moments.keys()
    )
    for client, lora in mapped.loras.items():
        assert isinstance(lora, TensorFile)
        assert all(torch.equal(tensor, plain.loras[client][n]) for n, tensor in lora.items())
    for target, moments in mapped.moments.items():
        assert isinstance(moments.first, TensorFile) == target.startswith("lora.")
        for name, tensor in plain.moments[target].pack().items():
            assert torch.equal(moments.pack()[name], tensor)


def test_moments_of_another_model_are_refused():
    _, moments = adam_step({"w": torch.zeros(3)}, {"w": torch.ones(3)}, None, **SETTINGS)
    assert Moments.unpack(moments.pack(), {"w": torch.zeros(3)}).steps == 1
    for pattern in ({"w": torch.zeros(4)}, {"v": torch.zeros(3)}):
        with pytest.raises(ValueError, match="do not fit the configured model"):
            Moments.unpack(moments.pack(), pattern)
