"""LLaVA rows as examples: ids, turns, markers, suffixes, and errors that do not quote the row."""

import json
from pathlib import Path

import numpy as np
import pytest

from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.llava import LlavaExamples, Reading, to_example
from pilot_flwr.errors import DataError

READING = Reading(images=Path("/images"))
SECRET = "The patient is Ann"


def turns(*texts):
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


def row(*texts, **more):
    return {"id": "a", "conversations": turns(*(texts or ("What?", "This.")))} | more


def example(found, reading=READING):
    return to_example(found, "17:", "train.json, row 17", reading)


def texts(found):
    return [turn.text for turn in found.turns]


def test_a_row_of_llavas_own_file_is_what_llava_makes_of_it():
    """The first row of LLaVA-Instruct: its marker follows the question and moves to the front."""
    found = example(
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": turns(
                "What are the colors of the bus in the image?\n<image>",
                "The bus in the image is white and red.",
                "What feature can be seen on the back of the bus?",
                "The back of the bus features an advertisement.",
            ),
        }
    )
    assert texts(found)[:2] == [
        "<image>\nWhat are the colors of the bus in the image?",
        "The bus in the image is white and red.",
    ]
    assert [turn.role for turn in found.turns] == ["user", "assistant"] * 2
    assert found.id == "17:000000033471"
    assert found.images[0].name == "coco/train2017/000000033471.jpg"
    assert found.images[0].origin == "train.json, row 17, image 1"
    assert found.answers == ("The back of the bus features an advertisement.",)


def test_a_row_without_an_image_is_text_only():
    assert example(row(), Reading()).images == ()
    for key in ("image", "images"):
        for empty in (None, []):
            assert example(row(**{key: empty}), Reading()).images == ()


def test_one_image_without_a_marker_is_put_before_the_first_question():
    assert texts(example(row("A?", "a", "B?", "b", image="x.png")))[0] == "<image>\nA?"


@pytest.mark.parametrize("value", ["x.png", ["x.png"]])
def test_images_is_read_like_image(value):
    plain, marked = (example(row(text, "a", images=value)) for text in ("A?", "A? <image>"))
    assert texts(plain) == texts(marked) == ["<image>\nA?", "a"]
    assert plain.images == marked.images == example(row("A?", "a", image="x.png")).images
    both = row("<image> or <image>?", "1", images=["a", "b"], image=None)
    assert [image.name for image in example(both).images] == ["a", "b"]


def test_several_images_stay_where_their_markers_are():
    found = example(row("<image> or <image>?", "1", "And\n<image>?", "2", image=["a", "b", "c"]))
    assert texts(found) == ["<image> or <image>?", "1", "<image>\nAnd\n?", "2"]
    assert [image.name for image in found.images] == ["a", "b", "c"]


def test_the_suffix_follows_every_question_once_on_its_own_line():
    suffix = "Answer the question using a single word or phrase."
    reading = Reading(Path("/images"), suffix)
    found = example(row("A?\n<image>", "a", f"B?\n{suffix}", "b", image="x"), reading)
    assert texts(found) == [f"<image>\nA?\n{suffix}", "a", f"B?\n{suffix}", "b"]


