"""Overrides pass through Hydra's, the shell's and TOML's quoting unchanged."""

import shlex
import warnings
from datetime import datetime
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import yaml

from pilot_flwr.config import overrides as submission
from pilot_flwr.config.loading import from_yaml, load_config, quoted, to_yaml
from pilot_flwr.config.overrides import expand
from pilot_flwr.config.schema import SimulationConfig
from pilot_flwr.errors import ConfigError
from pilot_flwr.sweeps.jobs import expand_jobs

NASTY = [
    "/plain/path-1.0_x",
    "/with blank/x",
    "/it's",
    '/say "hi"',
    "/a,b=c[1]{d:e}",
    "/back\\slash",
    "/back\\'quote",
    "/end\\",
    "/end\\\\",
    "/${name}",
    "/\\${name}",
    "/$HOME/~x/#c/%s/a:b(c)",
    "/ü✓🎈",
    "/tab\there",
]


@pytest.fixture(scope="module")
def parse_config_args():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Flower's command line uses
        from flwr.common.config import parse_config_args
    return parse_config_args


TEXTS = [
    "run.folder",
    "data.folder",
    "resume",
    "model.path",
    "model.system_prompt",
    "data.partition.column",
]


@pytest.mark.parametrize(
    "paths", [NASTY[i : i + len(TEXTS)] for i in range(0, len(NASTY), len(TEXTS))]
)
def test_any_path_survives_hydra_and_the_shell(paths):
    """Several settings at a time, since Hydra is slow."""
    words = [
        submission.path_override(key, Path(path)) for key, path in zip(TEXTS, paths, strict=False)
    ]
    config = load_config(shlex.join(["run.folder=/other", *words]))
    assert [attrgetter(key)(config) for key in TEXTS[: len(paths)]] == list(paths)


@pytest.mark.parametrize("text", [*NASTY, "", 'a="b c" d=[1,2] e=\'"\'', "line\nbreak", "\x7f\x01"])
def test_flower_reads_back_the_overrides(text, parse_config_args):
    argument = f"overrides={submission.toml_string(text)}"
    assert parse_config_args([argument]) == {"overrides": text}


def test_the_federation_config_in_flowers_words(parse_config_args):
    text = submission.federation_config(
        9, SimulationConfig(cpus=4, gpus=1, client_cpus=2, client_gpus=0.25)
    )
    assert parse_config_args([text]) == {
        "num-supernodes": 9,
        "client-resources-num-cpus": 2,
        "client-resources-num-gpus": 0.25,
        "init-args-num-cpus": 4,
        "init-args-num-gpus": 1,
    }
    assert "init-args-num-cpus=0" not in submission.federation_config(1, SimulationConfig())


@pytest.mark.parametrize(
    ("simulation", "field"),
    [
        (SimulationConfig(cpus=2, client_cpus=3), "simulation.client_cpus"),
        (SimulationConfig(cpus=1, gpus=0, client_gpus=0.5), "simulation.client_gpus"),
        (SimulationConfig(cpus=1, gpus=1, client_gpus=2), "simulation.client_gpus"),
    ],
)
def test_a_federation_in_which_no_client_fits_is_refused(simulation, field):
    with pytest.raises(ConfigError, match=f"`{field}` is .* but must be"):
        submission.federation_config(3, simulation)


