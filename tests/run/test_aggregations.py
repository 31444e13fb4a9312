"""The matrices of an aggregation on disk: what is read is what was aggregated, or an error."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_events import AGGREGATED

from pilot_flwr.algorithm.aggregation import adaptive_weights, group_weights
from pilot_flwr.algorithm.server_state import Aggregation
from pilot_flwr.errors import StateError
from pilot_flwr.run.aggregations import (
    describe,
    mixing,
    read_matrices,
    remove_matrices,
    write_matrices,
)
from pilot_flwr.run.events import LoraMixing


def aggregation(count, seed=0, rule="adaptive", neighbours=2):
    """Distances between random points, and the weights of a rule."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, 3))
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    examples = rng.integers(1, 50, count).tolist()
    groups = ["a"] * count if rule == "global" else ["ab"[k % 2] for k in range(count)]
    weights = (
        adaptive_weights(distances, examples, neighbours)
        if rule == "adaptive"
        else group_weights(groups, examples)
    )
    return Aggregation([f"é-{k}" for k in range(count)], {}, weights, distances)


def written(folder, done, exchange=1):
    file = write_matrices(folder, exchange, done)
    return replace(AGGREGATED, exchange=exchange, file=file)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from(["adaptive", "task", "global"]))
def test_what_is_read_is_what_was_aggregated(tmp_path_factory, count, seed, rule):
    folder, done = tmp_path_factory.mktemp("run"), aggregation(count, seed, rule)
    found = read_matrices(folder, written(folder, done))
    assert found.clients == done.clients
    assert np.array_equal(found.weights, done.neighbors)  # bit for bit
    np.testing.assert_array_equal(found.distances, done.distances.astype(np.float32))


def test_without_loras_there_is_no_file(tmp_path):
    assert write_matrices(tmp_path, 1, Aggregation(["a"], {}, None, None)) is None
    assert not list(tmp_path.iterdir())
    assert read_matrices(tmp_path, AGGREGATED) is None and mixing(AGGREGATED) is None


def test_the_same_aggregation_has_the_same_bytes(tmp_path):
    for name in "ab":
        written(tmp_path / name, aggregation(7))
    first, second = ((tmp_path / n / "aggregations/0001.safetensors").read_bytes() for n in "ab")
    assert first == second


@pytest.mark.parametrize(("rule", "most"), [("adaptive", 2_080_000), ("global", 2_060_000)])
def test_a_thousand_clients_take_two_megabytes(tmp_path, rule, most):
    """K(K-1)/2 = 499,500 distances of 4 bytes; weights of M + 1 clients a row, or of one row."""
    written(tmp_path, aggregation(1000, rule=rule))
    assert 499_500 * 4 < (tmp_path / "aggregations/0001.safetensors").stat().st_size < most


def test_events_of_earlier_versions_have_the_same_matrices(tmp_path):
    done = aggregation(3)

    def as_dict(matrix, keep_zero):
        pairs = ((k, j, float(matrix[k, j])) for k in range(3) for j in range(3))
        found = {c: {} for c in done.clients}
        for k, j, value in pairs:
            if value or keep_zero:
                found[done.clients[k]][done.clients[j]] = value
        return found

    event = replace(
        AGGREGATED,
        neighbors=as_dict(done.neighbors, False),
        distances=as_dict(done.distances, True),
    )
    found = read_matrices(tmp_path, event)
    assert np.array_equal(found.weights, done.neighbors)
    assert np.array_equal(found.distances, done.distances)
    assert mixing(event) == describe(done.neighbors)


def test_mixing_counts_the_others_and_the_groups():
    assert describe(aggregation(6).neighbors) == LoraMixing(6, 2, 2)
    assert describe(aggregation(5, rule="task").neighbors) == LoraMixing(5, 1, 2, (3, 2))
    assert describe(aggregation(5, rule="global").neighbors) == LoraMixing(5, 4, 4, (5,))
    assert describe(np.eye(1)) == LoraMixing(1, 0, 0, (1,))


def test_a_file_elsewhere_is_not_read(tmp_path):
    event = written(tmp_path / "other", aggregation(3))
    for name in ("../other/aggregations/0001.safetensors", "/etc/passwd", "aggregations/1.npz"):
        with pytest.raises(StateError, match="exchange 1 names the file"):
            read_matrices(tmp_path / "run", replace(event, file=name))
    with pytest.raises(StateError, match="is missing"):
        read_matrices(tmp_path / "run", event)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_error_or_still_matrices(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    event = written(folder, aggregation(5))
    path = folder / event.file
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_matrices(folder, event)
    except StateError as error:
        assert "0001.safetensors" in str(error)
    else:
        assert len(found.clients) == 5 and found.weights.shape == found.distances.shape == (5, 5)
        assert np.isfinite(found.weights).all() and np.isfinite(found.distances).all()


CONTRADICTIONS = {
    "clients": ([], "empty or has an id twice"),
    "distances": (np.full(10, np.nan, np.float32), "`distances` are not finite"),
    "weights": (np.full(15, -1.0), "`weights` are not finite and positive"),
    "columns": (np.full(15, 5), "`columns` are not indices of 5 clients"),
    "ends": (np.array([9, 3, 9, 12, 15]), "`ends` do not divide"),
    "rows": (np.array([0, 1, 2, 3, 5]), "`rows` are not those"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tensors_that_contradict_each_other_are_refused(tmp_path, name):
    import torch
    from safetensors.torch import load_file, save_file

    event = written(tmp_path, aggregation(5))
    tensors, (value, words) = load_file(tmp_path / event.file), CONTRADICTIONS[name]
    if name == "clients":
        value = np.frombuffer(json.dumps(value).encode(), np.uint8).copy()
    tensors[name] = torch.from_numpy(value)
    save_file(tensors, tmp_path / event.file, {"format": "pilot-flwr-2"})
    with pytest.raises(StateError, match=words):
        read_matrices(tmp_path, event)


def test_files_of_repeated_exchanges_are_removed(tmp_path):
    for exchange in (1, 2, 3):
        written(tmp_path, aggregation(3), exchange)
    (tmp_path / "aggregations/.0003.safetensors.9.tmp").write_bytes(b"torn")
    (tmp_path / "aggregations/notes.txt").write_text("mine")
    remove_matrices(tmp_path, after=1)
    names = sorted(path.name for path in (tmp_path / "aggregations").iterdir())
    assert names == ["0001.safetensors", "notes.txt"]
    remove_matrices(tmp_path / "nowhere", after=0)
