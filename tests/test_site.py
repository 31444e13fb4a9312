from pathlib import Path

import pytest
import torch

from pilot_flwr.config import load_config
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.model_settings import ModelConfig
from pilot_flwr.run_folder import RunFolder
from pilot_flwr.site import find_site, is_simulated, private_paths, site_model

CONFIG = load_config()


def site(node_config, run_name="demo-1", folder="/runs/x", token="secret"):
    return find_site(
        node_config, CONFIG, run_name=run_name, run_folder=str(folder), run_token=token
    )


def test_clients_are_counted_task_by_task():
    ids = [client.id for client in federation_clients(CONFIG.data)]
    assert ids[:4] == ["vqa-0", "vqa-1", "vqa-2", "counting-0"]
    assert [client.index for client in federation_clients(CONFIG.data)] == list(range(9))


def test_a_simulated_node_is_the_client_with_its_number(tmp_path):
    run = RunFolder(tmp_path)
    found = site({"partition-id": 4, "num-partitions": 9}, folder=tmp_path, token=run.token)
    assert (found.client.id, found.client.task) == ("counting-1", "counting")
    assert found.state_folder == tmp_path / "clients/counting-1"


@pytest.mark.parametrize("token", ["", "guessed"])
def test_a_node_on_another_machine_does_not_write_where_the_server_says(tmp_path, token):
    RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="`state-folder` is missing"):
        site({"partition-id": 4}, folder=tmp_path, token=token)
    with pytest.raises(ConfigError, match="`state-folder` is missing"):
        site({"partition-id": 4}, folder=tmp_path / "elsewhere", token=token)


def test_a_state_folder_is_used_whatever_tells_the_client(tmp_path):
    run = RunFolder(tmp_path / "run")
    node_config = {"partition-id": 4, "num-partitions": 9, "state-folder": str(tmp_path / "own")}
    found = site(node_config, folder=tmp_path / "run", token=run.token)
    assert found.state_folder == tmp_path / "own" / "demo-1"


def test_a_real_site_is_what_its_own_node_config_says(tmp_path):
    found = site({"client-id": "vqa-2", "state-folder": str(tmp_path), "device": "cpu"})
    assert found.client.id == "vqa-2"
    assert found.state_folder == tmp_path / "demo-1"  # nothing of the server's folder
    assert found.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({}, "neither `client-id` .* nor `partition-id`"),
        ({"client-id": "nobody", "state-folder": "/x"}, "`client-id` is 'nobody' but must be one"),
        ({"client-id": "vqa-0"}, "`state-folder` is missing in the node config of .*'vqa-0'"),
        ({"partition-id": 0, "num-partitions": 2}, "2 SuperNodes but .* 9 clients"),
        ({"partition-id": 9}, "`partition-id` is 9 but must be from 0 to 8"),
        (
            {"client-id": "vqa-0", "state-folder": "~no-such-user/x"},
            "`state-folder` begins with '~'",
        ),
        ({"client-id": "vqa-0", "device": "tpu9"}, "`device` is 'tpu9' but must be"),
        ({"client-id": "vqa-0", "device": "meta"}, "`device` is 'meta' but must be"),
        ({"client-id": "vqa-0", "device": "cuda:99"}, "`device` is 'cuda:99' but this machine"),
    ],
)
def test_an_incomplete_node_config_is_refused(node_config, message):
    with pytest.raises(ConfigError, match=message):
        site(node_config)


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b", "", "a\0b"])
def test_the_server_cannot_choose_a_folder_on_a_site(name):
    with pytest.raises(ConfigError, match="`run name` is"):
        site({"client-id": "vqa-0", "state-folder": "/x"}, run_name=name)


def test_a_task_that_the_source_does_not_have_is_refused():
    config = load_config("data.tasks=[vqa,ocr]")
    with pytest.raises(ConfigError, match="names 'ocr' but source 'digits' has vqa, counting"):
        federation_clients(config.data)


LLAVA = load_config(
    "data.source=llava data.tasks=[gqa] data.clients_per_task=2 data.folder=/servers/choice "
    "+data.files={gqa:{train:[/servers/choice/train.json],test:[t.json],images:/etc}}"
)


@pytest.fixture
def data_files(tmp_path):
    for name in ("a.json", "b.json", "t.json"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "images").mkdir()
    return tmp_path


def llava_site(node_config, folder="/runs/x", token="secret"):
    return find_site(node_config, LLAVA, run_name="r", run_folder=str(folder), run_token=token)


