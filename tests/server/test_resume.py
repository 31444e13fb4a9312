"""A run that died anywhere goes on and ends, bit by bit, as one that did not."""

import contextlib
import importlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import MessageType
from inprocess import SMALL, InProcessGrid
from quick_training import quick_training

from pilot_flwr import server_app
from pilot_flwr.client import rank, training
from pilot_flwr.client_app import app
from pilot_flwr.config.loading import load_config
from pilot_flwr.errors import ConfigError, RunError, StateError, WorkerDied
from pilot_flwr.run import checkpoint as checkpoint_module
from pilot_flwr.run.atomic import hold, load_tensors
from pilot_flwr.run.checkpoint import load_checkpoint, save_checkpoint
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import ExchangeClosed, Resumed, select
from pilot_flwr.server import resume as resume_module

ROBUSTNESS = Path(__file__).resolve().parents[1] / "robustness"
TWO = f"{SMALL} data.tasks=[vqa,counting] data.clients_per_task=1 strategy.rounds=2"
SHOWN = 4
"""Of about ninety points in a run, those that the default suite looks at; all with ``slow``."""


@pytest.fixture
def differences(monkeypatch):
    """How the fault tests compare two run folders."""
    monkeypatch.syspath_prepend(str(ROBUSTNESS))
    return importlib.import_module("faults.sameness").differences


def go(overrides, *, flower_run="1", on_reply=None):
    """Run, or go on, as the ServerApp does; return the grid."""
    config = load_config(overrides)
    grid = InProcessGrid(app, num_nodes=config.num_clients, overrides=overrides)
    if on_reply:
        grid.on_reply = on_reply
    server_app.run(grid, config, overrides, flower_run=flower_run)
    return grid


def fresh(folder, overrides=TWO, **more):
    return go(f"{overrides} run.folder={folder}", **more)


def go_on(folder, overrides=TWO, **more):
    return go(f"{overrides} resume={folder}", flower_run="2", **more)


class Snapshots:
    """The run folder as a kill would leave it: before every call that changes a name in it."""

    def __init__(self, folder, target, monkeypatch):
        self.folder, self.target, self.taken = folder, target, []
        self._last = None
        for owner, name in [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "unlink")]:
            monkeypatch.setattr(owner, name, self._before(getattr(owner, name)))

    def _before(self, function):
        def call(*args, **kwargs):
            self.take()
            return function(*args, **kwargs)

        return call

    def take(self, *_):
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        names = {
            str(path.relative_to(self.folder)): path.stat().st_size
            for path in files
            if path.name != ".server.lock"
        }
        if names == self._last or "config.yaml" not in names:
            return
        self._last, target = names, self.target / f"{len(self.taken):03d}"
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target / name)
        self.taken.append(target)


@pytest.fixture(autouse=True, scope="module")
def quickly():
    """Random steps in place of training: they too depend on state, seed and exchange alone."""
    with quick_training():
        yield


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A whole run, and what a kill would have left of it at every point."""
    folder = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        snapshots = Snapshots(folder / "run", folder / "at", patch)
        fresh(folder / "run", on_reply=lambda message, reply: snapshots.take() or reply)
    return folder / "run", snapshots.taken


@pytest.fixture
def copy(interrupted, tmp_path):
    """A copy of what was left at a point that `where` chooses by the files' names."""
    _, taken = interrupted

    def make(where):
        names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in taken]
        chosen = next(f for f, n in zip(taken, names, strict=True) if where(n))
        return Path(shutil.copytree(chosen, tmp_path / "run"))

    return make


def compare_all(interrupted, points, differences):
    whole, taken = interrupted
    assert len(taken) > 60
    for point in points(taken):
        folder = Path(shutil.copytree(point, point.parent / f"again-{point.name}"))
        go_on(folder)
        assert differences(whole, folder) == [], point.name
        shutil.rmtree(folder)


