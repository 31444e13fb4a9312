"""The server's checkpoints: whole or refused, and never none."""

import json
import os
import shutil

import pytest
import torch

from pilot_flwr.errors import StateError
from pilot_flwr.run.atomic import load_tensors
from pilot_flwr.run.checkpoint import (
    checkpoint_folders,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from pilot_flwr.run.provenance import RunIdentity

RUN = RunIdentity("run-1", "0123")


def test_checkpoints_are_whole_and_the_last_two_are_kept(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(
            tmp_path,
            server_round=number,
            adapters={"vqa": {"w": torch.full((2,), float(number))}},
            loras={"vqa-0": {"a": torch.zeros(1)}},
            tasks=("vqa",),
            task_of={"vqa-0": "vqa"},
            run=RUN,
            events=7,
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0002", "round-0003"]
    tensors, metadata = load_tensors(tmp_path / "round-0003/task_adapters/vqa.safetensors")
    assert tensors["w"].tolist() == [3.0, 3.0]
    assert metadata["task"] == "vqa"
    state = json.loads((tmp_path / "round-0003/state.json").read_text())
    assert (state["round"], state["tasks"]) == (3, ["vqa"])


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of two checkpoints, and the last one of them."""
    for number in (1, 2):
        last = save_checkpoint(
            tmp_path,
            server_round=number,
            adapters={"a": {"w": torch.full((2,), float(number))}, "b": {"w": torch.zeros(2)}},
            loras={"a-0": {"l": torch.full((3,), float(number))}},
            tasks=("a", "b"),
            task_of={"a-0": "a"},
            run=RUN,
            events=7,
        )
    return last


def test_a_checkpoint_is_read_back(checkpoint):
    loaded = load_checkpoint(checkpoint)
    assert (loaded.server_round, loaded.tasks, loaded.task_of) == (2, ("a", "b"), {"a-0": "a"})
    assert (loaded.run, loaded.events) == (RUN, 7)
    assert loaded.adapter("a")["w"].tolist() == [2, 2]
    assert loaded.lora("a-0")["l"].tolist() == [2, 2, 2]
    assert latest_checkpoint(checkpoint.parent) == (loaded, [])


def _cut(folder):
    file = folder / "lora" / "a-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _swap(folder):
    shutil.copy(folder / "task_adapters/a.safetensors", folder / "task_adapters/b.safetensors")


def _flip(folder):
    """Change one bit of a tensor: only the checksum can tell."""
    file = folder / "lora" / "a-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _edit(old, new):
    def edit(folder):
        text = (folder / "state.json").read_text()
        assert old in text
        (folder / "state.json").write_text(text.replace(old, new))

    return edit


def _rewrite(**changes):
    """Change the content and give it the checksum of what it says then."""

    def rewrite(folder):
        from pilot_flwr.run.checkpoint import _checksum

        content = json.loads((folder / "state.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        content["checksum"] = _checksum(content)
        (folder / "state.json").write_text(json.dumps(content))

    return rewrite


def _listed(old, new):
    """List a file under another name, or one more."""

    def rewrite(folder):
        files = json.loads((folder / "state.json").read_text())["files"]
        files[new] = files.pop(old) if old else "0"
        _rewrite(files=files)(folder)

    return rewrite


@pytest.mark.parametrize(
    "damage, words",
    [
        (_cut, "cannot be read"),
        (_flip, "has been changed: its SHA-256"),
        (_swap, "belongs to task 'a', not to 'b'"),
        (lambda f: (f / "state.json").unlink(), "FileNotFoundError"),
        (lambda f: (f / "state.json").write_text("[]"), "TypeError"),
        (lambda f: (f / "state.json").write_text('{"format": "pilot'), "JSONDecodeError"),
        (lambda f: (f / "lora" / "a-0.safetensors").unlink(), r"unexpected are \['lora/a-0.safet"),
        (
            lambda f: (f / "lora" / "x.safetensors").write_bytes(b""),
            r"unexpected are \['lora/x.safet",
        ),
        (
            lambda f: (f / "lora" / "a-0").write_bytes(b""),
            r"has files .* unexpected are \['lora/a-0'\]",
        ),
        (
            lambda f: (f / "notes.txt").write_bytes(b""),
            r"has files .* unexpected are \['notes.txt'\]",
        ),
        (_edit("pilot-flwr-2", "pilot-flwr-1"), "format 'pilot-flwr-1'"),
        (_edit('"events": 7', '"events": 8'), "has been changed: its checksum"),
        (_edit('"run-1"', '"run-2"'), "has been changed: its checksum"),
        (_rewrite(task_of={"a-0": "c"}), r"tasks \['c'\]"),
        (_rewrite(tasks=None), "KeyError: 'tasks'"),
        (
            _rewrite(files={}),
            r"listed files .* unexpected are \['lora/a-0.safetensors', 'task_ad",
        ),
        (_listed("task_adapters/a.safetensors", "task_adapters//a.safetensors"), "_adapters//a"),
        (_listed("task_adapters/a.safetensors", "task_adapters/a"), "'task_adapters/a', "),
        (_listed("lora/a-0.safetensors", "lora/x/../a-0.safetensors"), r"x/\.\./a-0"),
        (_listed(None, "../../x"), r"listed files .* unexpected are \['\.\./\.\./x'\]"),
        (_rewrite(round="two"), "`round` is 'two' but must be a whole number"),
        (_rewrite(round=1), "is of exchange 1, which does not match its folder"),
        (_rewrite(round=-2), "`round` is -2 but must be a whole number of at least 0"),
        (_rewrite(events=-1), "`events` is -1 but must be a whole number of at least 0"),
        (_rewrite(events=True), "`events` is True but must be a whole number"),
        (_rewrite(events="7"), "`events` is '7' but must be a whole number"),
        (_rewrite(events=6.5), "`events` is 6.5 but must be a whole number"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_passed_over(checkpoint, damage, words):
    damage(checkpoint)
    with pytest.raises(StateError, match=words):
        load_checkpoint(checkpoint)
    found, passed_over = latest_checkpoint(checkpoint.parent)
    assert found.server_round == 1
    assert len(passed_over) == 1


def test_without_a_whole_checkpoint_there_is_none(checkpoint):
    for folder in checkpoint_folders(checkpoint.parent):
        (folder / "state.json").unlink()
    found, passed_over = latest_checkpoint(checkpoint.parent)
    assert found is None
    assert ["round-0002" in passed_over[0], "round-0001" in passed_over[1]] == [True, True]
    assert latest_checkpoint(checkpoint / "nothing") == (None, [])


def test_a_checkpoint_that_does_not_fit_is_passed_over_with_the_reason(checkpoint):
    found, passed_over = latest_checkpoint(
        checkpoint.parent, fits=lambda c: "is too late." if c.server_round == 2 else ""
    )
    assert found.server_round == 1
    assert passed_over == [f"{checkpoint} is too late."]


@pytest.mark.parametrize("number", [2, 3])
def test_whatever_dies_in_a_save_a_whole_checkpoint_is_there(tmp_path, monkeypatch, number):
    """Raise at every call that changes a name on the disk: of a new exchange, and of one again."""

    def save(folder, server_round, value):
        save_checkpoint(
            folder,
            server_round=server_round,
            adapters={"a": {"w": torch.full((2,), float(value))}},
            loras={"a-0": {"l": torch.zeros(1)}},
            tasks=("a",),
            task_of={"a-0": "a"},
            run=RUN,
            events=1,
        )

    for count in range(200):
        folder = tmp_path / str(count)
        save(folder, 2, 2)
        calls = iter(range(count))
        with monkeypatch.context() as patch:
            for owner, name in [(os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir")]:
                patch.setattr(owner, name, _until(calls, getattr(owner, name)))
            try:
                save(folder, number, 33)
                done = True
            except KeyboardInterrupt:
                done = False
        found, _ = latest_checkpoint(folder)
        assert (found.server_round, found.adapter("a")["w"].tolist()) in [
            (2, [2, 2]),
            (number, [33, 33]),
        ]
        if done:
            break
        save(folder, number, 44)  # and what was left does not stand in the way
        assert latest_checkpoint(folder)[0].adapter("a")["w"].tolist() == [44, 44]
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert count > 10
    assert found.adapter("a")["w"].tolist() == [33, 33]


def _until(calls, function):
    def call(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call
