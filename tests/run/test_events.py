"""``metrics.jsonl``: events are read back as written; other lines are refused or counted."""

import json
from dataclasses import replace

import pytest
from sample_events import AGGREGATED, CLOSED, FAILED, ROSTER, evaluated, sent, trained

from pilot_flwr.errors import StateError
from pilot_flwr.protocol import LOSSES
from pilot_flwr.run.directory import RunFolder, read_events
from pilot_flwr.run.events import (
    KINDS,
    AggregationMethod,
    ClientWarning,
    EvaluationClosed,
    ExchangeRepeated,
    NormChecked,
    Resumed,
    UnknownEvent,
    parse_event,
)
from pilot_flwr.run.history import mean_over_tasks, task_scores

EACH = [
    ROSTER,
    sent(),
    trained(losses=dict.fromkeys(LOSSES), started=1e9, session_seconds=4.0),
    trained(epsilon=1.0, delta=1e-5, releases=3),
    evaluated(approximate=True, cut=2),
    replace(
        AGGREGATED,
        tasks={"vqa": ("a", "b")},
        neighbors={"a": {"a": 0.25, "b": 0.75}},
        distances={"a": {"a": 0.0, "b": 1.5}},
        method=AggregationMethod("exact", "adam", "B", "pooled"),
    ),
    NormChecked(exchange=1, client="a", action="warned", norms={"lora": 2.0}, reason="too far"),
    FAILED,
    replace(FAILED, up={"lora": 3}),
    ClientWarning(exchange=1, client="a", text="odd"),
    ExchangeRepeated(exchange=1, reason="too few", undone=0),
    CLOSED,
    EvaluationClosed(exchange=4, seconds=1.0),
    Resumed(exchange=2, attempt=1, passed_over=("torn",), moved=3, flower_run="7"),
]


def test_every_kind_is_read_back_as_it_was_written(tmp_path):
    assert {type(event) for event in EACH} == set(KINDS.values())
    folder = RunFolder(tmp_path)
    for event in EACH:
        folder.record(event)
    assert read_events(tmp_path) == folder.events
    assert [replace(event, elapsed=0.0) for event in folder.events] == EACH


def test_the_files_keys_are_those_of_earlier_versions():
    event = trained(started=1.0, session_seconds=2.0)
    assert event.to_dict() == {
        "event": "train",
        "elapsed": 0.0,
        "round": 1,
        "stage": 1,
        "client": "vqa-1",
        "task": "vqa",
        "loss": 1.2,
        "loss_ce": 1.1,
        "loss_difference": 0.1,
        "loss_balance": 0.0,
        "loss_z": 0.0,
        "examples": 180,
        "steps": 6,
        "seconds": 3.14,
        "gradients": {"lora": 10},
        "bytes_down": 640,
        "bytes_up": 1_234_567,
        "up": {"lora": 1_234_567},
        "started": 1.0,
        "turn_seconds": 2.0,
    }
    assert sorted(KINDS) == sorted(
        "roster order train evaluate aggregate update_norm failure warning repeat round "
        "closing_evaluation resume".split()
    )


def test_an_aggregation_without_a_method_is_an_earlier_versions():
    values = {"event": "aggregate", "elapsed": 1.0, "round": 1, "seconds": 0.1, "clients": 2}
    values |= {"tasks": {"vqa": ["a"]}, "neighbors": {}, "distances": {}, "new key": 1}
    event = parse_event(json.dumps(values))
    assert event.method is None and event.tasks == {"vqa": ("a",)}


def test_an_unknown_kind_is_an_event_that_says_nothing():
    event = parse_event('{"event": "new", "x": [1]}')
    assert isinstance(event, UnknownEvent) and event.name == "new"


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("value", [None, "text", [], {}, True, float("nan"), -1, 10**400])
def test_an_odd_value_is_refused_with_its_key_or_read_as_absent(kind, value):
    whole = next(event for event in EACH if event.kind == kind).to_dict()
    for key in whole.keys() - {"event"}:
        try:
            read = parse_event(json.dumps(whole | {key: value}))
        except ValueError as error:
            assert f"`{key.split('_')[0]}" in str(error) or f"`{key}`" in str(error)
        else:
            assert type(read) is KINDS[kind]


@pytest.mark.parametrize(
    "line", ["", "[1]", '"event"', '{"event": 1}', "[" * 5000, '{"event": "round"}']
)
def test_a_broken_line_is_refused_with_its_number_unless_it_is_the_last(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(CLOSED.to_dict()) + f"\n{line}\n")
    with pytest.raises(StateError, match="line 2, is not an event"):
        read_events(tmp_path)
    path.write_text(json.dumps(CLOSED.to_dict()) + f"\n{line}")
    assert read_events(tmp_path) == [CLOSED]


def test_a_tasks_score_counts_examples_and_the_mean_counts_tasks():
    events = [
        evaluated(exchange=1, client="a-0", task="a", score=0.5, examples=2),
        evaluated(exchange=1, client="a-1", task="a", score=1.0, examples=6),
        evaluated(exchange=1, client="b-0", task="b", score=0.0, examples=1),
        evaluated(exchange=0, client="b-0", task="b", score=0.3, examples=1),
    ]
    scores = task_scores(events, 1)
    assert scores == task_scores(events[::-1], 1) == {"a": 7 / 8, "b": 0.0}
    assert mean_over_tasks(scores, ["a", "b"]) == 7 / 16
    assert mean_over_tasks(scores, ["a", "b", "c"]) is None
    assert mean_over_tasks({}, []) is None
