"""``pilot-flwr site check`` refuses everything that a roster query refuses; ``site status``."""

import json
import os
import shlex
import shutil
import time

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from flwr.app import Message, MessageType
from llava_files import write_federation

from pilot_flwr.cli.main import main
from pilot_flwr.client import preflight
from pilot_flwr.client.privacy_accountant import PrivacyAccount, epsilon
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.client_app import app
from pilot_flwr.config.overrides import expand
from pilot_flwr.config.schema import PrivacyConfig
from pilot_flwr.flower.client_key import client_key, fingerprint, public_key
from pilot_flwr.flower.grid import InProcessGrid
from pilot_flwr.flower.messages import encode_query
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.protocol import RunInfo
from pilot_flwr.site import check as site_check
from pilot_flwr.site import service

PRIVATE = "privacy.enabled=true privacy.noise_multiplier=4 privacy.clip_norm=1".split()


class Owner:
    """A site with its node config, and a run in which it can take part."""

    def __init__(self, folder):
        federation = write_federation(folder, tasks=("vqa", "counting"), train=6, test=4)
        data = folder / "vqa"
        self.state = folder / "state"
        self.base = folder / "base"
        ignored = shutil.ignore_patterns("bundle.json")  # of the shipped base alone
        shutil.copytree(checkpoint_path("tiny-llava"), self.base, ignore=ignored)
        self.node = {
            "client-id": "north",
            "task": "vqa",
            "train-file": str(data / "train.json"),
            "test-file": str(data / "test.json"),
            "image-folder": str(data / "images"),
            "state-folder": str(self.state),
            "model-path": str(self.base),
            "device": "cpu",
        }
        self.run = [f"data={federation}", "strategy.clients=2"]

    def check(self, capsys, *, run=True):
        """Return the exit code and the rows by name."""
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in self.node.items())
        words = ["site", "check", "--json", "--node-config", config]
        code = main([*words, *(self.run if run else ())])
        return code, {row["check"]: row for row in json.loads(capsys.readouterr().out)}

    def query(self):
        """Return the error of a roster query, as the server sees it; None if there is none."""
        overrides = shlex.join(expand(self.run))
        grid = InProcessGrid(app, node_configs=[self.node], overrides=overrides)
        query = encode_query(RunInfo("run-1", "", ""), 1)
        reply = grid.answer(Message(query, 1, MessageType.QUERY))
        return reply.error.reason if reply.has_error() else None


@pytest.fixture
def owner(tmp_path):
    return Owner(tmp_path)


def refused(rows):
    return {name for name, row in rows.items() if row["result"] == "refused"}


def test_a_site_that_the_roster_admits_passes(owner, capsys):
    code, rows = owner.check(capsys)
    assert code == 0 and refused(rows) == set()
    assert {"node config", "packages", "processor", "overlap", "disk space"} <= set(rows)
    assert rows["examples"]["text"] == "6"
    assert "base model's weights (sample): " in rows["base model"]["text"]
    assert {path.name for path in owner.state.iterdir()} == {"overlap"}  # nothing else stays
    assert owner.query() is None
    key = client_key(owner.state / "north.key", create=False)
    assert owner.check(capsys)[1]["identity key"]["text"] == fingerprint(public_key(key))


def edit(key, value):
    def change(owner):
        owner.node[key] = value

    return change


def leak(owner):
    shutil.copy(owner.node["train-file"], owner.node["test-file"])


def open_key(owner):
    owner.node["identity-key"] = str(owner.state.parent / "key")
    client_key(owner.state.parent / "key", create=True)
    (owner.state.parent / "key").chmod(0o644)


def encrypted_key(owner):
    owner.node["identity-key"] = str(owner.state.parent / "key")
    locked = generate_private_key(SECP384R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    (owner.state.parent / "key").write_bytes(locked)
    (owner.state.parent / "key").chmod(0o600)


def no_template(owner):
    (owner.base / "chat_template.jinja").unlink()


def torn_weights(owner):
    (file,) = owner.base.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)


def no_budget(owner):
    owner.run += PRIVATE
    owner.node["max-epsilon"] = 0.001


