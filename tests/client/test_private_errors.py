"""What a site's replies disclose of its rows: in a private run, and of ids in any run."""

import ast
import json
import logging
import shlex
from pathlib import Path

import pytest
import torch
from flwr.app import Message, MessageType
from inprocess import InProcessGrid
from llava_files import write_federation
from quick_training import quick_training

from pilot_flwr import client_app
from pilot_flwr.client import session as session_module
from pilot_flwr.client.client_data import ClientData
from pilot_flwr.client.privacy_accountant import MOST_COUNTED_NOISE, PrivacyAccount, epsilon
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.errors import DataError
from pilot_flwr.flower.codec import decode_state, encode_state
from pilot_flwr.flower.messages import (
    OWN_ERROR,
    PRIVATE_ERROR,
    encode_instruction,
    encode_query,
)
from pilot_flwr.model.loading import initial_state
from pilot_flwr.protocol import Instruction, RunInfo
from pilot_flwr.site import handlers

PACKAGE = Path(session_module.__file__).parents[1]
DEMANDS = {"max-epsilon": 1.0, "min-noise-multiplier": 10.0}
PRIVATE = "privacy.enabled=true privacy.noise_multiplier=16"
RUN = RunInfo("run-1", "/nowhere", "guessed")
SECRET = "Ann-Smith-1970"


class Site:
    """A real site with data of its own, and whatever a server may send to it."""

    def __init__(self, folder, demands=DEMANDS, **settings):
        (folder / "data").mkdir()
        self.federation = write_federation(
            folder / "data", tasks=["vqa"], train=12, clients=1, **settings
        )
        self.train = folder / "data/vqa/train.json"
        rows = json.loads(self.train.read_text())
        for row in rows:
            row["id"] = f"{SECRET}-{row['id']}"
        self.train.write_text(json.dumps(rows))
        self.state = folder / "state"
        self.node = {
            "client-id": "vqa-0",
            "state-folder": str(self.state),
            "train-file": str(self.train),
            "test-file": str(folder / "data/vqa/test.json"),
            "image-folder": str(folder / "data/vqa/images"),
            **demands,
        }

    def overrides(self, words):
        return shlex.join(expand([f"data={self.federation}", "train.batch_size=2", *words.split()]))

    def send(self, kind, words, *, evaluate=True, run_id=1, server_round=1, stage=1):
        overrides = self.overrides(words)
        grid = InProcessGrid(
            client_app.app, num_nodes=1, overrides=overrides, node_configs=[self.node]
        )
        grid.run_id = run_id
        if kind == MessageType.QUERY:
            content = encode_query(RUN, server_round)
        else:
            initial = initial_state(load_config(overrides).model, seed=0)
            order = Instruction(
                server_round, stage, ("vqa",), {"vqa": initial.adapter}, initial.lora,
                train=kind == MessageType.TRAIN, evaluate=evaluate,
            )  # fmt: skip
            adapters = {task: encode_state(state) for task, state in order.adapters.items()}
            content = encode_instruction(order, RUN, "vqa-0", adapters=adapters)
        (reply,) = grid.send_and_receive([Message(content, 1, kind, group_id="1")])
        return reply

    @property
    def account(self):
        return PrivacyAccount(self.state / "vqa-0.privacy.json", "vqa-0")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def is_constant(reply):
    error = reply.error if reply.has_error() else None
    return error is not None and (error.code, error.reason) == (OWN_ERROR, PRIVATE_ERROR)


def test_asking_for_rows_one_by_one_discloses_and_costs(site):
    """The issue's attack: each order names one row, and fails with its length in tokens."""
    for seed in range(12):
        words = f"{PRIVATE} data.train_examples=1 train.max_length=1 seed={seed}"
        assert is_constant(site.send(MessageType.TRAIN, words))
    allowed = max(k for k in range(20) if epsilon([16.0] * k, 1e-5) <= 1)
    assert len(site.account.releases()) == allowed < 12
    assert not is_constant(site.send(MessageType.TRAIN, "train.max_length=1"))  # no private run
    assert len(site.account.releases()) == allowed


