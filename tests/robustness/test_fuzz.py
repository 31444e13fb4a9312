"""A few odd inputs for every reader, and every defect that more of them have found.

``python tests/robustness/fuzz/run.py`` tries many.
"""

import json

import pytest
from flwr.app import MetricRecord
from fuzz import run as fuzz
from fuzz.targets import Target
from hypothesis.strategies import none

from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.config.loading import from_yaml
from pilot_flwr.config.overrides import expand
from pilot_flwr.errors import ConfigError, StateError, UpdateError
from pilot_flwr.flower.codec import number_of
from pilot_flwr.run.atomic import save_tensors
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import parse_event
from pilot_flwr.server.event_recorder import RESULT, read_announcement

NAMES = (
    *("array", "order", "run", "query", "member", "identity", "update", "report"),
    "compressed update",
    *("private state", "checkpoint, tensors", "checkpoint, state", "privacy account", "events"),
    "matrices",
    *("rows, array", "rows, lines", "image", "image name", "node config", "overrides"),
    *("config.yaml", "federation file", "line of a log", "live output"),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz.targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_odd_inputs_give_the_readers_own_errors_only(name, targets):
    target = targets[name]
    found = fuzz.fuzz(target, inputs=4 if target.weight < 0.5 else 40)
    assert found["inputs"] >= 4
    assert sum(found["outcomes"].values()) == found["inputs"]


def test_every_target_is_tried(targets):
    assert set(targets) == set(NAMES)


def test_an_error_that_is_not_the_readers_own_ends_the_run():
    def fails(_):
        raise KeyError("odd")

    target = Target(none(), fails, (UpdateError,))
    with pytest.raises(KeyError, match="odd"):
        fuzz.fuzz(target, inputs=1)


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, 2e300], ids=lambda _: "odd")
def test_a_number_beyond_floating_point(value):
    values = MetricRecord()
    values.__dict__["_data"]["x"] = value
    with pytest.raises(UpdateError, match="metric `x` is "):
        number_of(values, "x")


def test_a_long_value_is_cut_in_the_error():
    values = MetricRecord({"x": [1.0] * 100_000})
    with pytest.raises(UpdateError) as error:
        number_of(values, "x")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("line", ["[" * 5000, "[1]", '{"event": 1}', '"event"'])
def test_a_line_that_is_no_event(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(StateError, match="line 1, is not an event"):
        read_events(tmp_path)


@pytest.mark.parametrize("undone", [None, -1, "1", True, 1.5])
def test_a_repeat_that_undoes_no_number_of_events(undone, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"event": "repeat", "undone": undone}) + "\n"
    )
    with pytest.raises(StateError, match="line 1, is not an event"):
        read_events(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tasks", "5"), ("tasks", "[[1]]"), ("tasks", "[" * 5000), ("tasks", "{}"), ("stage", "7")],
)
def test_odd_metadata_of_a_private_state(key, value, tmp_path):
    store = PrivateStore(tmp_path, "c", "t")
    store.save(PrivateState(1), server_round=1)
    metadata = {"stage": "1", "tasks": "[]", "client": "c", "task": "t", key: value}
    save_tensors(store.path(1), {}, metadata)
    with pytest.raises(StateError, match="is not a private state"):
        store.load()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 3000, "too deeply nested"),
        ('{"a":' * 2000, "too deeply nested"),
        ("a: &a [1, 2]\nb: [*a, *a]", "aliases"),
        ("# " + "x" * 2**18, "characters"),
    ],
)
def test_yaml_that_would_take_long_or_fill_the_memory(text, reason):
    with pytest.raises(ConfigError, match=reason):
        from_yaml(text)


ALIASES = "tasks: &a0 [a, b]\n" + "".join(
    f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tasks: [a]\nname: 2001-99-14", "month must be in 1..12"),
        ("tasks: [a]\nclients_per_task: " + "9" * 5000, "4300 digits"),
        ("tasks: [a]\nclients_per_task: !!int x", "invalid literal"),
        (ALIASES, "more than 100,000 values"),
        ("tasks: &a [*a]", "more than 100,000 values"),
    ],
)
def test_a_federation_file_that_yaml_stumbles_over(text, reason, tmp_path):
    path = tmp_path / "federation.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        expand([f"data={path}"])


@pytest.mark.parametrize("deep", ['{"a":' * 5000, "[" * 5000])
def test_a_result_too_deep_to_be_one(deep):
    assert read_announcement(f"INFO :      {RESULT}{deep}") is None


@pytest.mark.parametrize("key", ["round", "seconds"])
def test_an_event_with_a_number_that_no_float_holds_is_refused(key):
    event = {"event": "aggregate", "round": 1, "clients": 2, "seconds": 1.0} | {key: 10**400}
    with pytest.raises(ValueError, match=f"`{key}` is 1000"):
        parse_event(json.dumps(event))
