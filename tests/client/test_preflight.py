"""Preflight checks, on a real disk."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pilot_flwr.client import preflight
from pilot_flwr.client.node import Site
from pilot_flwr.client.node_config import private_paths
from pilot_flwr.client.preflight import check_files, check_readiness, check_room, check_writable
from pilot_flwr.config.loading import load_config
from pilot_flwr.data.client_files import SiteFiles
from pilot_flwr.data.federation import Client
from pilot_flwr.errors import ConfigError
from pilot_flwr.flower.messages import encode_error
from pilot_flwr.model.shapes import layout_of

CONFIG = load_config()
NOBODY = 65534


@pytest.fixture
def place():
    """Return a folder that other users can reach, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def ordinary_user():
    """Be somebody for whom rights count, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def make(folder):
    """Return what a whole site has in `folder`."""
    for name in ("a.json", "b.json", "t.json"):
        (folder / name).write_text("[]")
    (folder / "images").mkdir()
    (folder / "images" / "patient-7.png").write_bytes(b"png")
    return SiteFiles(
        (folder / "a.json", folder / "b.json"), (folder / "t.json",), folder / "images"
    )


def test_a_whole_site_is_ready_and_nothing_is_left_behind(place):
    files = make(place)
    site = Site(Client("a", "vqa"), place / "state" / "run-1", "cpu", files)
    check_readiness(site, CONFIG)
    assert list((place / "state" / "run-1").iterdir()) == []
    check_files(SiteFiles(files.train), evaluated=False)  # no images, no test


def test_a_folder_is_read_if_it_holds_a_data_set(place):
    files = make(place)
    is_folder(place)
    (place / "b.json" / "state.json").write_text("{}")
    check_files(files, evaluated=True)
    (place / "b.json").chmod(0o311)
    with ordinary_user(), pytest.raises(ConfigError, match="`train-file` names .* cannot be list"):
        check_files(files, evaluated=True)


def gone(folder):
    (folder / "b.json").unlink()


def is_folder(folder):
    gone(folder)
    (folder / "b.json").mkdir()


def locked(name):
    return lambda folder: (folder / name).chmod(0)


def not_entered(folder):
    (folder / "images").chmod(0o744)


def not_listed(folder):
    (folder / "images").chmod(0o711)


def no_images(folder):
    shutil.rmtree(folder / "images")


def file_for_images(folder):
    no_images(folder)
    (folder / "images").write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (gone, "`train-file` names '{0}/b.json', which is not a file"),
        (is_folder, "`train-file` names '{0}/b.json', which is not a file"),
        (locked("a.json"), "`train-file` names '{0}/a.json', which cannot be read: Permission den"),
        (locked("t.json"), "`test-file` names '{0}/t.json', which cannot be read: Permission den"),
        (no_images, "`image-folder` names '{0}/images', which is not a folder"),
        (file_for_images, "`image-folder` names '{0}/images', which is not a folder"),
        (not_listed, "`image-folder` names '{0}/images', which cannot be listed: Permission"),
        (not_entered, "`image-folder` names '{0}/images', which cannot be entered (r and x)"),
        (
            locked("images/patient-7.png"),
            "`image-folder` names '{0}/images', where a file cannot be read: Permission denied",
        ),
        (locked("."), "`train-file` names '{0}/a.json', which cannot be reached: Permission"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_server_gets_no_path(place, spoil, message):
    files = make(place)
    spoil(place)
    with ordinary_user(), pytest.raises(ConfigError) as caught:
        check_files(files, evaluated=True)
    place.chmod(0o755)
    assert str(caught.value).startswith(message.format(place))
    node = {"train-file": ";".join(map(str, files.train)), "test-file": str(files.test[0])}
    told = encode_error(
        caught.value, private_paths(node | {"image-folder": str(files.images)})
    ).reason
    assert str(place) not in told and "patient" not in told and "<" in told


@pytest.fixture
def overlapping(tmp_path):
    """A site whose test file repeats one of its training rows, under another image name."""
    (tmp_path / "images").mkdir()
    for name, colour in (("a", 1), ("b", 1), ("c", 9)):
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / f"images/{name}.png")
    for name, images in {"train": "ac", "test": "b"}.items():
        rows = [{"image": f"{i}.png", "prompt": "What?", "completion": "x"} for i in images]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return SiteFiles((tmp_path / "train.json",), (tmp_path / "test.json",), tmp_path / "images")


def settings(*overrides):
    return load_config(
        f"data.source=llava data.tasks=[vqa] +data.files={{vqa:{{}}}} {' '.join(overrides)}"
    )


def test_a_site_whose_test_rows_are_training_rows_is_refused(
    overlapping, tmp_path, caplog, monkeypatch
):
    """Whatever the server sets, its limit or the rows that it draws; only the log names rows."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    site = Site(Client("a", "vqa"), tmp_path / "state" / "run-1", "cpu", overlapping)
    message = (
        r"^1 of 1 test rows .* \(same images and question\). Remove .*`allowed-overlap`, [^0]*0.$"
    )
    for words in ((), ("data.train_examples=1", "seed=1"), ("data.allowed_overlap=1",)):
        with pytest.raises(ConfigError, match=message):
            check_readiness(site, settings(*words))
    assert len(list((tmp_path / "state" / "overlap").iterdir())) == 1
    assert "such as test.json, row 1 and train.json, row 1." in caplog.text
    check_readiness(site, settings("evaluation.enabled=false"))
    allowed = replace(site, files=replace(overlapping, allowed_overlap=1.0))
    check_readiness(allowed, settings())
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "Why?", "completion": "x"}]))
    check_readiness(site, settings())


