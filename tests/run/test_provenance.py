"""Which code a run was made by."""

import subprocess

from pilot_flwr.run import provenance as module
from pilot_flwr.run.provenance import keep_provenance, provenance, read_provenance


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_whether_the_code_differs_from_it(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("a: 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    found = provenance(tmp_path)
    assert (found["commit"], found["changed"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "notes.txt").write_text("no code\n")
    assert provenance(tmp_path)["changed"] is False
    (tmp_path / "conf" / "new.yaml").write_text("b: 1\n")
    assert provenance(tmp_path)["changed"] is True


def test_outside_a_checkout_the_commit_is_unknown(tmp_path):
    found = provenance(tmp_path)
    assert found["commit"] is None and found["changed"] is None
    assert found["versions"]["torch"] and found["versions"]["python"]


def now_is(monkeypatch, commit, torch="1"):
    now = {"commit": commit, "changed": False, "versions": {"torch": torch}}
    monkeypatch.setattr(module, "_of_this_process", lambda: dict(now))
    return now


def test_a_run_folder_keeps_what_it_was_begun_with_and_what_it_went_on_with(tmp_path, monkeypatch):
    assert read_provenance(tmp_path) == {}
    first = now_is(monkeypatch, "abc")
    for _ in range(2):
        keep_provenance(tmp_path)
        assert read_provenance(tmp_path) == first
    now_is(monkeypatch, None)  # the app's copy, which has no history
    keep_provenance(tmp_path)
    assert read_provenance(tmp_path) == first
    second = now_is(monkeypatch, "def")
    keep_provenance(tmp_path)
    keep_provenance(tmp_path)
    third = now_is(monkeypatch, "def", torch="2")
    keep_provenance(tmp_path)
    assert read_provenance(tmp_path) == first | {"resumed_with": [second, third]}
    (tmp_path / "code.json").write_text("[")
    assert read_provenance(tmp_path) == {}