@pytest.mark.parametrize(
    ("seen", "simulation", "client_gpus", "gpus"),
    [
        (0, SimulationConfig(), 0.0, 0),
        (1, SimulationConfig(), 1.0, 1),
        (4, SimulationConfig(), 1.0, 4),
        (4, SimulationConfig(client_gpus=0.25), 0.25, 4),
        (4, SimulationConfig(client_gpus=2), 2.0, 4),
        (4, SimulationConfig(gpus=2), 1.0, 2),
        (4, SimulationConfig(client_processes=2), 2.0, 4),
        (0, SimulationConfig(client_processes=2), 0.0, 0),
        (4, SimulationConfig(client_processes=2, client_gpus=0), 0.0, 4),
        (4, SimulationConfig(gpus=0), 0.0, 0),
        (4, SimulationConfig(client_gpus=0), 0.0, 4),
    ],
)
def test_gpus_are_found_unless_the_user_says_otherwise(
    monkeypatch, parse_config_args, seen, simulation, client_gpus, gpus
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    config = parse_config_args([submission.federation_config(3, simulation)])
    assert config["client-resources-num-gpus"] == client_gpus
    assert config["init-args-num-gpus"] == gpus


def test_a_message_about_gpus_names_what_was_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = "`simulation.client_gpus` is 0.5 but must be at most `simulation.gpus`, here 0"
    with pytest.raises(ConfigError, match=message):
        submission.federation_config(3, SimulationConfig(client_gpus=0.5))


@pytest.mark.parametrize(("seen", "gpus"), [(0, -1), (0, 0), (2, 2), (2, 0)])
def test_gpus_that_are_there_are_enough(monkeypatch, seen, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    submission.check_gpus(SimulationConfig(gpus=gpus))


def test_more_gpus_than_there_are_would_silently_be_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="`simulation.gpus` is 2 but must be at most 1, the"):
        submission.check_gpus(SimulationConfig(gpus=2))


def test_the_default_run_folder_is_where_the_user_stands(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = datetime(2025, 3, 4, 5, 6, 7)
    expected = tmp_path / "outputs" / "demo-20250304-050607"
    assert submission.run_folder("", "demo", now) == expected
    assert submission.default_run_folder("demo", now).absolute() == expected
    assert submission.run_folder("../x/./y", "demo", now) == tmp_path.parent / "x" / "y"


def test_a_run_folder_in_use_is_refused(tmp_path: Path):
    now = datetime(2025, 1, 1)
    assert submission.run_folder(str(tmp_path), "demo", now) == tmp_path
    (tmp_path / "result.json").touch()
    for configured in (tmp_path, tmp_path / "result.json"):
        with pytest.raises(ConfigError, match="`run.folder` is .* but must be a new or empty"):
            submission.run_folder(str(configured), "demo", now)


UNQUOTED = [
    "/a/epoch=9(1)",
    "/a (1)/b c",
    "/a,b",
    "/[a]{b}",
    "[a,b]",
    "{a:b}",
    "it's",
    'say "x"',
    "1_000",
    "/a:b, c=(d)[e]",
]


@pytest.mark.parametrize("text", UNQUOTED)
def test_a_text_setting_takes_what_the_user_types(text):
    words = [f"{key}={text}" for key in TEXTS]
    config = load_config(shlex.join(words))
    assert {attrgetter(key)(config) for key in TEXTS if key != "run.folder"} == {text}
    recorded = from_yaml(to_yaml(config), [f"model.path={text}/x"])
    assert recorded.model.path == f"{text}/x"


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=9(1)",
        "data.tasks=[a(1)]",
        "data.files.a.train=[a(1).json]",
        "model.path=/a(${oc.env:HOME})",
        "model=tiny(1)",
        "seed='1",
    ],
)
def test_an_override_that_cannot_be_parsed_is_named_in_our_words(override):
    key = override.partition("=")[0]
    for read in (lambda: load_config(shlex.join([override])), lambda: from_yaml("", [override])):
        with pytest.raises(ConfigError) as caught:
            read()
        assert f"The override {override!r} cannot be parsed. Put each text" in str(caught.value)
        assert f"\"{key}='a (1)'\"" in str(caught.value)


def test_the_advice_of_that_error_works():
    words = ["+data.files={a:{train:['a(1).json']}}", "data.tasks=[a]", "data.source=llava"]
    assert load_config(shlex.join(words)).data.files["a"].train == ["a(1).json"]


def test_a_sweep_takes_such_paths_and_names_an_override_that_it_cannot_split():
    words = ["model.path=/a/epoch=9(1)", "data.folder='/a,b','/c(d)'", "seed=1,2", "name=a,b"]
    jobs = expand_jobs([quoted(word, sweep=True) for word in words])
    configs = [load_config(shlex.join(job.overrides)) for job in jobs]
    assert {config.model.path for config in configs} == {"/a/epoch=9(1)"}
    assert {config.data.folder for config in configs} == {"/a,b", "/c(d)"}
    assert len(jobs) == 8
    word = "model.path=/a(1),/b"
    with pytest.raises(ConfigError, match="The override 'model.path=/a.1.,/b' cannot be parsed"):
        quoted(word, sweep=True)


@pytest.mark.parametrize("folder", UNQUOTED)
def test_a_federation_file_in_such_a_folder(tmp_path, folder):
    path = tmp_path / folder.strip("/") / "epoch=9(1).yaml"
    path.parent.mkdir(parents=True)
    files = {"a": {"train": [f"{folder}.json"], "images": folder}}
    path.write_text(yaml.safe_dump({"tasks": ["a"], "files": files, "folder": folder.strip("/")}))
    data = load_config(shlex.join(expand([f"data={path}"]))).data
    assert data.folder == str(path.parent / folder.strip("/"))
    assert (data.files["a"].train, data.files["a"].images) == ([f"{folder}.json"], folder)
