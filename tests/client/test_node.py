import math
from pathlib import Path

import pytest
import torch

from pilot_flwr.client.node import (
    SHARED_FOLDERS,
    find_site,
    is_simulated,
    num_processes,
    site_client,
    site_config,
    site_model,
)
from pilot_flwr.client.node_config import NodeSettings, read_node_config
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.data.federation import count_examples, federation_clients
from pilot_flwr.errors import ConfigError
from pilot_flwr.flower.compatibility import common_settings
from pilot_flwr.run.directory import RunFolder

CONFIG = load_config()


def site(node_config, run_name="demo-1", folder="/runs/x", token="secret", config=CONFIG):
    return find_site(
        read_node_config(node_config),
        config,
        run_name=run_name,
        run_folder=str(folder),
        simulated=is_simulated(node_config, str(folder), token),
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


def test_a_simulated_client_that_does_not_see_the_run_folder_says_so(tmp_path):
    engines = {"partition-id": 4, "num-partitions": 9}
    with pytest.raises(ConfigError, match="`run.folder` must be on a file system that all"):
        site(engines, folder=tmp_path / "elsewhere", token="the server's")
    with pytest.raises(ConfigError, match="private adapters.$"):
        site({"client-id": "vqa-2"}, folder=tmp_path / "elsewhere", token="the server's")


def test_a_state_folder_is_used_whatever_tells_the_client(tmp_path):
    run = RunFolder(tmp_path / "run")
    node_config = {"partition-id": 4, "num-partitions": 9, "state-folder": str(tmp_path / "own")}
    found = site(node_config, folder=tmp_path / "run", token=run.token)
    assert found.state_folder == tmp_path / "own" / "demo-1"


def test_a_real_site_is_what_its_own_node_config_says(tmp_path):
    found = site({"client-id": "vqa-2", "state-folder": str(tmp_path), "device": "cpu"})
    assert found.client.id == "vqa-2"
    assert found.state_folder == tmp_path / "demo-1"  # nothing of the server's folder
    assert found.device == "cpu"


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
        ({"client-id": "vqa-0", "state-folder": "here"}, "`state-folder` names 'here' but must be"),
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
    return site(node_config, "r", folder, token, LLAVA)


def test_a_real_sites_files_are_those_of_its_node_config(data_files):
    own = {"client-id": "gqa-1", "state-folder": "/state"}
    own |= {"train-file": f"{data_files}/a.json; {data_files}/b.json", "test-file": ""}
    found = llava_site(own)
    assert found.files.train == (data_files / "a.json", data_files / "b.json")
    assert (found.files.test, found.files.images) == ((), None)
    own |= {"test-file": f"{data_files}/t.json", "image-folder": f"{data_files}/images"}
    own |= {"linked-folders": "/hub/blobs; /more"}
    found = llava_site(own)
    assert (found.files.test, found.files.images) == (
        (data_files / "t.json",),
        data_files / "images",
    )
    assert found.files.linked_folders == (Path("/hub/blobs"), Path("/more"))


@pytest.mark.parametrize(
    ("run", "own", "expected"), [(500, None, 100), (500, 200, 200), (5, 200, 5), (5, 0.5, 0.5)]
)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_site_bounds_its_cache_of_features(run, own, expected, where):
    """A run may ask for less, never for more; a simulation takes the run's bound."""
    config = load_config(f"model.feature_cache={{where:{where},max_gib:{run}}}")
    node = read_node_config({"client-id": "vqa-0"} | ({"max-feature-gib": own} if own else {}))
    assert site_config(node, config, simulated=False).model.feature_cache.max_gib == expected
    assert site_config(node, config, simulated=True).model.feature_cache.max_gib == run
    mine, theirs = site_config(node, config, simulated=False), config
    assert common_settings(mine) == common_settings(theirs)


@pytest.mark.parametrize("wrong", [0, -1, "many", True, math.inf])
def test_a_bound_of_features_is_a_positive_number(wrong):
    with pytest.raises(ConfigError, match="`max-feature-gib` is .* but must be"):
        read_node_config({"client-id": "vqa-0", "max-feature-gib": wrong})


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


def test_a_real_sites_base_model_is_a_name_or_its_own_folder(tmp_path, monkeypatch):
    def path(configured, **node_config):
        node_config = {key.replace("_", "-"): value for key, value in node_config.items()}
        node = read_node_config(node_config)
        return site_model(node, ModelConfig(path=configured), simulated=False).path

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
        (str(tmp_path / "no"), "names .*is not a folder"),
        ("~no-such-user/x", "begins with '~' and the name of no user"),
    ):
        with pytest.raises(ConfigError, match=f"`model-path` {message}"):
            path("tiny-llava", model_path=name)
    simulated = site_model(NodeSettings(), ModelConfig(path=str(tmp_path)), simulated=True)
    assert simulated.path == str(tmp_path)


