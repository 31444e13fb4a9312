"""What the server records of a run, and what it returns to Flower."""

import pytest
import torch
from flwr.app import Message, MessageType
from sample_events import evaluated

from pilot_flwr.algorithm.server_state import InitialState, ServerState
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.flower.compatibility import NAMES
from pilot_flwr.flower.grid import InProcessGrid
from pilot_flwr.flower.messages import decode_instruction, encode_member, encode_result
from pilot_flwr.protocol import EvaluationResult, Member, RunInfo, SessionResult
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import AggregationMethod
from pilot_flwr.server.event_recorder import EventRecorder
from pilot_flwr.strategy import PilotStrategy


def test_the_closing_score_is_the_mean_over_tasks_not_over_clients(tmp_path):
    method = AggregationMethod("adaptive")
    folder = RunFolder(tmp_path)
    recorder = EventRecorder(folder, num_exchanges=2, tasks=("a", "b"), method=method)
    for client, score, examples in (("a-0", 1.0, 30), ("a-1", 0.5, 10), ("b-0", 0.2, 10)):
        folder.record(
            evaluated(exchange=2, client=client, task=client[0], score=score, examples=examples)
        )
    assert recorder.close_evaluation(2, 1.0) == pytest.approx((0.875 + 0.2) / 2)
    assert "**0.537**" in (tmp_path / "summary.md").read_text()


def test_start_returns_the_closing_score_with_unequal_tasks(tmp_path):
    """Three clients of one task and one of the other, each with another number of examples."""
    identity = dict.fromkeys(NAMES, "same")
    clients = (
        ("a-0", EvaluationResult(1.0, "exact_match", 30, 0.0)),
        ("a-1", EvaluationResult(0.5, "exact_match", 10, 0.0)),
        ("a-2", EvaluationResult(0.25, "exact_match", 60, 0.0)),
        ("b-0", EvaluationResult(0.2, "exact_match", 10, 0.0)),
    )

    def answer(message, context):
        client, evaluation = clients[message.metadata.dst_node_id - 1]
        if message.metadata.message_type == MessageType.QUERY:
            content = encode_member(Member(client, client[0], 8, 0), identity)
        else:
            result = SessionResult(evaluation=evaluation)
            instruction, _ = decode_instruction(message.content)
            content = encode_result(result, instruction, client, client[0])
        return Message(content, reply_to=message)

    initial = InitialState({"w": torch.zeros(2)}, {"q.lora_A": torch.zeros(2)})
    strategy = PilotStrategy(
        StrategyConfig(rounds=1, trained_by="nobody", wait_seconds=1),
        ServerState(("a", "b"), initial),
        run=RunInfo("run-1", str(tmp_path), "token"),
        folder=RunFolder(tmp_path),
        expected={client: client[0] for client, _ in clients},
        identity=identity,
        check_rank=lambda rank: None,
        simulated=True,
    )
    nodes = [{"client-id": client} for client, _ in clients]
    grid = InProcessGrid(answer, node_configs=nodes, overrides="")
    result = strategy.start(grid, strategy.global_arrays(), num_rounds=2, timeout=10)
    # Task a: (30 · 1 + 10 · 0.5 + 60 · 0.25) / 100 = 0.5; task b: 0.2. Their mean is 0.35, the
    # mean over clients would be 0.4875 and that over examples 0.4727.
    assert result.evaluate_metrics_clientapp.keys() == {2}
    assert result.evaluate_metrics_clientapp[2]["score"] == pytest.approx(0.35)