def test_a_real_sites_files_are_those_of_its_node_config(data_files):
    own = {"client-id": "gqa-1", "state-folder": "/state"}
    own |= {"train-file": f"{data_files}/a.json; {data_files}/b.json", "test-file": ""}
    found = llava_site(own)
    assert found.files.train == (data_files / "a.json", data_files / "b.json")
    assert (found.files.test, found.files.images) == ((), None)
    own |= {"test-file": f"{data_files}/t.json", "image-folder": f"{data_files}/images"}
    found = llava_site(own)
    assert (found.files.test, found.files.images) == (
        (data_files / "t.json",),
        data_files / "images",
    )


def test_only_a_proven_simulation_uses_the_runs_files(tmp_path):
    run = RunFolder(tmp_path)
    node_config = {"partition-id": 1, "num-partitions": 2, "state-folder": "/state"}
    assert llava_site(node_config, folder=tmp_path, token=run.token).files is None
    assert is_simulated(node_config, str(tmp_path), run.token)
    for missing in ("partition-id", "num-partitions"):  # not as the simulation engine makes it
        other = {key: value for key, value in node_config.items() if key != missing}
        assert not is_simulated(other, str(tmp_path), run.token)
    for token in ("", "guessed"):
        with pytest.raises(ConfigError, match="`train-file` is missing in the node config"):
            llava_site(node_config, folder=tmp_path, token=token)
    real = {"client-id": "gqa-1", "state-folder": "/state"}  # even on the server's machine
    assert not is_simulated(real, str(tmp_path), run.token)
    with pytest.raises(ConfigError, match="`train-file` is missing in the node config of .*gqa-1"):
        llava_site(real, folder=tmp_path, token=run.token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train-file": "a.json"}, "`train-file` names 'a.json' but must be an absolute path"),
        ({"train-file": "{0}/no.json"}, "`train-file` names 'no.json', which is no file"),
        ({"train-file": "{0}/images"}, "`train-file` names 'images', which is no file"),
        ({"test-file": "{0}/t.json;{0}/no.json"}, "`test-file` names 'no.json', which is no"),
        ({"image-folder": "{0}/a.json"}, "`image-folder` names 'a.json', which is no folder"),
    ],
)
def test_a_wrong_path_of_a_node_config_is_named_without_its_folder(data_files, change, message):
    own = {"client-id": "gqa-1", "state-folder": "/state", "train-file": f"{data_files}/a.json"}
    own |= {key: value.format(data_files) for key, value in change.items()}
    with pytest.raises(ConfigError, match=message) as error:
        llava_site(own)
    assert str(data_files) not in str(error.value)


def test_a_real_sites_base_model_is_a_name_or_its_own_folder(tmp_path, monkeypatch):
    def path(configured, **node_config):
        node_config = {key.replace("_", "-"): value for key, value in node_config.items()}
        return site_model(node_config, ModelConfig(path=configured), simulated=False).path

    assert path("tiny-llava") == "tiny-llava"
    assert path("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    assert path("/servers/choice", model_path=str(tmp_path)) == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "model").mkdir(parents=True)
    (tmp_path / "single").mkdir()
    wrong = ("/etc", "local/model", "single", "../tiny-llava", "a/b/c", "./tiny-llava", "~/model")
    for name in (*wrong, str(tmp_path), "absent", "..", "a/..", "org/../x"):
        with pytest.raises(
            ConfigError, match="`model.path` of the run must be a shipped name"
        ) as error:
            path(name)
        assert repr(name) not in str(error.value)
    for name, message in (
        ("local", "names .*absolute path"),
        (str(tmp_path / "no"), "names .*is no folder"),
        ("~no-such-user/x", "begins with '~' and the name of no user"),
    ):
        with pytest.raises(ConfigError, match=f"`model-path` {message}"):
            path("tiny-llava", model_path=name)
    simulated = site_model({}, ModelConfig(path=str(tmp_path)), simulated=True)
    assert simulated.path == str(tmp_path)


def test_no_disk_is_asked_about_what_the_server_calls_the_base_model(monkeypatch, tmp_path):
    asked = []
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: asked.append(str(path)) or exists(path))
    monkeypatch.chdir(tmp_path)
    for name in ("/etc", "../x", "~/x", "./org/name", "org/../x", "a/b/c", "org/.git"):
        with pytest.raises(ConfigError, match="`model.path`"):
            site_model({}, ModelConfig(path=name), simulated=False)
    assert asked == []
    site_model({}, ModelConfig(path="org/name"), simulated=False)
    assert asked == ["org/name"]  # where transformers would look first


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