def test_no_disk_is_asked_about_what_the_server_calls_the_base_model(monkeypatch, tmp_path):
    asked = []
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: asked.append(str(path)) or exists(path))
    monkeypatch.chdir(tmp_path)
    for name in ("/etc", "../x", "~/x", "./org/name", "org/../x", "a/b/c", "org/.git"):
        with pytest.raises(ConfigError, match="`model.path`"):
            site_model(NodeSettings(), ModelConfig(path=name), simulated=False)
    assert asked == []
    site_model(NodeSettings(), ModelConfig(path="org/name"), simulated=False)
    assert asked == ["org/name"]  # where transformers would look first


OPEN = load_config("strategy.clients=3 data.tasks=[vqa,counting] data.clients_per_task=1")


def client_of(config=OPEN, **node_config):
    values = {key.replace("_", "-"): value for key, value in node_config.items()}
    return site_client(read_node_config(values), config)


@pytest.mark.parametrize("engine", [{}, {"partition_id": 7, "num_partitions": 9}])
def test_a_site_of_an_open_federation_has_any_name_and_says_its_task(engine):
    found = client_of(client_id="hospital-a", task="counting", **engine)
    assert (found.id, found.task, found.index) == ("hospital-a", "counting", None)
    assert client_of(client_id="counting-0", **engine).task == "counting"  # the run knows it
    assert client_of(client_id="counting-0", task="counting", **engine).index == 1


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({"client_id": "hospital-a"}, "`task` is missing .*'hospital-a'; .* one of vqa, counting"),
        ({"client_id": "hospital-a", "task": "ocr"}, "`task` is 'ocr' but the run has vqa, count"),
        ({"client_id": "vqa-0", "task": "counting"}, "`task` is 'counting' but client 'vqa-0' "),
        ({"client_id": "../x", "task": "vqa"}, "`client-id` is '../x' but must be letters"),
        ({"client_id": "", "task": "vqa"}, "`client-id` is '' but must be letters"),
        ({"partition_id": 0, "num_partitions": 3}, "`strategy.clients` is 3, .* `client-id`"),
    ],
)
def test_what_a_site_says_of_itself_must_fit_together_and_the_run(node_config, message):
    with pytest.raises(ConfigError, match=message):
        client_of(**node_config)


def test_a_configured_federation_says_how_to_let_others_in():
    with pytest.raises(
        ConfigError, match="'hospital-a' but .* vqa-0, .*`strategy.clients` above 0"
    ):
        client_of(CONFIG, client_id="hospital-a", task="vqa")
    with pytest.raises(ConfigError, match="`task` is 'vqa' but client 'counting-0'"):
        client_of(CONFIG, partition_id=3, num_partitions=9, task="vqa")


def test_the_demos_data_are_for_its_own_clients():
    stranger = client_of(client_id="hospital-a", task="vqa")
    with pytest.raises(ConfigError, match="`data.source` is digits.*vqa-0, counting-0 only"):
        count_examples(OPEN.data, stranger, "train", seed=0)


def test_min_replies_is_at_most_the_sites_that_are_waited_for():
    with pytest.raises(ConfigError, match="`strategy.min_replies` is 4 .* clients, 3"):
        load_config("strategy.clients=3 strategy.min_replies=4")


def test_a_micro_batch_keeps_the_examples_of_a_step():
    config = load_config("train.batch_size=6 train.accumulation_steps=2 evaluation.batch_size=5")

    def own(size):
        return site_config(NodeSettings(micro_batch=size), config, simulated=False)

    for size, steps in ((1, 12), (3, 4), (4, 3), (12, 1)):
        assert (own(size).train.batch_size, own(size).train.accumulation_steps) == (size, steps)
        assert own(size).evaluation.batch_size == min(5, size)
    assert own(0) == config
    for size in (5, 24):
        message = f"`micro-batch` is {size} but must divide the 12 .*: 1, 2, 3, 4, 6, 12\\."
        with pytest.raises(ConfigError, match=message):
            own(size)


