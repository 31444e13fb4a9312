"""What a client believes of the server, and what it tells it: messages to the real ClientApp."""

import functools
import json
import logging
import os
import shlex
from datetime import datetime
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from flwr.app import Message, MessageType
from inprocess import SMALL, Federation, InProcessGrid
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pilot_flwr import client_app
from pilot_flwr.client import node as site_module
from pilot_flwr.config.loading import config_folder, from_yaml, load_config, to_yaml
from pilot_flwr.config.overrides import expand
from pilot_flwr.errors import ConfigError, DataError, RunError
from pilot_flwr.flower import messages
from pilot_flwr.flower.messages import OWN_ERROR, without_paths
from pilot_flwr.launch.prepare import prepare
from pilot_flwr.protocol import RunInfo
from pilot_flwr.run.directory import RunFolder
from pilot_flwr.run.history import read_run
from pilot_flwr.server.resume import check_resumable
from pilot_flwr.site import handlers
from pilot_flwr.sweeps.runner import sweep

SECRET = "hunter2-of-the-site"
ONE = f"{SMALL} data.tasks=[vqa] data.clients_per_task=1"


def ask(overrides, node_config, run=("run-1", "/nowhere", "guessed")):
    """Send one query through the real ClientApp and return its reply."""
    grid = InProcessGrid(
        client_app.app, num_nodes=1, overrides=overrides, node_configs=[node_config]
    )
    query = Message(messages.encode_query(RunInfo(*run), 2), 1, MessageType.QUERY, group_id="1")
    (reply,) = grid.send_and_receive([query])
    return reply


@pytest.fixture
def site(tmp_path):
    return {"client-id": "vqa-0", "state-folder": str(tmp_path / "state of the site")}


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """Secrets of a site: in its environment, and in files that Hydra could read."""
    monkeypatch.setenv("SITE_SECRET", SECRET)
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "secret.yaml").write_text(f"source: {SECRET}\n")
    (folder / "data").mkdir()  # as a searched folder has it
    (folder / "data/secret.yaml").write_text(f"source: {SECRET}\n")
    return folder


def test_an_honest_query_is_answered(site):
    reply = ask(ONE, site)
    assert reply.content["member"]["client"] == "vqa-0"


HOSTILE = {
    "environment": "data.source=${{oc.env:SITE_SECRET}}",
    "environment, quoted": "data.source='${{oc.env:SITE_SECRET}}'",
    "environment, cast": "data.source=str(${{oc.env:SITE_SECRET}})",
    "environment, in a list": "data.tasks=[vqa,'a${{oc.env:SITE_SECRET}}']",
    "environment, in a mapping": "+data.files={{vqa:{{metric:${{oc.env:SITE_SECRET}}}}}}",
    "environment, of a group": "data={{source:${{oc.env:SITE_SECRET}}}}",
    "environment, as a choice": "data=${{oc.env:SITE_SECRET}}",
    "environment, behind a backslash": r"data.source='a\\${{oc.env:SITE_SECRET}}'",
    "environment, added": "+name=${{oc.env:SITE_SECRET}}",
    "environment, forced": "++data.source=${{oc.env:SITE_SECRET}}",
    "file": "data={up}{folder}/secret",
    "file, absolute": "data={folder}/secret",
    "file, added": "+data={up}{folder}/secret",
    "file, in a list": "data=[digits,{up}{folder}/secret]",
    "file, at another place": "+experiment@data.files={up}{folder}/secret",
    "file, through a package": "experiment@data={up}{folder}/secret",
    "searched folder": "hydra.searchpath=['file://{folder}'] data=secret",
    "searched folder, added": "+hydra.searchpath=['file://{folder}'] data=secret",
    "searched folder, by a mapping": "hydra={{searchpath:['file://{folder}']}} data=secret",
    "listed folder": "data=glob(*)",
    "group of Hydra": "hydra/job_logging={up}{folder}/secret",
    "deleted": "~data={up}{folder}/secret",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_override_reads_the_sites_files_or_environment(kind, site, secrets, monkeypatch):
    up = os.path.relpath("/", config_folder() / "data")
    words = [w.format(folder=secrets, up=up) for w in HOSTILE[kind].split(" data=")]
    words = [words[0], *(f"data={word}" for word in words[1:])]
    opened = []
    load = OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: opened.append(file.name) or load(file))
    reply = ask(shlex.join(words), site)
    assert reply.has_error() and reply.error.code == OWN_ERROR
    assert SECRET not in reply.error.reason
    assert not [name for name in opened if not name.startswith(str(config_folder()))]
    sent = " ".join(words)
    assert (str(secrets) in reply.error.reason) <= (str(secrets) in sent)


