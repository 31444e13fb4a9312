"""Usable rows are selected, broken ones counted or refused, and results cached."""

import json

import numpy as np
import pytest
from PIL import Image

from pilot_flwr.data.examples import Example, Turn
from pilot_flwr.data.images import ImageFile
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.llava import LlavaExamples, Reading
from pilot_flwr.data.validation import WholeImages, usable
from pilot_flwr.errors import DataError

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]


@pytest.fixture
def make(tmp_path):
    """Write rows, of which some are broken, and return them as examples."""

    def make(total=10, broken=()):
        rows = [{"id": n, "conversations": TURNS} for n in range(total)]
        lines = ["{" if n in broken else json.dumps(row) for n, row in enumerate(rows)]
        lines[0] = lines[0] if 0 not in broken else '{"id": 0}'
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        return LlavaExamples([RowFile(tmp_path / "train.jsonl")], Reading())

    return make


class Checks:
    """Count checks; refuse some ids."""

    def __init__(self, refused=()):
        self.refused, self.seen = refused, []

    def __call__(self, example):
        self.seen.append(example.id)
        if example.id in self.refused:
            raise DataError(f"{example.name} has 9 tokens.")


@pytest.fixture
def screen(tmp_path):
    def screen(examples, check=None, *, allowed=0.0, settings="a", lines=None, images=None):
        return usable(
            examples,
            name="train split of client 'gqa-0'",
            check=check or Checks(),
            allowed=allowed,
            settings=settings,
            folder=tmp_path / "checked",
            images=images,
            progress=(lines if lines is not None else []).append,
        )

    return screen


def test_good_rows_are_all_used(make, screen):
    lines, examples = [], make()
    assert screen(examples, lines=lines) is examples
    assert lines == ["train split of client 'gqa-0': 10 rows checked, 0 left out as broken"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([3], r"^train.jsonl, row 4 is broken JSON \(.*\)\.$"),
        ([3, 5], r"row 4 .* 1 further row of the train split of client 'gqa-0' cannot be used"),
        ([3, 5, 7], r"row 4 .* 2 further rows of the train split of client 'gqa-0' cannot"),
        ([0], "^train.jsonl, row 1: `conversations` is missing"),
    ],
)
def test_by_default_one_broken_row_is_an_error(make, screen, broken, message):
    with pytest.raises(DataError, match=message):
        screen(make(broken=broken))


def test_an_allowed_share_is_left_out_and_counted(make, screen):
    lines = []
    kept = screen(make(broken=[3, 5]), Checks(["8:7"]), allowed=0.3, lines=lines)
    assert [e.id for e in kept] == [f"{n + 1}:{n}" for n in (0, 1, 2, 4, 6, 8, 9)]
    assert lines == ["train split of client 'gqa-0': 10 rows checked, 3 left out as broken"]


def test_more_than_the_allowed_share_is_an_error(make, screen):
    message = "3 of 10 rows of the train split .* `data.allowed_broken` is 0.29. The first: .*row 4"
    with pytest.raises(DataError, match=message):
        screen(make(broken=[3, 5]), Checks(["8:7"]), allowed=0.29)


def test_the_verdict_is_kept_until_something_changes(make, screen):
    examples = make(broken=[3])
    first = screen(examples, allowed=0.5)
    again, lines = Checks(), []
    kept = screen(examples, again, allowed=0.5, lines=lines)
    assert (again.seen, lines) == ([], []) and [e.id for e in kept] == [e.id for e in first]

    screen(examples, other := Checks(), allowed=0.5, settings="b")
    screen(examples.select(np.arange(5)), fewer := Checks(), allowed=0.5)
    changed = make(broken=[4])  # as many rows as before
    kept = screen(changed, file := Checks(), allowed=0.5)
    assert kept[3].id == "4:3"
    assert (len(other.seen), len(fewer.seen), len(file.seen)) == (9, 4, 9)


def test_a_refusal_is_not_kept(make, screen):
    """The owner may fix the defect, such as an image, without changing the file of rows."""
    examples = make()
    with pytest.raises(DataError):
        screen(examples, Checks(["8:7"]))
    assert len(screen(examples)) == 10


def test_a_torn_verdict_counts_as_absent(make, screen, tmp_path):
    examples = make()
    screen(examples)
    (verdict,) = (tmp_path / "checked").iterdir()
    for text in ("[1, ", "{}", ""):
        verdict.write_text(text)
        screen(examples, again := Checks())
        assert len(again.seen) == 10


def test_examples_in_memory_must_have_unique_ids(screen):
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    examples = [Example(name, (), turns) for name in ("x", "y", "x")]
    with pytest.raises(DataError, match="gqa-0', 1 ids belong to more than one example: 'x'"):
        screen(examples)
    assert screen(examples[:2]) == examples[:2]


def test_an_image_that_is_broken_behind_its_header_is_found_by_decoding(tmp_path, screen):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    rows = [{"id": n, "image": n, "conversations": TURNS} for n in ("a.png", "b.png")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = LlavaExamples([RowFile(tmp_path / "train.jsonl")], Reading(images=tmp_path))

    def header(example):
        return [image.size() for image in example.images]

    assert len(screen(examples, header, allowed=0.5, settings="header")) == 2
    for workers in (0, 2):
        images, name = WholeImages(workers), f"decode {workers}"
        left = screen(examples, header, allowed=0.5, settings=name, images=images)
        assert [example.id for example in left] == ["1:a.png"]
    with pytest.raises(DataError, match=r"train.jsonl, row 2, image 1 cannot be decoded"):
        screen(examples, header, settings="none", images=WholeImages())


@pytest.mark.parametrize("workers", [0, 3])
def test_an_image_that_rows_share_is_decoded_once(tmp_path, screen, monkeypatch, workers):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    rows = [{"id": n, "image": "ab"[n % 5 == 0] + ".png", "conversations": TURNS} for n in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = LlavaExamples([RowFile(tmp_path / "train.jsonl")], Reading(images=tmp_path))
    read, decoded = ImageFile.read, []
    monkeypatch.setattr(ImageFile, "read", lambda self: (decoded.append(self.name), read(self))[1])
    left = screen(examples, allowed=0.5, images=WholeImages(workers))
    assert [example.id for example in left] == [f"{n + 1}:{n}" for n in range(9) if n % 5]
    assert decoded.count("a.png") == 1


def test_the_verdict_depends_on_how_rows_are_read(make, screen):
    examples = make()
    screen(examples)
    other = LlavaExamples(examples.files, Reading(prompt_suffix="Say it in one word."))
    screen(other, again := Checks())
    assert len(again.seen) == 10
