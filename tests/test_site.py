import pytest
import torch

from pilot_flwr.config import load_config
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.run_folder import RunFolder
from pilot_flwr.site import find_site

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
    node_config = {"partition-id": 4, "state-folder": str(tmp_path / "own")}
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
