"""The words of a node config: read whole, or refused by name."""

from pathlib import Path

import pytest

from pilot_flwr.client.node_config import KEYS, NodeSettings, private_paths, read_node_config
from pilot_flwr.errors import ConfigError


def test_a_node_config_is_read_as_it_is_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    read = read_node_config(
        {
            "client-id": "hospital_A-1",
            "task": "vqa",
            "train-file": "/d/a.json; ~/b.json;",
            "test-file": "",
            "image-folder": "/d/images",
            "state-folder": "~/state",
            "device": "cuda:1",
            "model-path": "/models/llava",
            "micro-batch": 4,
            "lora-rank": 4,
            "processes": 2,
            "partition-id": 3,
            "num-partitions": 9,
        }
    )
    assert read == NodeSettings(
        client_id="hospital_A-1",
        task="vqa",
        partition_id=3,
        num_partitions=9,
        train_files=(Path("/d/a.json"), Path("/home/ann/b.json")),
        test_files=(),
        image_folder=Path("/d/images"),
        state_folder=Path("/home/ann/state"),
        device="cuda:1",
        model_path=Path("/models/llava"),
        micro_batch=4,
        lora_rank=4,
        processes=2,
    )
    assert read_node_config({}) == NodeSettings()
    assert read_node_config({"micro-batch": "8"}).micro_batch == 8  # as `data check` has it


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trainfile", "train-file"),
        ("micro_batch", "micro-batch"),
        ("learning-rate", None),
        ("images-folder", "image-folder"),
        ("client_id", "client-id"),
        ("Task", "task"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key, near):
    with pytest.raises(ConfigError, match=f"`{key}` in the node config is not a key") as error:
        read_node_config({"client-id": "a", key: "x"})
    assert ("Did you mean" in str(error.value)) == (near is not None)
    assert near is None or f"Did you mean `{near}`?" in str(error.value)
    assert all(name in str(error.value) for name in KEYS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("client-id", 3, "`client-id` is 3 but must be text in quotes"),
        ("client-id", "St. Mary", "`client-id` is 'St. Mary' but must be letters, digits"),
        ("train-file", True, "`train-file` is True but must be text in quotes"),
        ("train-file", "a.json", "`train-file` names 'a.json' but must be an absolute path"),
        ("state-folder", "state", "`state-folder` names 'state' but must be an absolute path"),
        ("image-folder", "~no-such-user/x", "`image-folder` begins with '~'"),
        ("micro-batch", 0, "`micro-batch` is 0 but must be at least 1"),
        ("micro-batch", -4, "`micro-batch` is -4 but must be at least 1"),
        ("micro-batch", 2.0, "`micro-batch` is 2.0 but must be a whole number"),
        ("processes", 0, "`processes` is 0 but must be at least 1"),
        ("processes", "all", "`processes` is 'all' but must be a whole number"),
        ("micro-batch", True, "`micro-batch` is True but must be a whole number"),
        ("micro-batch", "many", "`micro-batch` is 'many' but must be a whole number"),
        ("lora-rank", 0, "`lora-rank` is 0 but must be at least 1"),
        ("lora-rank", "half", "`lora-rank` is 'half' but must be a whole number"),
        ("partition-id", "x", "`partition-id` is 'x' but must be a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(key, value, message):
    with pytest.raises(ConfigError, match=message):
        read_node_config({key: value})


def test_a_nodes_private_paths_have_their_keys_in_every_spelling(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    node_config = {
        "client-id": "vqa-0",
        "partition-id": 3,
        "state-folder": "~/state",
        "train-file": f"{tmp_path}/link/a.json; {tmp_path}/b/c.json",
        "model-path": "~no-such-user/model",
    }
    assert private_paths(node_config) == {
        "~/state": "<state-folder>",
        f"{tmp_path}/home/state": "<state-folder>",
        f"{tmp_path}/link/a.json": "<train-file>",
        f"{real}/a.json": "<train-file>",
        f"{tmp_path}/b/c.json": "<train-file>",
        f"{tmp_path}/link": "<folder of train-file>",
        f"{real}": "<folder of train-file>",
        f"{tmp_path}/b": "<folder of train-file>",
        "~no-such-user/model": "<model-path>",
        f"{tmp_path}/home": "<home>",
    }
