"""A client's rows: from the run's files in a simulation, from the site's files otherwise."""

import json
import re
import shlex
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from llava_files import SUFFIX, write_federation

from pilot_flwr.config.data import DataConfig, TaskFiles
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.data.client_files import SiteFiles
from pilot_flwr.data.federation import (
    client_examples,
    count_examples,
    federation_clients,
    padding_colour,
    task_metric,
)
from pilot_flwr.data.llava import Reading, to_example
from pilot_flwr.errors import ConfigError, DataError

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "reference" / "data.md"


@pytest.fixture
def make(tmp_path):
    def make(**settings):
        path = write_federation(tmp_path, **settings)
        return load_config(" ".join(f'"{word}"' for word in expand([f"data={path}"]))).data

    return make


def ids(data, split="train", **more):
    read = {}
    for client in federation_clients(data):
        read[client.id] = [e.id for e in client_examples(data, client, split, seed=0, **more)]
    return read


def test_shares_are_disjoint_and_complete_and_each_tasks_own(make):
    data = make(train=13, clients=3)
    found = ids(data)
    assert list(found) == ["vqa-0", "vqa-1", "vqa-2", "counting-0", "counting-1", "counting-2"]
    assert [len(rows) for rows in found.values()] == [5, 4, 4] * 2
    for task in ("vqa", "counting"):
        shares = [set(rows) for name, rows in found.items() if name.startswith(task)]
        assert all(not a & b for a, b in combinations(shares, 2))
        assert len(set.union(*shares)) == 13
    counts = [count_examples(data, c, "train", seed=0) for c in federation_clients(data)]
    assert counts == [5, 4, 4] * 2


def test_another_task_does_not_move_a_tasks_rows(make):
    both = make()
    alone = replace(both, tasks=["counting"])
    assert ids(alone)["counting-1"] == ids(both)["counting-1"]


def test_the_test_file_is_every_clients_and_the_draw_is_the_same(make):
    data = make(test=6)
    assert len({tuple(rows) for name, rows in ids(data, "test").items() if "vqa" in name}) == 1
    few = ids(replace(data, test_examples=3, train_examples=2), "test")
    assert few["vqa-0"] == few["vqa-1"] and len(few["vqa-0"]) == 3
    assert set(few["vqa-0"]) < set(ids(data, "test")["vqa-0"])


def test_a_test_file_is_dealt_out_where_that_is_asked_for(make):
    data = make(test=6)
    data.files["vqa"].split_test = True
    found = ids(data, "test")
    assert len(found["vqa-0"]) == len(found["vqa-1"]) == 3
    assert not set(found["vqa-0"]) & set(found["vqa-1"])
    assert found["counting-0"] == found["counting-1"]


def test_a_file_that_was_changed_is_dealt_out_anew(make, tmp_path):
    """In the same process, which caches the partition of the old file."""
    data = replace(make(), tasks=["counting"])
    ids(data)
    path = tmp_path / "counting/train.json"
    path.write_text(path.read_text() + "\n" + "\n".join(path.read_text().split("\n")[:3]))
    found = ids(data)
    assert [len(rows) for rows in found.values()] == [8, 7]
    numbers = {int(name.split(":")[0]) for rows in found.values() for name in rows}
    assert numbers == set(range(1, 16))


def test_at_most_so_many_training_examples_of_the_clients_own(make):
    data = make()
    few = ids(replace(data, train_examples=4))
    for name, rows in ids(data).items():
        assert len(few[name]) == 4 and set(few[name]) < set(rows)


def test_a_file_per_client(make, tmp_path):
    data = make(tasks=("vqa",))
    (tmp_path / "second.json").write_text((tmp_path / "vqa/test.json").read_text())
    data.files["vqa"].train.append("second.json")
    data = replace(data, partition=replace(data.partition, kind="files"))
    assert [len(rows) for rows in ids(data).values()] == [12, 4]
    assert ids(data)["vqa-1"] == ids(data, "test")["vqa-0"] == ids(data, "test")["vqa-1"]
    data.files["vqa"].test.append("vqa/train.json")
    assert [len(rows) for rows in ids(data, "test").values()] == [4, 12]
    data.files["vqa"].test.pop()
    data.files["vqa"].split_test = True
    assert [len(rows) for rows in ids(data, "test").values()] == [2, 2]


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_per_client_means_as_many_files(make, count):
    data = make(tasks=("vqa",), clients=2)
    files = {"vqa": TaskFiles(train=["a"] * count, test=["b"])}
    partition = replace(data.partition, kind="files")
    with pytest.raises(ConfigError, match=f"`data.files.vqa.train` names {count} files but .* 2"):
        replace(data, files=files, partition=partition)


def test_dirichlet_over_a_column(make):
    data = make(train=40)
    partition = replace(data.partition, kind="dirichlet", column="kind", alpha=0.1, min_examples=2)
    data = replace(data, partition=partition)
    shares = [client_examples(data, c, "train", seed=0) for c in federation_clients(data)[2:]]
    kinds = [{share.row(n)["kind"] for n in range(len(share))} for share in shares]
    assert sum(map(len, shares)) == 40 and kinds[0] != kinds[1]