def test_noise_beyond_measure_does_not_make_orders_free(site):
    """At z = 1e6 a release costs nothing, but whether the session fails is not noised."""
    site.send(MessageType.TRAIN, f"{PRIVATE} privacy.noise_multiplier=1e6 train.max_length=1")
    spent = site.account.epsilon_after(load_config("privacy.noise_multiplier=1e6").privacy, 1e-5)
    assert spent == epsilon([MOST_COUNTED_NOISE] * 2, 1e-5) > 0.3


FAILURES = {
    "unreadable rows": (lambda s: s.train.write_text("[{"), ""),
    "no file": (lambda s: s.train.unlink(), ""),
    "no such image": (lambda s: s.node.update({"image-folder": str(s.train.parent)}), ""),
    "image folder gone": (lambda s: s.node.update({"image-folder": "/nowhere"}), ""),
    "long rows": (lambda s: None, "train.max_length=40"),
    "another model": (lambda s: s.node.update({"model-path": str(s.state)}), ""),
    "no such device": (lambda s: s.node.update({"device": "cuda:77"}), ""),
    "odd node config": (lambda s: s.node.update({"micro-batch": "many"}), ""),
    "budget": (lambda s: s.node.update({"max-epsilon": 0.01}), ""),
    "too little noise": (lambda s: None, "privacy.noise_multiplier=9"),
    "metrics": (lambda s: None, "privacy.send_metrics=true"),
    "another task": (lambda s: s.node.update({"task": "counting"}), ""),
    "not finite": (lambda s: None, "train.lr_scale=1e30"),
}


@pytest.mark.parametrize("kind", ["query", "train"])
@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_of_a_private_run_is_answered_alike(site, name, kind, caplog):
    break_it, words = FAILURES[name]
    break_it(site)
    with caplog.at_level(logging.ERROR, logger="flwr"):
        logging.getLogger("flwr").addHandler(caplog.handler)
        reply = site.send(kind, f"{PRIVATE} {words}")
        logging.getLogger("flwr").removeHandler(caplog.handler)
    if name in ("long rows", "not finite", "no such image") and kind == "query":
        assert not reply.has_error()  # found in training only
        return
    assert is_constant(reply)
    assert caplog.records and PRIVATE_ERROR not in caplog.text  # the site's log has the reason


@pytest.mark.parametrize("error", [KeyError(SECRET), DataError(SECRET), OSError(28, SECRET)])
@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_any_exception_at_any_place_is_answered_alike(site, kind, error, monkeypatch):
    def fail(*_, **__):
        raise error

    place = {"query": (handlers, "declared_examples"), "evaluate": (session_module, "Session")}
    monkeypatch.setattr(*place.get(kind, (ClientData, "examples")), fail)
    assert is_constant(site.send(kind, PRIVATE))
    assert len(site.account.releases()) == (kind == "train")


