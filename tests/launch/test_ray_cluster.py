"""The simulation on a Ray cluster: settings, preflight of its machines, and Flower's actor count.

Tests with a real cluster are in test_ray_cluster_runs.py.
"""

import json
import shlex
import socket
import sys
import time
from importlib.metadata import version

import pytest
import ray
from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_files import write_federation

from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.config.schema import SimulationConfig
from pilot_flwr.errors import ConfigError, RunError
from pilot_flwr.launch import ray_cluster
from pilot_flwr.launch.processes import free_port
from pilot_flwr.launch.ray_cluster import Cluster, Node, address_of, ray_environment


@pytest.mark.parametrize(
    ("setting", "variable", "address"),
    [
        ("", None, ""),
        ("", "", ""),
        ("", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("", "auto", "auto"),
        ("", "local", ""),
        ("head:6379", "10.0.0.1:6379", "head:6379"),
        ("[fe80::1]:6379", None, "[fe80::1]:6379"),
        ("local", "10.0.0.1:6379", ""),
    ],
)
def test_the_setting_comes_before_the_environment(setting, variable, address):
    environment = {} if variable is None else {"RAY_ADDRESS": variable}
    assert address_of(SimulationConfig(address=setting), environment) == address


@pytest.mark.parametrize(
    ("simulation", "environment", "words"),
    [
        ({"address": "head"}, {}, "`simulation.address` is 'head' but must be HOST:PORT"),
        ({}, {"RAY_ADDRESS": "ray://head:10001"}, "`RAY_ADDRESS` is 'ray://head:10001' but must"),
        ({"cpus": 4}, {"RAY_ADDRESS": "head:6379"}, "`simulation.cpus` is 4 but must be left at 0"),
        ({"gpus": 0, "address": "auto"}, {}, "`simulation.gpus` is 0 but must be left at -1"),
    ],
)
def test_what_cannot_hold_on_a_cluster_is_refused(simulation, environment, words):
    with pytest.raises(ConfigError, match=words):
        address_of(SimulationConfig(**simulation), environment)


def test_limits_hold_for_a_ray_of_our_own_whatever_the_environment_says():
    simulation = SimulationConfig(address="local", cpus=4, gpus=0)
    assert address_of(simulation, {"RAY_ADDRESS": "head:6379"}) == ""


def make_cluster(*nodes: tuple[float, float], free: tuple[float, float] | None = None) -> Cluster:
    rows = tuple(Node(f"n{i} (10.0.0.{i})", *node) for i, node in enumerate(nodes))
    cpus, gpus = free or (sum(n.cpus for n in rows), sum(n.gpus for n in rows))
    return Cluster("10.0.0.0:6379", rows, cpus, gpus)


resources = st.tuples(st.integers(0, 64), st.integers(0, 8))


@settings(max_examples=200, deadline=None)
@given(st.lists(resources, min_size=1, max_size=5), st.integers(1, 9), st.sampled_from(
    [-1, 0, 0.1, 0.25, 0.3, 0.5, 1, 2]))  # fmt: skip
def test_clients_are_counted_as_flower_counts_its_actors(nodes, client_cpus, client_gpus):
    found = make_cluster(*nodes)
    simulation = SimulationConfig(client_cpus=client_cpus, client_gpus=client_gpus)
    # Ray leaves out what a machine has none of; one that has gone has nothing at all.
    rows = [{k: v for k, v in (("CPU", c), ("GPU", g)) if v} | {"memory": 1.0} for c, g in nodes]
    rows = [{"Resources": row} for row in [*rows, {}]]
    per_client = {"num_cpus": client_cpus, "num_gpus": found.client_gpus(simulation)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "nodes", lambda: rows)
        try:
            actors = pool_size_from_resources(per_client)
        except ValueError:  # Flower's word for none
            actors = 0
    assert found.clients_at_a_time(simulation) == actors


def test_flower_gets_one_clients_part_and_no_limit():
    found = make_cluster((8, 0), (8, 2))
    text = found.federation_config(9, SimulationConfig(client_cpus=2, client_gpus=0.25))
    assert dict(word.split("=") for word in text.split()) == {
        "num-supernodes": "9",
        "client-resources-num-cpus": "2",
        "client-resources-num-gpus": "0.25",
    }
    assert "num-gpus=1.0" in found.federation_config(9, SimulationConfig())
    assert "num-gpus=0.0" in make_cluster((8, 0)).federation_config(9, SimulationConfig())


def test_a_client_that_fits_nowhere_is_refused():
    with pytest.raises(
        ConfigError, match=r"`simulation.client_cpus` = 3 .* n1 \(10.0.0.1\): CPUs 2"
    ):
        make_cluster((2, 0), (2, 0)).federation_config(9, SimulationConfig(client_cpus=3))


def test_other_jobs_are_mentioned():
    quiet = make_cluster((2, 0), (2, 0)).describe(SimulationConfig())
    assert (
        quiet
        == "Ray cluster 10.0.0.0:6379: 2 machines, CPUs 4, GPUs 0; room for 4 clients at a time."
    )
    busy = make_cluster((2, 0), (2, 0), free=(1, 0)).describe(SimulationConfig())
    assert "1 of 4 CPUs and 0 of 0 GPUs are free" in busy


def test_the_environment_for_flower(tmp_path):
    base = {"HF_HOME": "/models", "HF_TOKEN": "secret", "PATH": "/bin"}
    found = ray_environment("head:6379", tmp_path, "the-mark", base)
    assert found["RAY_ADDRESS"] == "head:6379"
    assert found["FLWR_HOME"].startswith(str(tmp_path))
    actors = json.loads(found["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]["env_vars"]
    assert (actors["HF_HOME"], actors["PILOT_FLWR_LAUNCH"]) == ("/models", "the-mark")
    assert not {"HF_TOKEN", "PATH"} & actors.keys()  # any user of the cluster can read them


def test_an_unreachable_cluster_is_reported_at_once(tmp_path):
    started = time.monotonic()
    with pytest.raises(RunError, match="cannot be reached from here: .*Connection refused"):
        ray_cluster.check_cluster(load_config(), f"127.0.0.1:{free_port()}", tmp_path / "run")
    assert time.monotonic() - started < 5
    assert not (tmp_path / "run").exists()


def test_a_silent_cluster_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "PREFLIGHT_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RunError, match="did not answer within 2 s"):
            ray_cluster.check_cluster(load_config(), address, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def check(folder, **changes):
    """Run the remote check here, without Ray."""
    request = {
        "folder": str(folder),
        "probe": ".probe-1",
        "token": "1",
        "paths": [],
        "packages": [],
    }
    return ray_cluster._remote_check()._function({**request, **changes}, "node")


def test_a_machine_reports_what_it_has(tmp_path):
    (tmp_path / ".probe-1").write_text("1")
    paths = [str(tmp_path), str(tmp_path / "nothing")]
    found = check(tmp_path, paths=paths, packages=["torch", "no-such-package"])
    versions = {"torch": version("torch"), "no-such-package": ""}
    assert found == {"versions": versions, "folder": "", "missing": paths[1:]}
    assert [path.name for path in tmp_path.iterdir()] == [".probe-1"]
    assert check(tmp_path, token="2")["folder"] == "a different folder there"
    assert check(tmp_path / "nothing")["folder"] == "No such file or directory"


def test_what_a_machine_lacks_is_reported_node_by_node(tmp_path, monkeypatch):
    here = {package: version(package) for package in ray_cluster.PACKAGES}
    good = {"versions": here, "folder": "", "missing": []}
    bad = {
        "versions": {**here, "torch": "1.0", "peft": ""},
        "folder": "No such file or directory",
        "missing": ["/data/vqa.json"],
    }
    rows = [
        {"name": "a (10.0.0.1)", "cpus": 1, "gpus": 0, "answer": good, "error": ""},
        {"name": "b (10.0.0.2)", "cpus": 1, "gpus": 0, "answer": bad, "error": ""},
        {"name": "c (10.0.0.3)", "cpus": 1, "gpus": 0, "answer": None, "error": ""},
    ]
    answer = {"address": "a:1", "nodes": rows, "free": {"CPU": 3, "GPU": 0}}
    monkeypatch.setattr(ray_cluster, "_ask", lambda address, request: answer)
    with pytest.raises(RunError) as raised:
        ray_cluster.inspect_cluster("auto", tmp_path / "run")
    assert str(raised.value).splitlines()[1:-1] == [
        f"- b (10.0.0.2) has torch 1.0; here it is {here['torch']}.",
        f"- b (10.0.0.2) has peft not installed; here it is {here['peft']}.",
        f"- b (10.0.0.2) cannot use the run folder '{tmp_path}/run' (No such file or directory): "
        "`run.folder` must be on a file system that all machines share and may write to.",
        "- b (10.0.0.2) has no '/data/vqa.json'.",
        "- c (10.0.0.3) did not answer within 90 s.",
    ]
    rows[1:] = []
    assert ray_cluster.inspect_cluster("auto", tmp_path / "run").nodes == (
        Node("a (10.0.0.1)", 1, 0),
    )
    assert list((tmp_path / "run").iterdir()) == []


def test_the_paths_that_clients_read(tmp_path):
    federation = write_federation(tmp_path, tasks=("vqa",), clients=1)
    config = load_config(shlex.join(expand([f"data={federation}", f"model.path={sys.prefix}"])))
    names = ["train.json", "test.json", "images"]
    wanted = [sys.prefix, *(str(tmp_path / "vqa" / name) for name in names)]
    assert ray_cluster.needed_paths(config) == sorted(wanted)
    assert ray_cluster.needed_paths(load_config()) == []