def test_what_is_no_secret_is_no_reason_to_look(site, tmp_path):
    """The reply is the same whether there is such a file or not."""
    up = os.path.relpath("/", config_folder() / "data")
    (tmp_path / "there.yaml").write_text("name: x\n")
    there, absent = (
        ask(f"data={up}{tmp_path}/{name}", site).error.reason for name in ("there", "gone")
    )
    assert there.replace("there", "") == absent.replace("gone", "")


@pytest.mark.parametrize(
    "words",
    [
        ["data=digits"],
        ["experiment=paper"],
        ["experiment=paper", "data.files.gqa.metric=vqav2"],
        ["data.source=llava", "data.tasks=[vqa]", "+data.files={vqa:{metric:vqav2}}"],
        ["data.folder='/a b'"],
        ["run.folder='/money $5 {x} @home'", r"name=a-b"],
        ["model.path=org/name", "model.revision=refs/pr/1"],
        ["model={path: tiny-llava}", "++seed=3", "+train.stage1={lora_lr: 1e-3}"],
    ],
)
def test_honest_words_stay_allowed(words):
    load_config(shlex.join(words))


@pytest.mark.parametrize("backslashes", range(7))
@pytest.mark.parametrize("behind", ["", "a", "a "])
def test_an_interpolation_is_what_omegaconf_takes_for_one(backslashes, behind, monkeypatch):
    monkeypatch.setenv("SITE_SECRET", SECRET)
    text = behind + "\\" * backslashes + "${oc.env:SITE_SECRET}"
    evaluated = SECRET in OmegaConf.create({"x": text}).x
    # Written as Hydra reads it back: in its quotes backslashes count before a quote only.
    word = f"run.folder='{text}'"
    if evaluated:
        with pytest.raises(ConfigError, match=r"`run.folder` has .* but must be a plain value"):
            load_config(shlex.join([word]))
    else:
        assert "${oc.env:SITE_SECRET}" in load_config(shlex.join([word])).run.folder


def test_the_shipped_choices_have_no_interpolation():
    for path in config_folder().rglob("*.yaml"):
        loaded = OmegaConf.load(path)
        plain = OmegaConf.to_container(loaded, resolve=False)
        try:
            assert OmegaConf.to_container(loaded, resolve=True) == plain, path
        except OmegaConfBaseException as error:
            pytest.fail(f"{path}: {error}")
        assert "${" not in json.dumps(plain), path


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "/etc", "~x", ".x", "a b", "a\n", "-x"])
def test_a_revision_is_no_path(revision, site):
    reply = ask(shlex.join([ONE.split()[0], f"model.revision='{revision}'"]), site)
    assert "`model.revision` is " in reply.error.reason


@pytest.mark.parametrize(
    "node",
    [
        {"client-id": "vqa-0"},
        {"client-id": "vqa-0", "partition-id": 0, "num-partitions": 1},
        {"partition-id": 0},
    ],
)
def test_only_a_simulated_node_looks_for_the_token(node, tmp_path, monkeypatch):
    asked = []
    holds = site_module.holds_token
    monkeypatch.setattr(site_module, "holds_token", lambda *x: asked.append(x) or holds(*x))
    run = RunFolder(tmp_path / "run")
    folder = tmp_path / "run"
    reply = ask(ONE, node, ("run-1", str(folder), run.token))
    assert "`state-folder` is missing" in reply.error.reason and asked == []
    simulated = {"partition-id": 0, "num-partitions": 1}
    assert not ask(ONE, simulated, ("run-1", str(folder), run.token)).has_error()


def no_path_of(site, tmp_path, reason):
    assert str(tmp_path) not in reason
    assert not [value for value in site.values() if "/" in value and value in reason]