@pytest.mark.parametrize("method", ["_personalize", "_fit", "_upload"])
def test_a_session_that_fails_late_has_been_charged(site, method, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(SECRET)

    monkeypatch.setattr(session_module.Session, method, fail)
    assert is_constant(site.send(MessageType.TRAIN, PRIVATE))
    assert len(site.account.releases()) == 1


def test_nothing_is_read_before_the_charge(site, monkeypatch):
    seen = []
    read = ClientData.examples

    def examples(self, split):
        seen.append(len(site.account.releases()))
        return read(self, split)

    monkeypatch.setattr(ClientData, "examples", examples)
    with quick_training():
        assert not site.send(MessageType.TRAIN, PRIVATE).has_error()
    assert seen and set(seen) == {1}


def told(reply):
    """Everything in a reply but the values of its tensors."""
    arrays = {
        name: [(key, t.dtype, tuple(t.shape)) for key, t in decode_state(record).items()]
        for name, record in reply.content.array_records.items()
    }
    rest = {k: dict(v) for k, v in reply.content.items() if k not in arrays}
    return arrays, rest


def test_a_private_reply_depends_on_the_rows_by_its_noised_tensors_alone(tmp_path):
    """Broken rows are left out here, images are missing, and a session takes longer."""
    replies = []
    for number, damage in enumerate(("none", "broken", "text only")):
        (tmp_path / str(number)).mkdir()
        site = Site(tmp_path / str(number), allowed_broken=0.9)
        rows = json.loads(site.train.read_text())
        for row in rows[1:8]:
            if damage == "broken":
                row["conversations"][0]["from"] = "nobody"
        if damage == "text only":
            for row in rows:
                row.pop("image", None)
                row["conversations"][0]["value"] = "Which?"
        site.train.write_text(json.dumps(rows))
        replies.append(site.send(MessageType.TRAIN, f"{PRIVATE} train.epochs=1"))
    assert not any(reply.has_error() for reply in replies)
    first = told(replies[0])
    assert [told(reply) == first for reply in replies] == [True] * 3
    assert first[1]["training"]["examples"] == 12
    tensors = [
        torch.cat([t.flatten().double() for t in decode_state(r.content["lora"]).values()])
        for r in replies
    ]
    assert not torch.equal(tensors[0], tensors[1])


def test_an_evaluation_of_a_private_run_reads_nothing(site, monkeypatch):
    monkeypatch.setattr(ClientData, "examples", lambda *_: pytest.fail("data were read"))
    reply = site.send(MessageType.EVALUATE, PRIVATE)
    assert "evaluation" not in reply.content and dict(reply.content["session"]) == {
        "started": 0.0, "seconds": 0.0
    }  # fmt: skip
    assert not site.account.path.exists()


# Row ids, in a run without privacy.

LONG = "word " * 3000
DAMAGE = {
    "too long": lambda row: row["conversations"][0].update(value=LONG),
    "too long to answer": lambda row: row["conversations"][1].update(value=LONG),
    "role": lambda row: row["conversations"][0].update({"from": "gpt"}),
    "order": lambda row: row["conversations"].reverse(),
    "empty turn": lambda row: row["conversations"][1].update(value=" "),
    "marker in an answer": lambda row: row["conversations"][1].update(value="<image> a"),
    "no answer": lambda row: row["conversations"].pop(),
    "markers": lambda row: row["conversations"][0].update(value="<image> <image> what?"),
    "no conversation": lambda row: row.pop("conversations"),
    "no such image": lambda row: row.update(image=f"{SECRET}.png"),
    "image elsewhere": lambda row: row.update(image=f"../{SECRET}.png"),
    "image of another type": lambda row: row.update(image=7),
    "references": lambda row: row.update(references=7),
    "unprintable id": lambda row: row.update(id=f"{SECRET}\n"),
    "long id": lambda row: row.update(id=SECRET * 100),
    "control token": lambda row: row["conversations"][0].update(value="a </s> b <pad> <image>"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", DAMAGE)
def test_no_error_of_a_row_has_its_id(tmp_path, name, split):
    site = Site(tmp_path, demands={})
    path = site.train if split == "train" else site.train.with_name("test.json")
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))
    for number, row in enumerate(rows):
        row["id"] = f"{SECRET}-{number}"
    DAMAGE[name](rows[2])
    path.write_text(json.dumps(rows))
    reply = site.send(
        MessageType.TRAIN if split == "train" else MessageType.EVALUATE,
        "train.epochs=1 evaluation.max_new_tokens=2",
    )
    if reply.has_error():
        assert SECRET not in reply.error.reason
        assert f"{path.name}, row 3" in reply.error.reason
    else:  # allowed, or read in training alone
        assert name == "control token" or (name, split) in {("too long to answer", "test")}


def test_no_text_of_the_package_formats_a_rows_id():
    """Every f-string of the rooms whose errors a site sends, by their syntax."""
    found = []
    for room in ("data", "client", "model", "metrics", "flower"):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            if "converters" in path.parts:  # a command that the owner of the data runs
                continue
            for raised in ast.walk(ast.parse(path.read_text())):
                if not isinstance(raised, ast.Raise):
                    continue
                for node in ast.walk(raised):
                    if not isinstance(node, ast.FormattedValue):
                        continue
                    text = ast.unparse(node.value)
                    if text.endswith(".id") and "client" not in text or "['id']" in text:
                        found.append(f"{path.relative_to(PACKAGE)}:{raised.lineno}: {text}")
    assert found == []