def test_a_micro_batch_that_changes_the_gradient_is_refused():
    config = load_config("train.batch_size=6 train.loss_reduction=micro_batch")
    assert site_config(NodeSettings(micro_batch=6), config, simulated=False).train == config.train
    with pytest.raises(ConfigError, match="`micro-batch` is 3 but must be 6, .*loss_reduction"):
        site_config(NodeSettings(micro_batch=3), config, simulated=False)


def test_a_step_is_divided_among_processes():
    """The run's examples per step and, unless that is too few, its micro-batches."""
    config = load_config("train.batch_size=6 train.accumulation_steps=2 evaluation.batch_size=5")

    def own(**settings):
        train = site_config(NodeSettings(**settings), config, simulated=False).train
        return train.batch_size, train.accumulation_steps

    assert own(processes=2) == (6, 2)
    assert own(processes=3) == (4, 3) and own(processes=4) == (3, 4)
    assert own(processes=5) == (2, 6)
    assert own(processes=12) == (1, 12)
    assert own(processes=2, micro_batch=4) == (4, 3)
    for settings, most in (({"processes": 13}, 12), ({"processes": 4, "micro_batch": 4}, 3)):
        message = f"`processes` is {settings['processes']} but must be at most {most}, the micro-b"
        with pytest.raises(ConfigError, match=message):
            own(**settings)
    config = load_config("train.accumulation_steps=2 train.loss_reduction=micro_batch")
    assert own(processes=2) == (16, 2)
    with pytest.raises(ConfigError, match="`processes` is 3 but must be at most 2"):
        own(processes=3)


def test_a_site_alone_decides_its_number_of_processes(monkeypatch):
    run = load_config("simulation.client_processes=3")
    assert num_processes(NodeSettings(), run, simulated=False) == 1
    assert num_processes(NodeSettings(), run, simulated=True) == 3
    assert num_processes(NodeSettings(processes=2), run, simulated=False) == 2
    with pytest.raises(ConfigError, match="`device` is 'cuda:1' but .* 2 processes"):
        num_processes(NodeSettings(processes=2, device="cuda:1"), run, simulated=False)
    spread = load_config("model.device_map=auto")
    with pytest.raises(ConfigError, match="`processes` is 2 but must be 1 with `model.device_map"):
        num_processes(NodeSettings(processes=2), spread, simulated=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="`simulation.client_processes` is 3 .* at most 2, the"):
        num_processes(NodeSettings(), run, simulated=True)
    assert num_processes(NodeSettings(processes=2), run, simulated=True) == 2
    assert num_processes(NodeSettings(processes=4, device="cpu"), run, simulated=True) == 4


@pytest.mark.parametrize("name", SHARED_FOLDERS)
def test_a_run_cannot_take_a_folder_of_all_runs(name):
    with pytest.raises(ConfigError, match=f"run name is '{name}'"):
        site({"client-id": "vqa-0", "state-folder": "/x"}, run_name=name)


def test_a_site_sets_its_own_lora_rank_and_the_identity_stays(tmp_path):
    own = {"client-id": "vqa-2", "state-folder": str(tmp_path)}
    assert site(own).lora_rank == 0
    assert site(own | {"lora-rank": 4}).lora_rank == 4
    settings = NodeSettings(lora_rank=4)
    assert common_settings(site_config(settings, CONFIG, simulated=False)) == common_settings(
        CONFIG
    )


def test_a_simulated_client_has_the_rank_of_the_run_or_its_own(tmp_path):
    config = load_config("+model.lora.client_ranks={counting-1:3}")
    run = RunFolder(tmp_path)
    for number, rank in ((4, 3), (5, 0)):
        node = {"partition-id": number, "num-partitions": 9}
        found = site(node, folder=tmp_path, token=run.token, config=config)
        assert found.lora_rank == rank


def test_a_lora_rank_that_does_not_fit_the_run_is_refused():
    with pytest.raises(ConfigError, match="`lora-rank` is 9 but must be at most 8, `model.lora.r"):
        site_config(NodeSettings(lora_rank=9), CONFIG, simulated=False)
    exact = load_config("strategy=fedex_lora")
    assert site_config(NodeSettings(lora_rank=8), exact, simulated=False) is not None
    with pytest.raises(ConfigError, match="`strategy.lora` is exact but must be .* `lora-rank=4`"):
        site_config(NodeSettings(lora_rank=4), exact, simulated=False)
    ranks = load_config("+model.lora.client_ranks={vqa-0:4}")
    with pytest.raises(ConfigError, match="`model.lora.client_ranks` is set but must be empty"):
        site_config(NodeSettings(), ranks, simulated=False)