def test_a_torn_private_state_is_told_without_its_folder(site, tmp_path, caplog):
    state = tmp_path / "state of the site" / "run-1"
    state.mkdir(parents=True)
    (state / "private-0001.safetensors").write_bytes(b"torn")
    with caplog.at_level(logging.ERROR, logger="flwr"):
        caplog.handler.setFormatter(logging.Formatter())
        logging.getLogger("flwr").addHandler(caplog.handler)
        reason = ask(ONE, site).error.reason
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert reason.startswith("<state-folder>/run-1/private-0001.safetensors cannot be read")
    no_path_of(site, tmp_path, reason)
    assert str(state) in caplog.text and "Traceback" in caplog.text  # its own log has it all


def test_a_link_to_the_state_is_told_without_where_it_leads(site, tmp_path):
    real = tmp_path / "disk 7" / "run-1"
    real.mkdir(parents=True)
    (real / "private-0001.safetensors").write_bytes(b"torn")
    site["state-folder"] = str(tmp_path / "link")
    (tmp_path / "link").symlink_to(real.parent)
    reason = ask(ONE, site).error.reason
    assert "cannot be read" in reason
    no_path_of(site, tmp_path, reason)


def train(overrides, site):
    """Run one round over a site and return why it failed."""
    folder = Path(site["state-folder"]).parent / "run"
    federation = Federation(folder, f"{overrides} strategy.wait_seconds=0.2", node_configs=[site])
    with pytest.raises(RunError) as caught:
        federation.run()
    return str(caught.value), federation


def test_a_sites_model_folder_is_told_by_its_key(site, tmp_path):
    model = tmp_path / "private models" / "llava"
    model.mkdir(parents=True)
    site["model-path"] = str(model)
    reason, _ = train(ONE, site)
    assert "`model.path` is '<model-path>'" in reason
    no_path_of(site, tmp_path, reason)


def test_a_state_folder_that_cannot_be_written_is_told_by_its_kind(site, tmp_path):
    (tmp_path / "state of the site").write_text("a file")
    reason, federation = train(ONE, site)
    assert "'<state-folder>/test-1'" in reason
    assert "cannot be written: Not a directory." in reason
    no_path_of(site, tmp_path, reason)
    failed = [m for m in federation.grid.messages if m.has_error()]
    assert failed and {m.error.code for m in failed} == {OWN_ERROR}


def test_a_state_folder_of_no_user_is_told(site):
    site["state-folder"] = "~no-such-user/x"
    assert "`state-folder` begins with '~'" in ask(ONE, site).error.reason


def test_an_unexpected_error_quotes_nothing_of_a_site(site, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise KeyError(f"Ann Smith, {tmp_path}/patients.json")

    monkeypatch.setattr(handlers, "declared_examples", fail)
    reply = ask(ONE, site)
    assert reply.error.code == OWN_ERROR
    assert reply.error.reason == "KeyError; see the client's own log."
    # In a simulation server and client are one user's.
    run = RunFolder(tmp_path / "run")
    node = {"partition-id": 0, "num-partitions": 1}
    reason = ask(ONE, node, ("run-1", str(tmp_path / "run"), run.token)).error.reason
    assert reason.startswith("KeyError: ") and "Ann Smith" in reason


def test_a_typed_error_keeps_its_words(site, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise DataError(f"train.json, row 4, cannot be used: {tmp_path}/state of the site/x y.png")

    monkeypatch.setattr(handlers, "declared_examples", fail)
    reason = ask(ONE, site).error.reason
    assert reason == "train.json, row 4, cannot be used: <state-folder>/x y.png"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("in /data/Ann Smith/train.json, row 3", "in <train-file>, row 3"),
        ("in '/data/Ann Smith/.lock'", "in '<folder>/.lock'"),
        ("PosixPath('/state') and /state/run", "PosixPath('<state>') and <state>/run"),
        ("/state2/x is another", "<path> is another"),
        ("(/state2/x), key=/etc/passwd: no", "(<path>), key=<path>: no"),
        ("No such file: '/srv/john doe/x.json'", "No such file: '<path>'"),
        ("'/srv/a b' and \"/srv/c d\", it's /srv/e", "'<path>' and \"<path>\", it's <path>"),
        ("'/srv/a', '/state/x y' and `/srv/it's`", "'<path>', '<state>/x y' and `<path>`"),
        ("file:///srv/x, ~/x and //srv/x", "<path>, <path> and <path>"),
        ("see https://huggingface.co/docs/x, and/or 3 / 4, 1/2", None),
        ("`<image>` in org/name, ../x, data.files/x, conf/data", None),
        (repr("/data/Ü\u200b/x"), "'<odd>/x'"),
        (ascii("/data/Ü\u200b/x"), "'<odd>/x'"),
    ],
)
def test_paths_are_replaced_and_nothing_else(text, told):
    private = {
        "/data/Ann Smith/train.json": "<train-file>",
        "/data/Ann Smith": "<folder>",
        "/state": "<state>",
        "/data/Ü\u200b": "<odd>",
    }
    assert without_paths(text, private) == (text if told is None else told)