FAULTS = {
    "a key of the node config": (edit("trainfile", "/x"), {"node config"}),
    "a relative path": (edit("image-folder", "images"), {"node config"}),
    "another task": (edit("task", "captioning"), {"run"}),
    "no file": (edit("train-file", "/no/such.json"), {"data files", "examples", "overlap"}),
    "the state folder": (edit("state-folder", "/proc/no"), {"state folder", "disk space"}),
    "the device": (edit("device", "cuda:7"), {"device"}),
    "the micro-batch": (edit("micro-batch", 5), {"run"}),
    "an open key": (open_key, {"identity key"}),
    "an encrypted key": (encrypted_key, {"identity key"}),
    "a test row that is trained": (leak, {"overlap"}),
    "the base": (torn_weights, {"base model", "processor"}),
    "the template": (no_template, {"base model", "processor"}),
    "demands": (edit("min-noise-multiplier", 1.0), {"run"}),
    "the budget": (no_budget, {"privacy"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_roster_query_refuses_is_refused_with_a_remedy(owner, capsys, fault):
    break_it, where = FAULTS[fault]
    break_it(owner)
    code, rows = owner.check(capsys)
    assert code == 1 and where & refused(rows), rows
    assert refused(rows) <= where | {"examples", "overlap", "disk space"}
    assert all(rows[name]["remedy"] for name in refused(rows))
    assert owner.query() is not None


def test_a_damaged_private_state_is_refused(owner, capsys):
    state = PrivateState(1, (), {"client_adapter": {"w": torch.zeros(3)}})
    store = PrivateStore(owner.state / "run-1", "north", "vqa")
    store.save(state, server_round=1)
    assert owner.check(capsys)[1]["private states"]["text"] == "1 run"
    with store.path(1).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    code, rows = owner.check(capsys)
    assert code == 1 and refused(rows) == {"private states"} and rows["private states"]["remedy"]


def test_all_wrong_entries_are_named_at_once(owner, capsys):
    owner.node |= {"trainfile": "/x", "micro-batch": "many", "image-folder": "here"}
    owner.node["identity-key"] = "/no/key"
    owner.node["model-path"] = "/no/base"
    code, rows = owner.check(capsys, run=False)
    text = rows["node config"]["text"]
    assert code == 1
    assert all(f"`{key}`" in text for key in ("trainfile", "micro-batch", "image-folder"))
    assert {"node config", "identity key", "base model"} == refused(rows)


def test_a_full_disk_is_refused(owner, capsys, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    assert refused(owner.check(capsys)[1]) == {"disk space"}
    assert "1000 bytes" in owner.query()


def test_another_version_of_a_package_is_refused(owner, capsys, monkeypatch):
    wanted = ["flwr[simulation]==0.1", "no-such-thing>=1", "numpy>=1", 'wandb; extra == "wandb"']
    monkeypatch.setattr(site_check, "requires", lambda _: wanted)
    code, rows = owner.check(capsys, run=False)
    assert code == 1 and refused(rows) == {"packages"}
    text = rows["packages"]["text"]
    assert "must be ==0.1" in text and "no-such-thing is not installed" in text
    assert "numpy" not in text and "wandb" not in text


def test_without_a_run_it_says_what_is_not_checked(owner, capsys):
    code, rows = owner.check(capsys, run=False)
    assert code == 0 and rows["run"]["result"] == "note"
    assert {"overlap", "disk space"}.isdisjoint(rows)


def test_a_service_with_another_node_config_is_refused(owner, capsys, monkeypatch):
    owner.state.mkdir()
    listener = service.listen(owner.state)
    monkeypatch.setattr("pilot_flwr.site.door.PATIENCE_SECONDS", 0.1)
    with listener:  # it accepts no connection
        assert refused(owner.check(capsys, run=False)[1]) == {"service"}


def test_the_table_has_a_row_per_check_and_wrong_overrides_are_usage(owner, capsys):
    config = f'client-id="north" state-folder="{owner.state}" trainfile="x"'
    assert main(["site", "check", "--node-config", config]) == 1
    out = capsys.readouterr().out
    assert "node config" in out and "refused" in out and "→" in out
    assert main(["site", "check", "--node-config", config, "no.such=1"]) == 2


def status(owner, capsys):
    config = f'client-id="north" task="vqa" state-folder="{owner.state}" max-epsilon=9'
    code = main(["site", "status", "--json", "--node-config", config])
    found = json.loads(capsys.readouterr().out)
    assert code == (found["service"] is None)
    return found


def test_the_status_of_a_site(owner, capsys):
    state = PrivateState(2, ("vqa",), {"client_adapter": {"w": torch.zeros(3)}})
    for run, rounds in (("run-1", (1, 2)), ("run-2", (4,))):
        store = PrivateStore(owner.state / run, "north", "vqa", flower_run=run)
        for number in rounds:
            store.save(state, server_round=number)
    (owner.state / "features").mkdir()
    (owner.state / "features" / "f").write_bytes(b"x" * 1234)
    account = PrivacyAccount(owner.state / "north.privacy.json", "north")
    for number in (1, 2):
        account.spend(
            PrivacyConfig(enabled=True, noise_multiplier=8.0), run="run-1", server_round=number
        )
    found = status(owner, capsys)
    assert [(r["run"], r["exchange"], r["stage"]) for r in found["runs"]] == [
        ("run-1", 2, "2"),
        ("run-2", 4, "2"),
    ]
    files = (owner.state / "run-1").glob("private-*")
    assert found["runs"][0]["bytes"] == sum(file.stat().st_size for file in files)
    assert abs(found["runs"][1]["written"] - time.time()) < 60
    assert found["shared"]["features"] == 1234 and found["free"] > 0
    assert found["privacy"]["releases"] == 2 and found["privacy"]["max_epsilon"] == 9
    assert found["privacy"]["epsilon"] == pytest.approx(epsilon([8.0, 8.0], 1e-5))
    assert found["service"] is None


def test_the_status_names_the_service_and_damaged_files(owner, capsys, monkeypatch):
    (owner.state / "run-1").mkdir(parents=True)
    (owner.state / "run-1" / "private-0003.safetensors").write_bytes(b"torn")
    (owner.state / "north.privacy.json").write_text("{")
    running = service.Status(4711, time.time(), True, "train, exchange 3", 5)
    monkeypatch.setattr(service, "status", lambda folder: running)
    found = status(owner, capsys)
    assert found["runs"][0]["stage"] == "unreadable" and found["runs"][0]["exchange"] == 3
    assert "is not a privacy account" in found["privacy"]["problem"]
    assert found["service"]["pid"] == 4711
    config = f'client-id="north" state-folder="{owner.state}"'
    assert main(["site", "status", "--node-config", config]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "process 4711" in out and "5 messages" in out and "busy: train, exchange 3" in out


def test_a_site_without_a_state_folder_has_no_status(tmp_path, capsys):
    for config in ('client-id="a"', f'client-id="a" state-folder="{tmp_path}/no"'):
        assert main(["site", "status", "--node-config", config]) == 2
        assert "`state-folder`" in capsys.readouterr().err
