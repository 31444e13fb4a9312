"""Hugging Face data sets give the rows that the same data give as JSON and image files."""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from pyarrow import feather, parquet

from pilot_flwr.data.images import ImageError
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.llava import LlavaExamples, Reading
from pilot_flwr.data.row_files import TableFile, open_rows
from pilot_flwr.data.validation import WholeImages
from pilot_flwr.errors import DataError


def picture(number):
    image = Pillow.new("RGB", (6 + number, 4), (number * 40, 10, 20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(5)]


def turns(number):
    return [
        {"role": "user", "content": f"<image>What is {number}?"},
        {"role": "assistant", "content": f"It is {number}."},
    ]


ROWS = [{"id": str(n), "image": f"{n}.png", "messages": turns(n)} for n in range(5)]
EMBEDDED = [
    row | {"image": {"bytes": data, "path": row["image"]}, "references": None}
    for row, data in zip(ROWS, PICTURES, strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same five rows in every form, and their images as files."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "images").mkdir()
    for number, data in enumerate(PICTURES):
        (folder / f"images/{number}.png").write_bytes(data)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    encoded = [
        row | {"image": {"bytes": base64.b64encode(row["image"]["bytes"]).decode()}}
        for row in EMBEDDED
    ]
    (folder / "base64.json").write_text(json.dumps([row | {"references": []} for row in encoded]))
    addresses = [
        row | {"image": f"data:image/png;base64,{row['image']['bytes']}", "references": []}
        for row in encoded
    ]
    (folder / "addresses.jsonl").write_text("\n".join(map(json.dumps, addresses)))
    table = pa.Table.from_pylist(EMBEDDED)
    parquet.write_table(table, folder / "embedded.parquet", row_group_size=2)
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "paths.parquet")
    raw = [row | {"image": row["image"]["bytes"]} for row in EMBEDDED]
    parquet.write_table(pa.Table.from_pylist(raw), folder / "raw.parquet")
    feather.write_feather(table, folder / "rows.feather")
    whole = Dataset.from_list(
        [{key: row[key] for key in ("id", "image", "messages")} for row in EMBEDDED],
        features=Features(
            id=Value("string"),
            image=Image(),
            messages=[{"role": Value("string"), "content": Value("string")}],
        ),
    )
    whole.save_to_disk(folder / "saved", num_shards=2)
    whole.select([4, 3, 2, 1, 0]).select([4, 3, 2, 1, 0]).save_to_disk(folder / "selected")
    DatasetDict(train=whole, test=whole).save_to_disk(folder / "splits")
    shutil.copy(folder / "selected/data-00000-of-00001.arrow", folder / "stream.arrow")
    return folder


FORMS = [
    "embedded.parquet",
    "paths.parquet",
    "raw.parquet",
    "rows.feather",
    "stream.arrow",
    "saved",
    "selected",
    "splits/train",
    "base64.json",
    "addresses.jsonl",
]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_the_examples_of_the_json_file(folder, name):
    reading = Reading(folder / "images")
    expected = LlavaExamples([RowFile(folder / "rows.json")], reading)
    found = LlavaExamples([open_rows(folder / name)], reading)
    assert len(found) == 5
    for position in (3, 0, 4, 1, 2):
        one, other = found[position], expected[position]
        assert (one.id, one.turns, one.references) == (other.id, other.turns, other.references)
        (image,), (file,) = one.images, other.images
        assert np.array_equal(image.read(), file.read())
        assert image.header() == file.header()
        assert image.origin == f"{name.split('/')[-1]}, row {position + 1}, image 1"


@pytest.mark.parametrize("name", ["embedded.parquet", "saved", "base64.json"])
def test_embedded_images_need_no_folder_and_are_known_by_their_content(folder, name):
    found = LlavaExamples([open_rows(folder / name)], Reading())
    keys = {image.identity() for example in found for image in example.images}
    again = LlavaExamples([open_rows(folder / "raw.parquet")], Reading())
    assert len(keys) == 5
    assert {image.identity() for example in again for image in example.images} == keys
    assert {example.images[0].key for example in again} == {e.images[0].key for e in found}


@pytest.mark.parametrize("name", ["embedded.parquet", "rows.feather", "saved"])
def test_rows_are_indexed_and_scanned_alike(folder, name):
    rows = open_rows(folder / name)
    assert isinstance(rows, TableFile) and rows is open_rows(folder / name)
    assert list(rows.scan()) == list(rows) == rows[:] and rows[-1]["id"] == "4"
    assert "references" not in rows[0], "an empty field is absent"
    assert rows[0]["image"]["bytes"] == PICTURES[0]
    with pytest.raises(IndexError):
        rows[5]


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_a_broken_image_is_the_error_of_its_row(tmp_path, form):
    data = [PICTURES[0], PICTURES[1][:40], b"<html>", b"", PICTURES[0]]
    rows = [
        {**row, "image": {"bytes": d, "path": "p/x.png"}} for row, d in zip(ROWS, data, strict=True)
    ]
    path = tmp_path / "train.parquet"
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        Dataset.from_list(rows).save_to_disk(path := tmp_path / "train.parquet")
    examples = LlavaExamples([open_rows(path)], Reading())
    images = WholeImages(2)
    images.decode(examples)
    reasons = ["truncated or damaged", "an HTML page", "the file is empty"]
    for position, reason in enumerate(reasons, start=1):
        with pytest.raises(ImageError, match=f"row {position + 1}, image 1 .*{reason}") as error:
            images.check(examples[position])
        assert error.value.path == "p/x.png" and "x.png" not in str(error.value)
    for position in (0, 4):
        images.check(examples[position])


def test_paths_in_a_data_set_are_held_to_the_image_folder(tmp_path, folder):
    names = ["../images/0.png", str(folder / "images/0.png"), "absent.png", "0.png"]
    rows = [
        row | {"image": {"bytes": None, "path": name}}
        for row, name in zip(ROWS, names, strict=False)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    examples = LlavaExamples([open_rows(tmp_path / "a.parquet")], Reading(folder / "images"))
    for position, reason in enumerate(["must be relative", "must be relative", "cannot be opened"]):
        with pytest.raises(ImageError, match=f"a.parquet, row {position + 1}, image 1 {reason}"):
            examples[position].images[0].read()
    assert examples[3].images[0].size() == (4, 6)


def test_turns_that_are_stored_as_columns_are_turns(tmp_path):
    said = {"from": ["human", "gpt"], "value": ["What?", "This."]}
    table = pa.Table.from_pylist([{"id": 1, "conversations": said}])
    parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = open_rows(tmp_path / "a.parquet")
    assert row["conversations"] == [
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "This."},
    ]


def test_parts_of_messages_may_lack_members(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
    row = {"images": [{"bytes": PICTURES[0], "path": None}], "messages": messages}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (example,) = LlavaExamples([open_rows(tmp_path / "a.parquet")], Reading())
    assert example.turns[0].text == "<image>\nWhat?" and len(example.images) == 1


def _without_state(folder):
    (folder / "saved/state.json").unlink()


def _with_broken_state(folder):
    (folder / "saved/state.json").write_text("{")


def _with_indices(folder):
    state = json.loads((folder / "saved/state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "saved/state.json").write_text(json.dumps(state))


def _without_shard(folder):
    (folder / "saved/data-00001-of-00002.arrow").unlink()


def _with_cut_shard(folder):
    path = folder / "saved/data-00001-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (None, "splits", "splits is a data set of several splits: .* splits/train, splits/test"),
        (None, "images", "images is a folder, but not one .*wrote; name the files"),
        (_without_state, "saved", "saved is a folder, but not one that `save_to_disk` wrote"),
        (_with_broken_state, "saved", "saved/state.json cannot be read"),
        (_with_indices, "saved", "saved is a selection of rows"),
        (_without_shard, "saved", "saved lacks the file data-00001-of-00002.arrow"),
        (_with_cut_shard, "saved", "saved, data-00001-of-00002.arrow, is truncated, damaged"),
        (None, "cut.parquet", "cut.parquet is truncated, damaged"),
        (None, "cut.arrow", "cut.arrow is truncated, damaged"),
        (None, "empty.parquet", "empty.parquet has no rows"),
        (None, "twice.parquet", "twice.parquet has the column 'a' twice"),
        (None, "pipe", "pipe is neither a file nor a folder"),
    ],
)
def test_what_cannot_be_read_is_named(folder, tmp_path, change, name, message):
    folder = shutil.copytree(folder, tmp_path / "copy")
    if change:
        change(folder)
    (folder / "cut.parquet").write_bytes((folder / "raw.parquet").read_bytes()[:60])
    (folder / "cut.arrow").write_bytes((folder / "rows.feather").read_bytes()[:60])
    parquet.write_table(pa.Table.from_pylist(ROWS)[:0], folder / "empty.parquet")
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    parquet.write_table(twice, folder / "twice.parquet")
    os.mkfifo(folder / "pipe")
    with pytest.raises(DataError, match=f"^{message}") as error:
        open_rows(folder / name)[0]
    assert str(tmp_path) not in str(error.value)


def test_damaged_pages_are_the_same_error_at_every_read(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(9)]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes([255]) * 60 + data[64:])
    rows = open_rows(path)
    assert len(rows) == 9, "the footer is intact"
    reads = [
        lambda: rows[0],
        lambda: rows[8],
        lambda: list(rows.scan()),
        lambda: open_rows(path)[1],
    ]
    for read in reads:
        with pytest.raises(DataError, match="^a.parquet is truncated, damaged"):
            read()


def test_a_footer_with_another_number_of_rows_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": [str(n) for n in range(55)]}), path)
    data = path.read_bytes()
    start = data.rindex(bytes([0x16, 110, 0x19]))  # 55 rows, then the list of row groups
    path.write_bytes(data[:start] + bytes([0x16, 112, 0x19]) + data[start + 3 :])
    rows = open_rows(path)
    assert len(rows) == 56
    with pytest.raises(DataError, match="^a.parquet is truncated, damaged"):
        rows[0]


def test_two_columns_of_one_name_are_the_same_error_at_every_read(tmp_path):
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    rows = open_rows(tmp_path / "twice.parquet")
    for _ in range(2):
        with pytest.raises(DataError, match="^twice.parquet has the column 'a' twice"):
            rows[0]


@pytest.mark.parametrize("damage", [0x7FFFFFF0, -5, 9], ids=["far", "negative", "falling"])
@pytest.mark.parametrize("form", ["saved", "stream", "file", "feather", "list", "binary"])
def test_damaged_offsets_are_an_error_before_a_value_is_read(tmp_path, form, damage):
    """Arrow would read other memory, or end the process."""
    values = ["a" * (n + 1) for n in range(5)]
    values = [list(v) for v in values] if form == "list" else values
    values = [v.encode() for v in values] if form == "binary" else values
    table, path = pa.table({"prompt": values}), tmp_path / "a.arrow"
    if form == "saved":
        Dataset(table).save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
    elif form == "feather":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table)
    offsets = np.array([0, 1, 3, 6, 10, 15], dtype="<i4")
    damaged = offsets.copy()
    damaged[2] = damage
    before = path.read_bytes()
    path.write_bytes(before.replace(offsets.tobytes(), damaged.tobytes()))
    assert path.read_bytes() != before
    name = "saved, data-00000-of-00001.arrow," if form == "saved" else "a.arrow"
    for _ in range(2):
        with pytest.raises(DataError, match=f"^{name} is truncated, damaged"):
            open_rows(tmp_path / "saved" if form == "saved" else path)


@pytest.mark.parametrize("value", [{"bytes": "no base64!"}, {"bytes": [1, 999]}])
def test_bytes_that_are_none_are_the_error_of_their_row(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0] | {"image": value}]))
    examples = LlavaExamples([open_rows(tmp_path / "a.json")], Reading())
    with pytest.raises(DataError, match=re.escape("a.json, row 1, image 1 (`image`) has bytes")):
        examples[0]


@pytest.mark.parametrize("name", ["raw.parquet", "saved"])
def test_a_data_set_that_changes_is_refused(folder, tmp_path, name):
    folder = shutil.copytree(folder, tmp_path / "copy")
    rows = open_rows(folder / name)
    assert rows[0]["id"] == "0"
    path = next((folder / "saved").glob("*.arrow")) if name == "saved" else folder / name
    os.utime(path, ns=(1, 2**62))
    with pytest.raises(DataError, match=f"{name} has changed since it was opened"):
        rows[0]


def test_examples_do_not_hold_the_bytes_of_their_images(tmp_path):
    """The 8 MB of images stay in a file that is mapped into memory."""
    noise = np.random.default_rng(0)
    rows = [row | {"image": noise.bytes(200_000)} for row in ROWS * 8]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    del rows
    before = pa.total_allocated_bytes()
    examples = list(LlavaExamples([open_rows(tmp_path / "a.parquet")], Reading()))
    assert len(examples[39].images[0].data) == 200_000
    assert pa.total_allocated_bytes() - before < 1e6