def test_what_an_example_is(make):
    """Examples read from PNG and JSON equal the demo's, with the suffix added."""
    data = make(clients=1)
    client = federation_clients(data)[0]
    examples = client_examples(data, client, "train", seed=0)
    first, second = examples[0], examples[1]
    assert len(first.turns) == 4 and first.images == () and first.id == "1:0"
    assert all(turn.text.endswith(f"\n{SUFFIX}") for turn in first.turns[::2])
    assert second.turns[0].text.startswith("<image>\n") and second.images[0].size() == (32, 32)
    assert second.id == "2:train1" and second.origin == "train.json, row 2"
    assert task_metric(data, "vqa") == "exact_match"


def test_padding_needs_its_colour(make, processor):
    data = replace(make(), image_aspect_ratio="pad")
    client = federation_clients(data)[0]
    colour = padding_colour(data, processor.image_processor)
    examples = client_examples(data, client, "train", seed=0, background=colour)
    assert examples[1].images[0].background == colour is not None
    assert count_examples(data, client, "train", seed=0) == 6
    with pytest.raises(AssertionError):
        client_examples(data, client, "train", seed=0)
    assert padding_colour(DataConfig(image_aspect_ratio="pad"), None) is None  # the digits


def test_a_real_site_reads_its_own_files_and_no_other(make, tmp_path):
    data = make()
    for files in data.files.values():
        files.train, files.test, files.images = ["/etc/passwd"], ["/etc/passwd"], "/etc"
    data = replace(data, folder="/etc")
    client = federation_clients(data)[1]
    own = SiteFiles((tmp_path / "vqa/train.json", tmp_path / "vqa/test.json"), (), tmp_path)
    examples = client_examples(data, client, "train", seed=0, files=own)
    assert len(examples) == count_examples(data, client, "train", seed=0, files=own) == 16
    assert examples[0].id == "1/1:0" and examples[1].images[0].folder == tmp_path
    assert examples[0].turns[0].text.endswith(SUFFIX)  # a text, not a path, comes from the run
    with pytest.raises(ConfigError, match="`test-file` is missing in the node config"):
        client_examples(data, client, "test", seed=0, files=own)
    few = client_examples(replace(data, train_examples=3), client, "train", seed=0, files=own)
    assert len(few) == 3


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskFiles(test=["b"]), "`data.files.vqa.train` is empty but must name a file"),
        (TaskFiles(train=["no.json"]), "`data.files.vqa.train` names '.*/no.json', which is no"),
        (TaskFiles(train=["vqa"]), "`data.files.vqa.train` names '.*/vqa', which is not a file"),
    ],
)
def test_a_simulated_clients_files_must_be_there(make, task, message):
    data = replace(make(tasks=("vqa",)), files={"vqa": task})
    with pytest.raises(ConfigError, match=message):
        client_examples(data, federation_clients(data)[0], "train", seed=0)


def test_a_relative_folder_is_refused(make):
    data = replace(make(tasks=("vqa",)), folder="somewhere")
    with pytest.raises(ConfigError, match="json', but it or `data.folder` must be absolute"):
        client_examples(data, federation_clients(data)[0], "train", seed=0)


def test_a_split_without_rows_is_an_error(make, tmp_path):
    data = make(tasks=("vqa",), clients=1)
    (tmp_path / "vqa/test.json").write_text("[]")
    with pytest.raises(DataError, match="test.json has no rows"):
        client_examples(data, federation_clients(data)[0], "test", seed=0)


def test_an_unknown_metric_names_those_that_there_are(make):
    data = make(tasks=("vqa",))
    data.files["vqa"].metric = "accuracy"
    with pytest.raises(
        ConfigError, match="`data.files.vqa.metric` is 'accuracy' but must be .*gqa"
    ):
        federation_clients(data)


def test_the_documents_examples_are_valid(tmp_path):
    """Read the row and the federation file of docs/reference/data.md."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (row,) = [json.loads(text) for kind, text in blocks if kind == "json"]
    example = to_example(row, "1:", "a.json, row 1", Reading(tmp_path))
    assert example.answers == ("white and red", "red and white") and len(example.images) == 1
    (federation,) = [text for kind, text in blocks if kind == "yaml"]
    (tmp_path / "mine.yaml").write_text(federation)
    data = load_config(shlex.join(expand([f"data={tmp_path / 'mine.yaml'}"]))).data
    assert [client.id for client in federation_clients(data)][::3] == ["gqa-0", "captions-0"]


def test_the_documents_node_configs_are_read_by_flower_and_by_the_check(tmp_path):
    """Over several lines too: Flower's own parser, that of `--node-config`, and the check's."""
    blocks = re.findall(r"```bash\n(flower-supernode.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (words,) = [shlex.split(block)[-1] for block in blocks]
    assert words.count("\n") == 2
    expected = dict(word.split("=", 1) for word in shlex.split(words))
    assert parse_config_args([words]) == expected
    assert list(expected)[:2] == ["client-id", "state-folder"] and len(expected) == 6


def test_rows_are_written_as_json_says(tmp_path):
    write_federation(tmp_path)
    assert len(json.loads((tmp_path / "vqa/train.json").read_text())) == 12
