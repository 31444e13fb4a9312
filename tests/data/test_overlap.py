"""Test rows that are training rows too: counted by image content and question, else not."""

import base64
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pilot_flwr.data import overlap
from pilot_flwr.data.images import ImageFile
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.llava import LlavaExamples, Reading
from pilot_flwr.data.overlap import Overlap, cached_overlap, check_overlap, find_overlap
from pilot_flwr.errors import ConfigError

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)


@pytest.fixture
def images(tmp_path):
    """A picture in many files, and another one of the same size."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    one, other = map(Image.fromarray, PIXELS)
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "again")
    one.save(folder / "one.png")
    one.save(folder / "sub" / "again.png", compress_level=0, pnginfo=note)
    one.save(folder / "one.bmp")
    other.save(folder / "other.png")
    for name, source in {"one": one, "other": other}.items():
        source.save(folder / f"{name}.jpg", quality=90)
    (folder / "renamed.jpeg").write_bytes((folder / "one.jpg").read_bytes())
    Image.open(folder / "one.jpg").save(folder / "of-jpeg.png")
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:100])
    return folder


def rows(folder, name, *rows):
    """Write rows (images, then questions) and return them as examples."""
    lines = []
    for shown, *questions in rows:
        turns = []
        for question in questions:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]
        lines.append(json.dumps({"images": shown, "messages": turns}))
    (folder.parent / name).write_text("\n".join(lines))
    return LlavaExamples([RowFile(folder.parent / name)], Reading(folder))


def count(images, train, test, **options):
    found = find_overlap(
        [rows(images, "train.jsonl", *train)], rows(images, "test.jsonl", *test), workers=2
    )
    assert found.total == len(test)
    return found.rows


SAME = {
    "the file": ("one.png", "one.png"),
    "another name": ("one.jpg", "renamed.jpeg"),
    "written again": ("one.png", "sub/again.png"),
    "another format": ("one.bmp", "one.png"),
    "a decoded JPEG": ("one.jpg", "of-jpeg.png"),
}
OTHERS = {
    "another picture": ("one.png", "other.png"),
    "another JPEG": ("one.jpg", "other.jpg"),
    "compressed with loss": ("one.png", "one.jpg"),
    "broken": ("broken.png", "broken.png"),
    "absent": ("absent.png", "absent.png"),
}


@pytest.mark.parametrize("pair", [*SAME, *OTHERS])
def test_images_are_compared_by_content(images, pair):
    train, test = (SAME | OTHERS)[pair]
    for first, second in ((train, test), (test, train)):
        found = count(images, [([first], "What?")], [([second], "What?")])
        assert found == (pair in SAME)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["What?"], ["What?"], 1),
        (["what  is\nit?"], ["What is it? "], 1),
        (["<image>\nWhat?"], ["What? <image>"], 1),
        (["What?"], ["Why?"], 0),
        (["How many?", "What?"], ["What?"], 1),  # LLaVA joins an image's questions in one row
        (["What?", "Why?", "How?"], ["What?", "Why?"], 1),
        (["What?", "Why?"], ["How?", "Why?"], 0),  # a question's meaning depends on those before
        (["Why?"], ["What?", "Why?"], 0),
    ],
)
def test_questions_are_compared_by_their_words(images, train, test, expected):
    assert count(images, [(["one.png"], *train)], [(["one.png"], *test)]) == expected


def test_rows_without_images_and_with_several(images):
    both, turned = ["one.png", "other.png"], ["other.png", "one.png"]
    question = "<image> or <image>?"
    assert count(images, [([], "Hello")], [([], "hello")]) == 1
    assert count(images, [([], "Hello")], [(["one.png"], "Hello")]) == 0
    assert count(images, [(both, question)], [(both, question), (turned, question)]) == 1


@pytest.mark.parametrize("name", ["one.png", "one.jpg"])
def test_an_image_in_the_row_is_the_image_in_the_folder(images, name):
    rows_with = [
        ([{"bytes": base64.b64encode((images / file).read_bytes()).decode()}], "What?")
        for file in (name, "other.png")
    ]
    assert count(images, [([name], "What?")], rows_with) == 1
    assert count(images, rows_with, [([name], "What?")]) == 1
    assert count(images, rows_with, rows_with[:1]) == 1


def test_images_in_rows_are_not_kept_in_memory(images, monkeypatch):
    """Where all questions coincide, they would be the whole file."""
    kept = []
    narrow = overlap._Images.narrow

    def look(self, *args):
        kept.extend(self._sources)
        return narrow(self, *args)

    monkeypatch.setattr(overlap._Images, "narrow", look)
    data = [base64.b64encode((images / f).read_bytes()).decode() for f in ("one.png", "one.bmp")]
    train, test = ([([{"bytes": text}], "What?")] for text in data)
    assert count(images, train, test) == 1
    assert kept and not any(isinstance(source, ImageFile) for source in kept)


def test_every_test_row_counts_once_and_one_is_named(images):
    train = [(["one.png"], "What?"), (["one.bmp"], "What?"), (["other.png"], "Why?")]
    test = [(["other.png"], "What?"), (["sub/again.png"], "What?"), (["one.png"], "What?")]
    found = find_overlap(
        [rows(images, "train.jsonl", *train)], rows(images, "test.jsonl", *test), workers=0
    )
    assert found == Overlap(2, 3, "test.jsonl, row 2 and train.jsonl, row 1")
    check_overlap(found, "data.allowed_overlap", 0.7)
    check_overlap(Overlap(0, 3), "data.allowed_overlap", 0.0)
    message = (
        r"^2 of 3 test rows are training rows too .* such as .*`data.allowed_overlap`.* is 0.6"
    )
    with pytest.raises(ConfigError, match=message):
        check_overlap(found, "data.allowed_overlap", 0.6)


def test_images_are_opened_only_where_questions_coincide_and_decoded_where_sizes_do(
    images, monkeypatch
):
    Image.fromarray(PIXELS[0, :8]).save(images / "small.png")
    opened, decoded = [], []
    size, read = ImageFile.size, ImageFile.read
    monkeypatch.setattr(ImageFile, "size", lambda self: (opened.append(self.name), size(self))[1])
    monkeypatch.setattr(ImageFile, "read", lambda self: (decoded.append(self.name), read(self))[1])
    train = [(["one.png"], "Why?"), (["small.png"], "What?"), (["other.png"], "What?")]
    assert count(images, train, [(["one.bmp"], "What?")] * 2) == 0
    assert sorted(opened) == ["one.bmp", "other.png", "small.png"]
    assert sorted(decoded) == ["one.bmp", "other.png"]
    assert count(images, [(["one.jpg"], "What?")], [(["renamed.jpeg"], "What?")]) == 1
    assert sorted(decoded) == ["one.bmp", "other.png"]  # JPEG files by their bytes


def test_the_result_is_kept_until_a_file_of_rows_changes(images, tmp_path, monkeypatch):
    def find(*train):
        parts = [rows(images, "train.jsonl", *train)]
        test = rows(images, "test.jsonl", (["one.png"], "What?"))
        return cached_overlap(parts, test, tmp_path / "checked", workers=1)

    first = find((["one.bmp"], "What?"))
    assert first.rows == 1
    (kept,) = (tmp_path / "checked").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "find_overlap", lambda *_, **__: pytest.fail("counted again"))
        test = LlavaExamples([RowFile(tmp_path / "test.jsonl")], Reading(images))
        train = LlavaExamples([RowFile(tmp_path / "train.jsonl")], Reading(images))
        assert cached_overlap([train], test, tmp_path / "checked", workers=1) == first
    kept.write_text("[1, ")
    assert cached_overlap([train], test, tmp_path / "checked", workers=1) == first
    assert find((["one.bmp"], "What?"), (["one.bmp"], "Why?")).rows == 1
    assert len(list((tmp_path / "checked").iterdir())) == 2