def test_a_text_without_private_paths_is_searched_too():
    assert without_paths("a /b/c", {}) == "a <path>"


INTERPOLATIONS = [
    "${oc.env:SITE_SECRET}",
    "a ${oc.env:SITE_SECRET} b",
    "\\${oc.env:SITE_SECRET}",
    "\\\\${oc.env:SITE_SECRET}",
    "${oc.decode:${oc.env:SITE_SECRET}}",
    "${model.path}",
    "${",
    "a ${oc.env:SITE_SECRET",
]
TEXT_SETTINGS = ["model.system_prompt", "model.path", "run.folder", "data.partition.column"]


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_an_interpolation_in_a_recorded_configuration_is_text(text, monkeypatch):
    monkeypatch.setenv("SITE_SECRET", SECRET)
    recorded = yaml.safe_load(to_yaml(load_config()))
    for key in TEXT_SETTINGS:
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, recorded)[last] = text
    config = from_yaml(yaml.safe_dump(recorded))
    assert {attrgetter(key)(config) for key in TEXT_SETTINGS} == {text}
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_an_interpolation_of_another_kind_of_value_is_refused(text, monkeypatch):
    monkeypatch.setenv("SITE_SECRET", "7")
    keys = "seed train.stage1.lora_lr run.report data.tasks model train.personal"
    for key in keys.split():
        value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        with pytest.raises(ConfigError):
            from_yaml(yaml.safe_dump(value))
    with pytest.raises(ConfigError, match="must be|cannot be parsed"):
        from_yaml("seed: 1", [f"model.path='{INTERPOLATIONS[0]}'"])


def test_a_missing_value_in_a_recorded_configuration_is_refused():
    with pytest.raises(ConfigError, match="missing value"):
        from_yaml("model: {system_prompt: '???'}")


def test_a_received_run_folder_reads_no_environment(tmp_path, monkeypatch):
    """`config.yaml` is kept as text, `overrides.txt` refused, by every reader of a run folder."""
    monkeypatch.setenv("SITE_SECRET", SECRET)
    text = yaml.safe_load(to_yaml(load_config(ONE)))
    text["model"]["system_prompt"] = INTERPOLATIONS[0]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
    (tmp_path / "metrics.jsonl").write_text("")
    config = read_run(tmp_path).config
    assert config.model.system_prompt == INTERPOLATIONS[0]
    with pytest.raises(ConfigError, match="oc.env:SITE_SECRET"):
        check_resumable(tmp_path, load_config(ONE))
    (tmp_path / "overrides.txt").write_text(f"model.system_prompt={INTERPOLATIONS[0]}")
    with pytest.raises(ConfigError, match="must be a plain value") as caught:
        prepare([f"resume={tmp_path}"], {}, datetime.now())
    assert SECRET not in str(caught.value)


def test_a_received_sweep_folder_reads_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SITE_SECRET", SECRET)
    for override in (
        f"name={INTERPOLATIONS[0]}",
        f"model.path='{INTERPOLATIONS[0]}','b'",
        f"hydra.launcher.x={INTERPOLATIONS[0]}",
    ):
        with pytest.raises(ConfigError, match="oc.env:SITE_SECRET") as caught:
            sweep([override], tmp_path, out=print)
        assert SECRET not in str(caught.value)


def test_a_received_federation_file_reads_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SITE_SECRET", SECRET)
    files = {"a": {"train": [INTERPOLATIONS[0]], "prompt_suffix": INTERPOLATIONS[1]}}
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump({"tasks": ["a"], "files": files, "folder": "${oc.env:HOME}"}))
    data = load_config(shlex.join(expand([f"data={path}"]))).data
    assert data.files["a"].train == [INTERPOLATIONS[0]]
    assert data.files["a"].prompt_suffix == INTERPOLATIONS[1]
    assert data.folder == f"{tmp_path}/${{oc.env:HOME}}"