def test_a_query_of_a_private_run_does_not_depend_on_the_overlap(overlapping, tmp_path):
    """Its client never evaluates, and the answer would be a bit about the rows."""
    site = Site(Client("a", "vqa"), tmp_path / "state" / "run-1", "cpu", overlapping)
    check_readiness(site, settings("privacy.enabled=true"))
    assert not (tmp_path / "state" / "overlap").exists()
    with pytest.raises(ConfigError, match="^1 of 1 test rows"):
        check_readiness(site, settings("privacy.enabled=true", "privacy.send_metrics=true"))


def test_a_simulated_clients_overlap_is_allowed_by_the_run(overlapping, tmp_path):
    files = "+data.files={vqa:{train:[train.json],test:[test.json],images:images}}"
    words = (
        f"data.source=llava data.tasks=[vqa] data.clients_per_task=1 data.folder={tmp_path} {files}"
    )
    site = Site(Client("vqa-0", "vqa", 0), tmp_path / "run" / "vqa-0", "cpu")
    with pytest.raises(ConfigError, match="1 of 1 test rows .*raise `data.allowed_overlap`"):
        check_readiness(site, load_config(f"{words} data.train_examples=0"))
    check_readiness(site, load_config(f"{words} data.train_examples=0 data.allowed_overlap=1"))


def test_a_run_that_evaluates_needs_a_test_file(place):
    with pytest.raises(ConfigError, match="`test-file` is missing .* `evaluation.enabled=false`"):
        check_files(SiteFiles(make(place).train), evaluated=True)


def test_a_folder_that_cannot_be_made_or_written_is_named(place):
    (place / "state").mkdir()
    (place / "state").chmod(0o555)
    for folder in (place / "state", place / "state" / "run-1"):
        with ordinary_user(), pytest.raises(ConfigError, match="cannot be written: Permission"):
            check_writable(folder)
    (place / "file").write_text("")
    with pytest.raises(ConfigError, match="`state-folder`.* cannot be written: Not a directory"):
        check_writable(place / "file" / "run-1")


def test_the_room_that_is_needed_is_named_beside_what_is_free(place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = layout_of(CONFIG.model, tuple(CONFIG.data.tasks)).private_bytes

    def free(number):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(1, 1, number))

    free(4 * size)
    check_room(place, size)
    free(4 * size - 1)
    with pytest.raises(ConfigError) as caught:
        check_room(place, size)
    assert f"({4 * size - 1} bytes) free but needs" in str(caught.value)
    assert f"({4 * size} bytes)" in str(caught.value)
    (place / "private-0001.safetensors").write_bytes(bytes(size))  # what is there needs no room
    free(3 * size)
    check_room(place, size)
    for number in range(2, 6):
        (place / f"private-000{number}.safetensors").write_bytes(bytes(size))
    free(size - 1)  # the next state is written before the oldest one goes
    with pytest.raises(ConfigError, match=rf"needs .* \({size} bytes\)"):
        check_room(place, size)