def test_a_run_that_died_anywhere_ends_as_one_that_did_not(interrupted, differences):
    compare_all(interrupted, lambda taken: taken[3 :: len(taken) // SHOWN], differences)


def test_a_run_that_died_between_spooled_uploads_ends_as_one_that_did_not(interrupted, differences):
    def spooled(taken):
        found = [folder for folder in taken if [*folder.rglob(".spooled.*")]]
        assert len(found) > 4  # an adapter and a LoRA of every client and exchange
        return [found[len(found) // 2]]

    compare_all(interrupted, spooled, differences)


@pytest.mark.slow
def test_a_run_that_died_at_any_point_at_all_ends_as_one_that_did_not(interrupted, differences):
    compare_all(interrupted, lambda taken: taken, differences)


def die_in(exchange):
    """Return a reply handler that kills the server on the first train reply of an exchange."""

    def die(message, reply):
        metadata = message.metadata
        if (metadata.group_id, metadata.message_type) == (str(exchange), MessageType.TRAIN):
            raise KeyboardInterrupt
        return reply

    return die


@pytest.mark.parametrize(
    ("setting", "stored"),
    [("train.schedule=run", "moments/lora/"), ("model.sent_dtype=int4", "errors/lora/")],
)
def test_real_training_resumes_bit_by_bit(differences, tmp_path, monkeypatch, setting, stored):
    monkeypatch.setattr(rank, "train", training.train)

    short = TWO.replace("rounds=2", "rounds=1") + " data.train_examples=4 data.test_examples=1"
    short += f" {setting}"

    fresh(tmp_path / "whole", short)
    with pytest.raises(KeyboardInterrupt):
        fresh(tmp_path / "run", short, on_reply=die_in(2))
    go_on(tmp_path / "run", short)
    assert differences(tmp_path / "whole", tmp_path / "run") == []
    states = list((tmp_path / "run").rglob("private-*.safetensors"))
    kept = [name for state in states for name in load_tensors(state)[0]]
    assert any(name.startswith(stored) for name in kept)


def test_chosen_neighbours_are_the_same_after_a_resume(differences, tmp_path):
    overrides = TWO.replace("clients_per_task=1", "clients_per_task=2") + " strategy=pilot_auto"

    fresh(tmp_path / "whole", overrides)
    with pytest.raises(KeyboardInterrupt):
        fresh(tmp_path / "run", overrides, on_reply=die_in(3))
    go_on(tmp_path / "run", overrides)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_it_can_die_again_and_again(interrupted, differences, tmp_path):
    """In every exchange once, after a client has trained, saved and replied."""

    class Killed(BaseException):
        pass

    def dies(exchange):
        def on_reply(message, reply):
            if message.metadata.group_id == str(exchange) and message.metadata.message_type in (
                MessageType.TRAIN,
                MessageType.EVALUATE,
            ):
                raise Killed
            return reply

        return on_reply

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        fresh(folder, on_reply=dies(1))
    for exchange in (2, 2, 4):  # the fourth is the closing evaluation
        with pytest.raises(Killed):
            go_on(folder, on_reply=dies(exchange))
    go_on(folder)
    assert differences(interrupted[0], folder) == []
    (event,) = select(read_events(folder), Resumed, 3)
    assert event.attempt == json.loads((folder / "result.json").read_text())["resumed"] == 4


def test_events_behind_the_checkpoint_are_moved_and_never_lost(interrupted, tmp_path):
    whole, taken = interrupted
    point = next(f for f in taken if (f / "checkpoint/round-0001/state.json").exists()
                 and b'"round": 2' in (f / "metrics.jsonl").read_bytes())  # fmt: skip
    folder = Path(shutil.copytree(point, tmp_path / "run"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')  # the line that was being written
    before = (folder / "metrics.jsonl").read_bytes()
    go_on(folder)
    (event,) = select(read_events(folder), Resumed)
    assert (event.exchange, event.attempt, event.interrupted) == (1, 1, "interrupted-1.jsonl")
    moved = (folder / "interrupted-1.jsonl").read_bytes()
    kept = before[: len(before) - len(moved)]
    assert kept + moved == before and moved.endswith(b'{"event": "tra')
    assert (folder / "metrics.jsonl").read_bytes().startswith(kept)
    assert event.moved == len(moved.splitlines())


def test_clients_hear_the_runs_own_name(interrupted, copy):
    folder = copy(lambda names: "checkpoint/round-0001/state.json" in names)
    grid = go_on(folder)
    names = {m.content["run"]["name"] for m in grid.messages if "run" in m.content.config_records}
    assert names == {"demo-1"}  # not -2, as Flower's run is called now


def test_killed_before_the_closing_evaluation_only_that_is_run(copy):
    folder = copy(lambda names: "checkpoint/round-0003/state.json" in names)
    grid = go_on(folder)
    kinds = [m.metadata.message_type for m in grid.messages if not m.metadata.reply_to_message_id]
    assert kinds == [MessageType.QUERY] * 2 + [MessageType.EVALUATE] * 2


def test_a_torn_checkpoint_is_passed_over_aloud(interrupted, differences, tmp_path):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    (folder / "result.json").unlink()
    file = folder / "checkpoint/round-0003/lora/counting-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    go_on(folder)
    (event,) = select(read_events(folder), Resumed)
    assert event.exchange == 2
    assert "round-0003/lora/counting-0.safetensors cannot be read" in event.passed_over[0]
    assert differences(interrupted[0], folder) == []
    assert (folder / "checkpoint/refused-1-round-0003").is_dir()  # kept for whoever looks into it


def test_with_no_whole_checkpoint_it_begins_anew(interrupted, differences, tmp_path):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    (folder / "result.json").unlink()
    for number in (2, 3):
        (folder / f"checkpoint/round-000{number}/state.json").write_text("{}")
    grid = go_on(folder)
    stages = [m.content["instruction"]["stage"] for m in grid.messages
              if m.metadata.message_type == MessageType.TRAIN
              and not m.metadata.reply_to_message_id]  # fmt: skip
    assert stages == [1, 1, 2, 2, 2, 2]
    assert differences(interrupted[0], folder) == []


def test_a_checkpoint_of_another_run_is_refused(interrupted, tmp_path):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    whole = load_checkpoint(folder / "checkpoint/round-0003")
    for number, identity, words in [
        (4, replace(whole.run, name="demo-9"), "is of run 'demo-9', but this run is 'demo-1'"),
        (4, replace(whole.run, settings="0"), "is of a run with other settings"),
        (5, whole.run, "is of exchange 5, after the run's last one"),
    ]:
        foreign = save_checkpoint(
            folder / "checkpoint",
            server_round=number,
            adapters={task: whole.adapter(task) for task in whole.tasks},
            loras={client: whole.lora(client) for client in whole.task_of},
            tasks=whole.tasks,
            task_of=whole.task_of,
            run=identity,
            events=1,
        )
        config = load_config(f"{TWO} strategy.rounds=3")
        opened = resume_module.resume_run(folder, config, TWO, name="x", flower_run="2")
        (reason,) = opened.folder.select(Resumed)[-1].passed_over
        assert words in reason
        assert opened.identity.name == "demo-1" and not foreign.exists()
        shutil.rmtree(folder)
        shutil.copytree(interrupted[0], folder)


def test_events_that_are_gone_make_a_checkpoint_unusable(interrupted, tmp_path):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    state = json.loads((folder / "checkpoint/round-0003/state.json").read_text())
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[: state["events"] - 1]))
    opened = resume_module.resume_run(folder, load_config(TWO), TWO, name="x", flower_run="2")
    (event,) = opened.folder.select(Resumed)
    assert event.exchange == 2
    assert "events, but metrics.jsonl has" in event.passed_over[0]


def test_a_damaged_event_is_named(interrupted, tmp_path):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([lines[0], b"no event\n", *lines[2:]]))
    with pytest.raises(StateError, match=r"metrics\.jsonl, line 2, is not an event"):
        go_on(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.batch_size=4", r"`train\.batch_size` is 4 but was 2 in the run"),
        ("seed=3", "`seed` is 3 but was 0 in the run"),
        ("data.tasks=[counting,vqa]", r"`data\.tasks` is \['counting', 'vqa'\] but was"),
        ("strategy.rounds=1", r"`strategy\.rounds` is 1 but must not be below 2 in the run"),
        ("strategy.num_neighbors=1", r"`strategy\.num_neighbors` is 1 but was 2"),
    ],
)
def test_another_setting_is_refused_by_name(interrupted, change, words):
    with pytest.raises(ConfigError, match=words):
        go_on(interrupted[0], f"{TWO} {change}")


def test_a_schedule_over_the_whole_run_fixes_its_rounds(tmp_path):
    short = f"{TWO} train.schedule=run"
    fresh(tmp_path / "run", short)
    with pytest.raises(ConfigError, match=r"`strategy\.rounds` is 3 but was 2 in the run"):
        go_on(tmp_path / "run", short.replace("rounds=2", "rounds=3"))


def test_settings_that_cannot_change_a_result_may_change(interrupted, tmp_path):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    (folder / "result.json").unlink()
    overrides = (
        f"{TWO} strategy.min_replies=2 strategy.below_minimum=wait simulation.cpus=2 "
        "strategy.wait_seconds=7 strategy.round_timeout_seconds=99 run.restarts=0"
    )
    config = load_config(overrides)
    opened = resume_module.resume_run(folder, config, overrides, name="x", flower_run="2")
    assert opened.checkpoint.server_round == 3
    assert "min_replies: 2" in (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_more_rounds_train_on_as_if_they_had_been_asked_for_at_once(
    interrupted, differences, tmp_path
):
    """The finished closing evaluation is the next exchange's evaluation of what it was sent."""
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    longer = TWO.replace("rounds=2", "rounds=3")
    go_on(folder, longer)
    fresh(tmp_path / "whole", longer)
    events = read_events(folder)
    assert [event.exchange for event in select(events, ExchangeClosed)] == [1, 2, 3, 4]
    found = differences(tmp_path / "whole", folder)
    assert found == ["metrics.jsonl"]  # only that earlier exchanges were announced as of 3, not 4
    assert "rounds: 3" in (folder / "config.yaml").read_text()


def test_a_completed_run_has_nothing_left_to_do(interrupted, tmp_path):
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    before = {p: p.read_bytes() for p in folder.rglob("*.json*")}
    assert go_on(folder).messages == []
    assert {p: p.read_bytes() for p in folder.rglob("*.json*")} == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="which holds no run"):
        go_on(tmp_path)
    with pytest.raises(ConfigError, match="which is not a run folder"):
        resume_module.check_resumable(tmp_path / "nowhere", load_config())
    with pytest.raises(RunError, match="already holds a run.*`resume="):
        (tmp_path / "metrics.jsonl").touch()
        fresh(tmp_path)
    with pytest.raises(RunError, match="but the resumed run is in"):
        go(f"{TWO} resume={tmp_path} run.folder={tmp_path / 'other'}")


def test_events_are_on_the_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    """What the system was asked to flush, and how long it was, when each state.json was written."""
    folder, flushed, counted = tmp_path / "run", [0], []
    metrics, fsync, write = folder / "metrics.jsonl", os.fsync, checkpoint_module.write_text

    def flush(descriptor):
        if metrics.exists() and os.path.samestat(os.fstat(descriptor), metrics.stat()):
            flushed[0] = len(metrics.read_bytes().splitlines())
        fsync(descriptor)

    def note(path, text):
        counted.append((json.loads(text)["events"], flushed[0]))
        write(path, text)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(checkpoint_module, "write_text", note)
    fresh(folder)
    assert len(counted) == 3
    assert all(0 < events <= there for events, there in counted)


def test_a_mistyped_folder_is_told_and_not_made(tmp_path):
    with pytest.raises(ConfigError, match="which is not a run folder"):
        go_on(tmp_path / "no" / "such" / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="which holds no run"):
        go_on(tmp_path / "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_of_two_runs_with_one_folder_the_second_is_refused(tmp_path, monkeypatch):
    """The other one takes the lock just before, and ends while this one waits for it."""
    monkeypatch.setattr(server_app, "federate", lambda grid, config, opened: None)
    folder = tmp_path / "run"

    @contextlib.contextmanager
    def late(*args, **kwargs):
        monkeypatch.setattr(server_app, "hold", hold)
        fresh(folder)
        (folder / "metrics.jsonl").write_text('{"event": "roster", "elapsed": 0.1}\n')
        with hold(*args, **kwargs):
            yield

    monkeypatch.setattr(server_app, "hold", late)
    with pytest.raises(RunError, match="already holds a run.*`resume="):
        fresh(folder, flower_run="2")
    assert json.loads((folder / "run.json").read_text())["name"] == "demo-1"


def test_two_at_a_time_are_refused(interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(server_app, "PATIENCE_SECONDS", 0.3)
    folder = Path(shutil.copytree(interrupted[0], tmp_path / "run"))
    (folder / "result.json").unlink()
    with hold(folder / server_app.SERVER_LOCK, "it"), pytest.raises(RunError, match="in use by"):
        go_on(folder)


def test_a_lock_goes_with_its_holder(tmp_path):
    """However that ends."""
    child = os.fork()
    if child == 0:
        lock = hold(tmp_path / "lock", "it")
        lock.__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with hold(tmp_path / "lock", "it"):
        pass


def test_a_worker_that_died_is_told_apart_from_errors_of_the_run(tmp_path, monkeypatch):
    def fail(error):
        def federate(*_):
            raise error

        return federate

    for number, (error, restartable) in enumerate(
        [(WorkerDied("it died"), True), (RunError("too few"), False)]
    ):
        monkeypatch.setattr(server_app, "federate", fail(error))
        with pytest.raises(type(error)):
            fresh(tmp_path / str(number))
        result = json.loads((tmp_path / str(number) / "result.json").read_text())
        assert (result["status"], result["restartable"]) == ("failed", restartable)
