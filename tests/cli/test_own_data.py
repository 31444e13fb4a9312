"""Whole runs over LLaVA JSON and PNG files on disk: in a simulation, and at real sites."""

import json
import shlex
from dataclasses import replace

import pytest
from inprocess import Federation
from llava_files import write_federation
from PIL import Image

from pilot_flwr.cli.main import main
from pilot_flwr.client import client_data, session
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.data.client_files import simulated_paths
from pilot_flwr.data.examples import KeptImage
from pilot_flwr.errors import ConfigError
from pilot_flwr.model.checkpoints import checkpoint_path

TRAIN = (
    "train.epochs=1 train.batch_size=2 evaluation.max_new_tokens=2 strategy.rounds=1 "
    "strategy.num_neighbors=1 model.feature_cache.where=off"
)


def overrides(path, *more):
    return shlex.join(expand([f"data={path}", *shlex.split(TRAIN), *more]))


@pytest.fixture
def federation(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return write_federation(folder, train=8, test=2)


def stored_rows(folder):
    text = (folder / "train.json").read_text()
    return json.loads(text) if text[0] == "[" else [json.loads(x) for x in text.splitlines()]


def losses(run):
    return {(e["client"], e["round"]): (e["loss"], e["examples"]) for e in run.events("train")}


def scores(run):
    return {(e["client"], e["round"]): e["score"] for e in run.events("evaluate")}


def test_a_simulated_federation_trains_through_both_stages(federation, tmp_path):
    run = Federation(tmp_path / "run", overrides(federation)).run()
    assert run.events("failure") == []
    events = run.events("train")
    assert [e["stage"] for e in events] == [1] * 4 + [2] * 4
    assert {e["examples"] for e in events} == {4}  # 8 rows, two clients a task
    assert {e["examples"] for e in run.events("evaluate")} == {2}
    rows = [r for t in ("vqa", "counting") for r in stored_rows(federation.parent / t)]
    private = {row.get("image", "train-1.png") for row in rows} | {str(federation.parent)}
    private |= {
        turn["value"].removeprefix("<image>\n") for r in rows for turn in r["conversations"]
    }
    travelled = "".join(repr(m.content) for m in run.grid.messages if m.has_content())
    assert "loss" in travelled  # what travels can be read this way
    assert not [text for text in private if len(text) > 5 and text in travelled]


def test_real_sites_with_the_same_files_are_the_same_run(federation, tmp_path):
    """Sites name their files themselves; the paths of the run's configuration lead nowhere."""
    one = Federation(tmp_path / "one", overrides(federation, "data.clients_per_task=1")).run()
    data = federation.parent
    sites = [
        {
            "client-id": f"{task}-0",
            "state-folder": str(tmp_path / "sites" / task),
            "train-file": str(data / task / "train.json"),
            "test-file": str(data / task / "test.json"),
            "image-folder": str(data / task / "images"),
        }
        for task in ("vqa", "counting")
    ]
    nowhere = [
        "data.clients_per_task=1",
        *(
            f"data.files.{task}.{split}=[/no/where]"
            for task in ("vqa", "counting")
            for split in ("train", "test")
        ),
    ]
    other = Federation(
        tmp_path / "other", overrides(federation, *nowhere), node_configs=sites
    ).run()
    assert other.events("failure") == []
    assert losses(other) == losses(one) and len(losses(one)) == 4
    assert scores(other) == scores(one)


def test_features_and_losses_are_those_of_the_images_in_memory(federation, tmp_path, monkeypatch):
    """The same examples, held in memory instead of read from files, give the same run."""
    words = overrides(federation, "data.clients_per_task=1")
    one = Federation(tmp_path / "one", words).run()
    read = client_data.client_examples

    def in_memory(*arguments, **more):
        return [
            replace(example, images=tuple(KeptImage(image.read()) for image in example.images))
            for example in read(*arguments, **more)
        ]

    monkeypatch.setattr(client_data, "client_examples", in_memory)
    other = Federation(tmp_path / "other", words).run()
    assert losses(other) == losses(one) and scores(other) == scores(one)


def break_row(federation, task, number, **change):
    path = federation.parent / task / "train.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] |= change
    path.write_text("\n".join(map(json.dumps, rows)))


def test_a_broken_row_stops_its_client_before_anything_and_nobody_else(
    federation, tmp_path, monkeypatch
):
    break_row(federation, "counting", 3, image="Ann Smith.png")
    evaluated = []
    incoming = session.Session.evaluate_incoming
    monkeypatch.setattr(
        session.Session,
        "evaluate_incoming",
        lambda one: evaluated.append(one.site.client.id) or incoming(one),
    )
    run = Federation(tmp_path / "run", overrides(federation, "data.clients_per_task=1")).run()
    failures = run.events("failure")
    assert {e["client"] for e in failures} == {"counting-0"}
    reason = failures[0]["reason"]
    assert "train.json, row 4, image 1 cannot be opened" in reason
    assert "Ann" not in reason and str(federation.parent) not in reason
    trained = {e["client"] for e in run.events("train")}
    assert trained == {"vqa-0"}
    # Before each training and at last; the broken client by the last message alone.
    assert (evaluated.count("vqa-0"), evaluated.count("counting-0")) == (3, 1)


def test_an_allowed_share_is_left_out_and_the_rest_is_trained(federation, tmp_path):
    break_row(federation, "counting", 3, image="../outside.png")
    break_row(federation, "counting", 5, conversations="none")
    words = overrides(federation, "data.clients_per_task=1", "data.allowed_broken=0.25")
    run = Federation(tmp_path / "run", words).run()
    assert run.events("failure") == []
    examples = {e["client"]: e["examples"] for e in run.events("train")}
    assert examples == {"vqa-0": 8, "counting-0": 6}
    checked = list((tmp_path / "run/clients/counting-0/checked").iterdir())
    assert sorted(json.loads(path.read_text()) for path in checked) == [[], [3, 5]]


def test_an_image_of_any_shape_is_padded(federation, tmp_path):
    Image.new("RGB", (80, 20)).save(federation.parent / "vqa/images/train-1.png")
    words = overrides(federation, "data.clients_per_task=1", "data.image_aspect_ratio=pad")
    run = Federation(tmp_path / "run", words).run()
    assert run.events("failure") == []


def test_the_command_line_refuses_files_that_are_not_there(federation, capsys):
    (federation.parent / "counting/test.json").unlink()
    assert main(["run", f"data={federation}"]) == 2
    assert "`data.files.counting.test` names" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="`data.files.counting.test` names"):
        simulated_paths(load_config(overrides(federation)).data, ["train", "test"])
    simulated_paths(load_config(overrides(federation)).data, ["train"])


@pytest.mark.parametrize("key", ["train-file", "model-path"])
def test_a_site_without_what_it_must_name_is_refused_by_name(federation, tmp_path, key):
    sites = [
        {"client-id": f"{task}-0", "state-folder": str(tmp_path / task)}
        for task in ("vqa", "counting")
    ]
    words = ["data.clients_per_task=1", "strategy.wait_seconds=1"]
    if key == "model-path":
        for task, site in zip(("vqa", "counting"), sites, strict=True):
            site["train-file"] = str(federation.parent / task / "train.json")
        words.append(f"model.path={checkpoint_path('tiny-llava')}")  # which the server has
    run = Federation(tmp_path / "run", overrides(federation, *words), node_configs=sites)
    with pytest.raises(Exception, match=f"{key}") as error:
        run.run()
    assert "node config" in str(error.value)
