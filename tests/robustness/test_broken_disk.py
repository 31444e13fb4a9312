"""Disks that are full, files that are torn or gone: a refusal that says so, and nothing lost."""

import contextlib
import errno
import resource
import shlex
import subprocess

import pytest
import torch
from flwr.app import MessageType
from inprocess import SMALL, Federation, InProcessGrid
from llava_files import write_federation
from quick_training import quick_training

from pilot_flwr import server_app
from pilot_flwr.client.private_state import PrivateState, PrivateStore
from pilot_flwr.client_app import app
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.run.checkpoint import latest_checkpoint
from pilot_flwr.run.directory import read_events
from pilot_flwr.run.events import Trained, select

THREE = (
    f"{SMALL} data.train_examples=4 data.tasks=[vqa] data.clients_per_task=3 strategy.rounds=2 "
    "evaluation.enabled=false"
)
WRONG = "vqa-0"


@pytest.fixture
def quickly():
    """Training itself is not what is tested here, except where it is what reads images."""
    with quick_training():
        yield


@contextlib.contextmanager
def full_disk(most=1000):
    """No file of this process can grow beyond `most` bytes: writes fail for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system; `full_disk` is tested all the same")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(client, seed):
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(seed))  # 160 kB
    return PrivateState(1, (), {"client_adapter": {"w": values}})


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_disk_that_is_really_full_leaves_the_state_before(small_disk):
    store = PrivateStore(small_disk / "run-1", WRONG, "vqa")
    store.save(fill(WRONG, 1), server_round=1)
    before = files(small_disk)
    with pytest.raises(OSError) as caught:
        store.save(fill(WRONG, 2), server_round=2)
    assert caught.value.errno == errno.ENOSPC
    assert files(small_disk) == before
    assert torch.equal(
        store.load().groups["client_adapter"]["w"], fill(WRONG, 1).groups["client_adapter"]["w"]
    )


class Sites:
    """Three real sites on one machine; something happens to the first before one exchange."""

    def __init__(self, tmp_path, overrides=THREE, **more):
        self.folders = {f"vqa-{k}": tmp_path / f"state of {k}" for k in range(3)}
        configs = [
            {"client-id": client, "state-folder": str(folder)} | more.get(client, {})
            for client, folder in self.folders.items()
        ]
        self.federation = Federation(tmp_path / "run", overrides, node_configs=configs)
        self.before = {}
        call = self.federation.grid._call

        def around(message):
            key = (message.metadata.message_type, message.metadata.group_id)
            with self.before.get((*key, message.metadata.dst_node_id), contextlib.nullcontext)():
                return call(message)

        self.federation.grid._call = around

    def run(self):
        self.federation.run()
        return self

    def store(self, client=WRONG):
        return PrivateStore(self.folders[client] / "test-1", client, "vqa")

    def stages(self):
        return {(e["client"], e["round"]): e["stage"] for e in self.federation.events("train")}

    def failures(self):
        return [
            (e["round"], e["phase"], e["client"], e["reason"])
            for e in self.federation.events("failure")
        ]


@pytest.mark.usefixtures("quickly")
def test_a_client_whose_disk_is_full_fails_alone_and_comes_back(tmp_path):
    sites = Sites(tmp_path)
    kept = {}

    @contextlib.contextmanager
    def fills_up():
        kept.update(files(sites.folders[WRONG]))
        with full_disk():
            yield
        assert files(sites.folders[WRONG]) == kept  # as it was, and no litter

    sites.before[MessageType.TRAIN, "2", 1] = fills_up
    sites.run()
    ((number, phase, client, reason),) = sites.failures()
    assert (number, phase, client) == (2, "train", WRONG)
    assert reason == "OSError (File too large); see the client's own log."
    assert kept and sites.stages()[WRONG, 3] == 2  # it went on from its state of exchange 1
    assert set(sites.stages()) == {
        (f"vqa-{k}", number) for k in range(3) for number in (1, 2, 3)
    } - {(WRONG, 2)}


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("damage", ["torn", "foreign", "not tensors"])
def test_a_client_whose_state_is_damaged_is_refused_until_it_is_taken_away(
    tmp_path, damage, caplog
):
    sites = Sites(tmp_path)

    @contextlib.contextmanager
    def damaged():
        path = sites.store().newest()
        if damage == "torn":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "foreign":
            path.write_bytes(sites.store("vqa-1").newest().read_bytes())
        else:
            path.write_text("{}")
        content = path.read_bytes()
        yield
        assert path.read_bytes() == content

    @contextlib.contextmanager
    def taken_away():
        sites.store().newest().unlink()
        yield

    sites.before[MessageType.QUERY, "2", 1] = damaged
    sites.before[MessageType.QUERY, "3", 1] = taken_away
    sites.run()
    reasons = [reason for number, _, client, reason in sites.failures() if client == "node 1"]
    (reason,) = reasons
    assert "<state-folder>/test-1/private-0001.safetensors " in reason
    words = {
        "torn": "cannot be read",
        "foreign": "belongs to client 'vqa-1'",
        "not tensors": "cannot",
    }
    assert words[damage] in reason and "Nothing has been overwritten." in reason
    assert str(tmp_path) not in reason
    stages = sites.stages()
    assert (WRONG, 2) not in stages and stages[WRONG, 3] == 1
    assert {stages[f"vqa-{k}", number] for k in (1, 2) for number in (2, 3)} == {2}


def test_images_that_are_gone_in_mid_run_fail_that_client_alone(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_federation(tmp_path / "data", tasks=["vqa"], train=8, test=4, clients=3)
    words = (
        "train.epochs=1 train.batch_size=2 strategy.rounds=2 evaluation.enabled=false "
        "model.feature_cache.where=off"
    )
    images = tmp_path / "data" / "vqa" / "images of the first site"
    own = {"train-file": str(tmp_path / "data/vqa/train.json"),
           "test-file": str(tmp_path / "data/vqa/test.json")}  # fmt: skip
    shared = tmp_path / "data/vqa/images"
    images.mkdir()
    for file in shared.iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    places = {"vqa-0": images, "vqa-1": shared, "vqa-2": shared}
    configs = {client: own | {"image-folder": str(place)} for client, place in places.items()}
    sites = Sites(tmp_path, shlex.join(expand([f"data={path}", *words.split()])), **configs)

    @contextlib.contextmanager
    def unplugged():
        images.rename(images.with_name("elsewhere"))
        yield
        images.with_name("elsewhere").rename(images)

    sites.before[MessageType.TRAIN, "2", 1] = unplugged
    sites.run()
    ((number, phase, client, reason),) = sites.failures()
    assert (number, phase, client) == (2, "train", WRONG)
    assert "image" in reason and str(tmp_path) not in reason
    assert sites.stages()[WRONG, 3] == 2


@pytest.mark.usefixtures("quickly")
def test_a_server_whose_disk_is_full_stops_and_its_last_checkpoint_is_whole(tmp_path):
    folder = tmp_path / "run"
    overrides = f"{THREE} run.folder={folder}"
    config = load_config(overrides)
    grid = InProcessGrid(app, num_nodes=3, overrides=overrides)
    filled = contextlib.ExitStack()

    def fill_up(message, reply):
        train = message.metadata.message_type == MessageType.TRAIN
        if train and message.metadata.group_id == "2" and message.metadata.dst_node_id == 3:
            filled.enter_context(full_disk(most=20_000))  # events still fit, tensors do not
        return reply

    grid.on_reply = fill_up
    with filled, pytest.raises(OSError, match="File too large.*checkpoint"):
        server_app.run(grid, config, overrides, flower_run="1")
    assert (folder / "result.json").exists()
    checkpoint, passed_over = latest_checkpoint(folder / "checkpoint")
    assert checkpoint.server_round == 1 and passed_over == []
    assert set(checkpoint.task_of) == {"vqa-0", "vqa-1", "vqa-2"}
    resumed = f"{THREE} resume={folder}"
    grid = InProcessGrid(app, num_nodes=3, overrides=resumed)
    server_app.run(grid, load_config(resumed), resumed, flower_run="2")
    assert latest_checkpoint(folder / "checkpoint")[0].server_round == 3


@pytest.mark.usefixtures("quickly")
def test_a_server_that_cannot_write_its_events_stops(tmp_path):
    """The events' file is a full device: a write fails in the middle of a line at most."""
    federation = Federation(tmp_path / "run", THREE)
    events = federation.folder.path / "metrics.jsonl"

    def fill_up(message, reply):
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "2":
            if not events.is_symlink():
                events.rename(events.with_name("before"))
                events.symlink_to("/dev/full")
        return reply

    federation.grid.on_reply = fill_up
    with pytest.raises(OSError) as caught:
        federation.run()
    assert caught.value.errno == errno.ENOSPC
    events.unlink()
    events.with_name("before").rename(events)
    assert {e.exchange for e in select(read_events(events.parent), Trained)} == {1}
    assert latest_checkpoint(federation.folder.checkpoints)[0].server_round == 1