def test_references_are_the_answers():
    assert example(row(references=["this", "that"])).answers == ("this", "that")
    assert example(row(references=[])).answers == ("This.",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "`id` is neither text nor a whole number"),
        ({"id": True}, "`id` is neither"),
        ({"id": 1.0}, "`id` is neither"),
        ({"id": [SECRET]}, "`id` is neither"),
        ({"id": SECRET * 100}, "`id` must be printable and of at most 256"),
        ({"id": "\x1b[2J"}, "`id` must be printable"),
        ({"image": 5}, "`image` has a number but must be"),
        ({"images": [None]}, "`images` has null or missing but must be"),
        ({"image": [["x.png"]]}, "`image` has a list but must be"),
        ({"image": "x", "images": ["y"]}, "has both `image` and `images`; remove one"),
        ({"image": f"https://host/{SECRET}.png"}, r"image 1 is a URL \(`image`\)"),
        ({"image": f"file:///{SECRET}.png"}, "is a URL"),
        ({"conversations": None}, "`conversations` is missing; a row has `conversations`, `mess"),
        ({"conversations": []}, "`conversations` is an empty list but must be a list of turns"),
        ({"conversations": SECRET}, "`conversations` is text but must be a list of turns"),
        ({"conversations": [SECRET]}, r"`conversations\[0\]` is text but must be an object"),
        ({"conversations": [{"from": "human"}]}, r"\[0\].value` is null or missing but must be te"),
        ({"conversations": turns(SECRET, None)}, r"`conversations\[1\].value` is null or missing"),
        ({"conversations": turns(SECRET, 2)}, r"`conversations\[1\].value` is a number but must"),
        ({"conversations": turns(SECRET, ["a"])}, r"\[1\].value` is a list but must be text"),
        ({"conversations": [{"from": SECRET, "value": "x"}]}, r"\[0\].from` must be human or gpt"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"\[0\].from` must be human or"),
        (
            {"conversations": [{"from": "system", "value": SECRET}]},
            r"\[0\].from` is system but must be human or gpt; .*`model.system_prompt`",
        ),
        ({"conversations": turns(SECRET)}, r"\[0\].value` is the last turn, but an answer \(gpt\)"),
        ({"conversations": turns(SECRET, "  ")}, r"`conversations\[1\].value` is empty"),
        ({"conversations": turns(" ", SECRET)}, r"`conversations\[0\].value` is empty"),
        ({"conversations": turns(SECRET, "a")[::-1]}, r"\[0\].from` is gpt but must be human"),
        ({"conversations": turns(SECRET, "a <image>")}, r"\[1\].value` is an answer but holds"),
        ({"conversations": turns(f"<image>{SECRET}", "a")}, "has 1 image marker .* but 0 images"),
        ({"image": ["a", "b"]}, "has 0 image markers .* but 2 images"),
        ({"image": "a", "conversations": turns("<image><image>?", "a")}, "has 2 .* but 1 image"),
        ({"references": "one"}, "`references` must be a list of texts"),
        ({"references": ["\ud800"]}, "`references` must be a list of texts"),
        ({"conversations": turns("\udfff", SECRET)}, r"\[0\].value` is text with an unpaired surr"),
        ({"references": [5]}, "`references` must be a list of texts"),
        ({"system": SECRET}, "`system` is not read; remove it. .*`model.system_prompt`"),
    ],
)
def test_a_bad_row_is_named_by_file_and_row_and_not_quoted(change, message):
    with pytest.raises(DataError, match=f"train.json, row 17.*{message}") as error:
        example(row() | change)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("change", [{"id": None}, {}])
def test_a_row_without_an_id_is_its_number(change):
    found = row() | change
    if not change:
        del found["id"]
    assert example(found).id == "17"


def test_an_image_without_an_image_folder_is_an_error():
    with pytest.raises(DataError, match="row 17 has an image, but no image folder"):
        example(row(image="a"), Reading())


@pytest.fixture
def files(tmp_path):
    found = []
    for name, count in (("a.json", 3), ("b.jsonl", 2)):
        rows = [row(f"{name} {number}?", "yes", id=7) for number in range(count)]
        text = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
        found.append(RowFile(tmp_path / name))
    return found


def test_files_are_read_one_after_the_other_and_ids_are_unique(files):
    found = LlavaExamples(files, READING)
    expected = ["a.json 0?", "a.json 1?", "a.json 2?", "b.jsonl 0?", "b.jsonl 1?"]
    assert [texts(e)[0] for e in found] == expected
    assert [e.id for e in found] == ["1/1:7", "1/2:7", "1/3:7", "2/1:7", "2/2:7"]
    assert found[3].origin == found.origin(3) == "b.jsonl, row 1"
    assert found[-1].id == "2/2:7" and found[1:3] == [found[1], found[2]]
    with pytest.raises(IndexError):
        found[5]


def test_some_rows_in_any_order(files):
    found = LlavaExamples(files, READING, np.array([4, 0]))
    assert [e.id for e in found] == ["2/2:7", "1/1:7"]
    assert found.row(0)["conversations"][0]["value"] == "b.jsonl 1?"
    assert [e.id for e in found.select(np.array([1]))] == ["1/1:7"]
    assert [e.id for e in LlavaExamples(files[:1], READING)] == ["1:7", "2:7", "3:7"]


def test_examples_are_read_when_they_are_asked_for(files):
    found = LlavaExamples(files, READING)
    files[0].path.write_text("[]")
    assert found[4].id == "2/2:7"
    with pytest.raises(DataError, match="a.json has changed"):
        found[0]
