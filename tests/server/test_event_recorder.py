"""What the server records of a run, and what it returns to Flower."""

import pytest
from sample_events import evaluated

from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.events import AggregationMethod
from pilot_flwr.server.event_recorder import EventRecorder


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
