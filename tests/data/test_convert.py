"""Small annotation files in each data set's format, and the expected rows."""

import gzip
import json
import math
import tracemalloc

import pytest
from PIL import Image

from pilot_flwr.cli.main import main
from pilot_flwr.data.converters import CONVERTERS, convert
from pilot_flwr.data.converters.common import Sources
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.llava import LlavaExamples, Reading
from pilot_flwr.errors import ConfigError, DataError
from pilot_flwr.metrics import METRICS

GQA = {
    "02930152": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    },
    "07333408": {
        "question": "What is on the white wall?",
        "imageId": "2375429",
        "answer": "pipe",
        "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
    },
}
OCR_VQA = {
    "761183272": {
        "imageURL": "http://ecx.images-amazon.com/images/I/61Y5cOdHJbL.jpg",
        "questions": ["Who wrote this book?", "What is the title of this book?"],
        "answers": ["Mom's Family Calendar", "Mom's Family Wall Calendar 2016"],
        "title": "Mom's Family Wall Calendar 2016",
        "authorName": "Sandra Boynton",
        "genre": "Calendars",
        "split": 1,
    },
    "1441125094": {
        "imageURL": "http://ecx.images-amazon.com/images/I/41.gif",
        "questions": ["Is this a fitness book?"],
        "answers": ["No"],
        "genre": "Law",
        "split": 3,
    },
}
COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "height": 480, "width": 640},
        {"id": 7, "file_name": "COCO_val2014_000000000007.jpg", "height": 480, "width": 640},
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 7, "id": 101, "caption": "A red bus. "},
        {"image_id": 9, "id": 102, "caption": "A cat on a mat."},
        {"image_id": 7, "id": 103, "caption": "The bus is\nred."},
    ],
}
KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000391895.jpg",
            "cocoid": 391895,
            "split": split,
            "sentences": [{"raw": f"{split} {n}", "tokens": []} for n in range(2)],
            "imgid": 0,
        }
        | ({"cocoid": number} if number else {})
        for number, split in enumerate(["test", "train", "restval", "val"])
    ],
    "dataset": "coco",
}
TEN = ["red", "red", "maroon", "red", "red", "dark red", "red", "red", "red", "red"]
VQA_QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "What color is the hat?", "question_id": 262148000}
    ],
}
VQA_ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_type": "what color is the",
            "multiple_choice_answer": "red",
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": n}
                for n, a in enumerate(TEN, start=1)
            ],
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
        }
    ],
}
TEXTVQA = {
    "dataset_type": "val",
    "data": [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "image_classes": ["Camera"],
            "question_id": 34602,
            "answers": ["nous les gosses", *["dakota"] * 8, "dakota digital"],
            "set_name": "val",
        }
    ],
}
PROBLEMS = {
    "1": {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
    },
    "2": {
        "question": "Which is a solid?",
        "choices": ["air", "stone"],
        "answer": 1,
        "hint": "Matter has states.",
        "image": None,
        "subject": "natural science",
    },
}
PID_SPLITS = {"train": ["2"], "val": [], "test": ["1"]}
BOXES = [
    {
        "image": "a.jpg",
        "width": 400,
        "height": 200,
        "expression": "the left dog",
        "bbox": [100.0, 50.0, 200.0, 100.0],
    }
]
FILES = {
    "gqa": ([GQA], []),
    "ocr_vqa": ([OCR_VQA], []),
    "coco_captions": ([COCO], []),
    "coco_karpathy": ([KARPATHY], []),
    "vqav2": ([VQA_ANNOTATIONS], [VQA_QUESTIONS]),
    "textvqa": ([TEXTVQA], []),
    "scienceqa": ([PROBLEMS], [PID_SPLITS]),
    "boxes": ([BOXES], []),
}
METRIC = {
    "gqa": "gqa",
    "ocr_vqa": "exact_match",
    "coco_captions": "cider_d",
    "coco_karpathy": "cider_d",
    "vqav2": "vqav2",
    "textvqa": "textvqa",
    "scienceqa": "scienceqa",
    "boxes": "grounding",
}


def write(folder, contents, kind):
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / f"{kind}-{number}.json")
        paths[-1].write_text(json.dumps(content), encoding="utf-8")
    return tuple(paths)


@pytest.fixture
def run(tmp_path):
    """Convert the tables above, or other data, and return the rows."""

    def run(name, split, *, annotations=None, questions=None, **options):
        first, second = FILES[name]
        skip = options.pop("skip_unusable", False)
        sources = Sources(
            write(tmp_path, first if annotations is None else annotations, "annotations"),
            write(tmp_path, second if questions is None else questions, "questions"),
            split,
            **options,
        )
        out = tmp_path / f"{split}.jsonl"
        run.report = convert(name, sources, out, skip_unusable=skip)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    return run


def talk(question, answer, image=True):
    human = f"<image>\n{question}" if image else question
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


def test_gqa(run):
    first = {
        "id": "02930152",
        "image": "2354786.jpg",
        "conversations": talk("Is the sky dark?", "yes"),
        "semantic": "attr",
        "structural": "verify",
        "detailed": "verifyAttr",
    }
    rows = run("gqa", "train")
    assert rows[0] == first
    assert [row["id"] for row in rows] == ["02930152", "07333408"]
    assert (run.report.rows, run.report.images, run.report.skipped) == (2, 2, {})


def test_references_of_a_scored_split(run):
    assert [row["references"] for row in run("gqa", "test")] == [["yes"], ["pipe"]]


def test_ocr_vqa(run):
    rows = run("ocr_vqa", "train")
    assert rows[1] == {
        "id": "761183272-1",
        "image": "761183272.jpg",
        "conversations": talk("What is the title of this book?", "Mom's Family Wall Calendar 2016"),
        "genre": "Calendars",
    }
    assert len(rows) == 2
    (only,) = run("ocr_vqa", "test")
    assert (only["id"], only["image"]) == ("1441125094-0", "1441125094.gif")
    assert (only["references"], only["genre"]) == (["No"], "Law")


REQUEST = "Provide a one-sentence caption for the provided image."


def test_coco_captions_are_a_row_each_for_training(run):
    rows = run("coco_captions", "train")
    assert rows == [
        {
            "id": key,
            "image": f"COCO_val2014_00000000000{key[0]}.jpg",
            "conversations": talk(REQUEST, caption),
        }
        for key, caption in [
            ("7-101", "A red bus."),
            ("9-102", "A cat on a mat."),
            ("7-103", "The bus is\nred."),
        ]
    ]
    assert run.report.images == 2


def test_coco_images_are_a_row_each_at_test(run):
    assert run("coco_captions", "test") == [
        {
            "id": "9",
            "image": "COCO_val2014_000000000009.jpg",
            "conversations": talk(REQUEST, "A cat on a mat."),
            "references": ["A cat on a mat."],
        },
        {
            "id": "7",
            "image": "COCO_val2014_000000000007.jpg",
            "conversations": talk(REQUEST, "A red bus."),
            "references": ["A red bus.", "The bus is\nred."],
        },
    ]


def test_an_empty_caption_is_no_reference_and_costs_no_image(run):
    """It counts as an unusable entry; the image keeps its other captions."""
    blank = changed(COCO, "annotations", 0, "caption", value=" ")
    with pytest.raises(DataError, match="image 7: The answer is empty"):
        run("coco_captions", "test", annotations=[blank])
    rows = run("coco_captions", "test", annotations=[blank], skip_unusable=True)
    assert [row["references"] for row in rows] == [["A cat on a mat."], ["The bus is\nred."]]
    assert rows[1]["conversations"][1]["value"] == "The bus is\nred."
    assert run.report.skipped == {"The answer is empty.": 1}


def test_an_image_of_empty_captions_is_left_out(run):
    both = changed(COCO, "annotations", 0, "caption", value="")
    both = changed(both, "annotations", 2, "caption", value="")
    (row,) = run("coco_captions", "val", annotations=[both], skip_unusable=True)
    assert row["id"] == "9" and run.report.skipped == {"The answer is empty.": 2}


def test_karpathys_empty_captions(run):
    blank = changed(KARPATHY, "images", 0, "sentences", 0, "raw", value="")
    (row,) = run("coco_karpathy", "test", annotations=[blank], skip_unusable=True)
    assert row["references"] == ["test 1"] and run.report.skipped == {"The answer is empty.": 1}


@pytest.mark.parametrize("prefix", ["val2014", "a/val2014/"])
def test_a_prefix_comes_before_every_image(run, prefix):
    found = run("coco_captions", "test", image_prefix=prefix)
    assert [row["image"] for row in found] == [
        f"{prefix.rstrip('/')}/COCO_val2014_00000000000{number}.jpg" for number in (9, 7)
    ]
    assert "image" not in run("scienceqa", "train", image_prefix=prefix)[0]


@pytest.mark.parametrize("prefix", ["/data", "..", "a/../..", "a\\..\\..", "\\a"])
def test_a_prefix_stays_in_the_image_folder(run, prefix):
    with pytest.raises(ConfigError, match="`--image-prefix` is .* but must be relative"):
        run("coco_captions", "test", image_prefix=prefix)


def test_karpathys_split(run):
    assert [row["id"] for row in run("coco_karpathy", "train")] == ["1-0", "1-1", "2-0", "2-1"]
    (only,) = run("coco_karpathy", "test")
    assert only["image"] == "val2014/COCO_val2014_000000391895.jpg"
    assert only["references"] == ["test 0", "test 1"]


def test_vqav2(run):
    columns = {"question_type": "what color is the", "answer_type": "other"}
    expected = {
        "id": "262148000",
        "image": "val2014/COCO_val2014_000000262148.jpg",
        "conversations": talk("What color is the hat?", "red"),
    }
    assert run("vqav2", "train") == [expected | columns]
    assert run("vqav2", "val") == [expected | {"references": TEN} | columns]


def test_textvqa(run):
    expected = {
        "id": "34602",
        "image": "003a8ae2ef43b901.jpg",
        "conversations": talk("what is the brand of this camera?", "dakota"),
    }
    assert run("textvqa", "train") == [expected]
    assert run("textvqa", "val") == [expected | {"references": TEXTVQA["data"][0]["answers"]}]


def test_scienceqa(run):
    assert run("scienceqa", "train") == [
        {
            "id": "2",
            "conversations": talk(
                "Context: Matter has states.\nQuestion: Which is a solid?\n"
                "Options: (A) air (B) stone",
                "B",
                image=False,
            ),
            "subject": "natural science",
        }
    ]
    (only,) = run("scienceqa", "test")
    assert only["image"] == "test/1/image.png"
    assert only["conversations"][0]["value"].startswith("<image>\nContext: N/A\nQuestion: Which")
    assert (only["references"], only["grade"]) == (["A"], "grade2")


@pytest.mark.parametrize(
    ("padded", "answer"),
    [
        (False, "[0.25, 0.25, 0.75, 0.75]"),
        (True, "[0.25, 0.38, 0.75, 0.62]"),  # 400 x 400, 100 rows above: 150/400 and 250/400
    ],
)
def test_boxes(run, padded, answer):
    (row,) = run("boxes", "train", padded=padded)
    assert row["conversations"][1]["value"] == answer
    assert row["conversations"][0]["value"] == (
        "<image>\nPlease provide the bounding box coordinate of the region this sentence "
        "describes: the left dog"
    )


@pytest.mark.parametrize("box", [[100, 50, 1.5, 90], [100, 50, 90, 0.5]])
def test_a_box_without_area_at_two_decimals_is_nothing_to_train_on(run, box):
    small = changed(BOXES, 0, "bbox", value=box)
    with pytest.raises(DataError, match="entry 1: `bbox` has no area at two decimals"):
        run("boxes", "train", annotations=[small])
    (row,) = run("boxes", "test", annotations=[small])  # scored against six decimals
    assert METRICS["grounding"].score(row["references"], [row["references"]]).mean == 1


def test_padded_boxes_are_where_the_padded_image_has_them(run, tmp_path):
    from pilot_flwr.data.images import ImageFile

    image = Image.new("RGB", (75, 30))
    image.paste((255, 255, 255), (15, 6, 45, 21))
    image.save(tmp_path / "a.png")
    box = {"image": "a.png", "width": 75, "height": 30, "bbox": [15, 6, 30, 15]}
    (row,) = run("boxes", "test", annotations=[[box | {"expression": "it"}]])
    square = ImageFile(tmp_path, "a.png", "", (0, 0, 0)).read()
    seen = [edge / 75 for edge in square.getbbox()]
    assert json.loads(row["references"][0]) == pytest.approx(seen, abs=1e-6)


@pytest.mark.parametrize("name", CONVERTERS)
def test_rows_are_read_back_and_their_references_suit_the_metric(name, run, tmp_path):
    split = "test"
    rows = run(name, split)
    for row in rows:
        if "image" in row:
            path = tmp_path / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3)).save(path)
    examples = LlavaExamples([RowFile(tmp_path / f"{split}.jsonl")], Reading(tmp_path))
    assert len(examples) == len(rows)
    for example, row in zip(examples, rows, strict=True):
        assert example.id.endswith(row["id"])
        assert example.answers == tuple(row["references"])
        assert [image.read().size for image in example.images] == [(4, 3)] * ("image" in row)
    score = METRICS[METRIC[name]].score(
        [example.turns[-1].text for example in examples],
        [example.answers for example in examples],
    )
    if name not in ("coco_captions", "coco_karpathy", "textvqa", "vqav2"):
        assert score.mean == 1


@pytest.mark.parametrize("name", CONVERTERS)
def test_the_same_files_give_the_same_bytes(name, run, tmp_path):
    run(name, "test")
    first = (tmp_path / "test.jsonl").read_bytes()
    (tmp_path / "test.jsonl").unlink()
    run(name, "test")
    assert (tmp_path / "test.jsonl").read_bytes() == first


def changed(content, *where, value):
    """Return a copy of a file's content with one field set, or without it (None)."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    if value is None:
        del inner[where[-1]]
    return copy


BAD_ENTRIES = [
    ("gqa", GQA, ("02930152", "answer"), None, "question 02930152: `answer` is missing"),
    ("gqa", GQA, ("02930152", "question"), " ", "`question` is missing, empty or not text"),
    ("gqa", GQA, ("02930152", "imageId"), ["7"], "`imageId` is missing, empty or not text"),
    ("gqa", GQA, ("02930152", "question"), "An <image>?", "The question holds '<image>'"),
    ("gqa", GQA, ("02930152",), 3, "is missing, empty or not text"),
    ("ocr_vqa", OCR_VQA, ("761183272", "answers", 0), "", "question 1: `answer` is missing"),
    (
        "coco_captions",
        COCO,
        ("annotations", 0, "caption"),
        None,
        "`captions` must be a list of texts",
    ),
    ("vqav2", VQA_ANNOTATIONS, ("annotations", 0, "question_id"), 5, "`question` is missing"),
    ("textvqa", TEXTVQA, ("data", 0, "answers"), None, "`answers` must be a list of texts"),
    ("scienceqa", PROBLEMS, ("2", "answer"), 2, "`answer` must be the number of one of"),
    ("scienceqa", PROBLEMS, ("2", "choices"), [], "`choices` must be a list of texts"),
    ("boxes", BOXES, (0, "bbox"), [1, 2, 3], "entry 1: `bbox` must be"),
    ("boxes", BOXES, (0, "bbox"), [10, 10, 0, 5], "`bbox` has no area"),
    ("boxes", BOXES, (0, "bbox"), [390, 10, 20, 5], "`bbox` exceeds the image"),
    ("boxes", BOXES, (0, "width"), 0, "`width` must be a whole number"),
    ("boxes", BOXES, (0, "width"), 10**400, "`width` must be a whole number"),
    ("boxes", BOXES, (0, "bbox"), [math.nan, 2, 30, 20], "`bbox` must be"),
    ("boxes", BOXES, (0, "bbox"), [1, 2, math.nan, 20], "`bbox` must be"),
    ("boxes", BOXES, (0, "bbox"), [1, 2, math.inf, 20], "`bbox` must be"),
    ("boxes", BOXES, (0, "bbox"), [1, 2, 10**400, 20], "`bbox` must be"),
    ("boxes", BOXES, (0, "category"), "c\ud800", "entry 1: A text has an unpaired surrogate"),
    ("boxes", BOXES, (0, "expression"), "c\ud800", "is text with an unpaired surrogate"),
    ("boxes", BOXES, (0, "expression"), "a <video> cat", "entry 1: .* has '<video>', which is not"),
    ("boxes", BOXES, (0, "image"), "c\udc00.jpg", "entry 1: A text has an unpaired surrogate"),
    ("boxes", BOXES, (0, "image"), "http://x.org/1.jpg", "entry 1: image 1 is a URL"),
    ("boxes", BOXES, (0, "id"), "1\0", "entry 1: `id` must be printable"),
    ("gqa", GQA, ("02930152", "imageId"), "2\0", "02930152: The image's name has a NUL"),
    ("gqa", GQA, ("02930152", "answer"), "c\ud800", "is text with an unpaired surrogate"),
    ("textvqa", TEXTVQA, ("data", 0, "question"), "[img] what?", r"has '\[img\]', which is not"),
    ("scienceqa", PROBLEMS, ("2", "hint"), "<image_1>", "has '<image_1>', which is not"),
    ("coco_captions", COCO, ("annotations", 0, "caption"), "<image_1>", "has '<image_1>', which"),
]


@pytest.mark.parametrize(("name", "content", "where", "value", "message"), BAD_ENTRIES)
def test_an_unusable_entry_is_named(name, content, where, value, message, run, tmp_path):
    with pytest.raises(DataError, match=message):
        run(name, "train", annotations=[changed(content, *where, value=value)])
    assert [path.name for path in tmp_path.iterdir() if "jsonl" in path.name] == []


def test_references_are_texts_that_can_be_read_back(run):
    bad = changed(TEXTVQA, "data", 0, "answers", 0, value="nous\ud800")
    with pytest.raises(DataError, match="question 34602: `references` must be a list of texts"):
        run("textvqa", "val", annotations=[bad])


def test_reasons_do_not_name_the_entry(run):
    bad = changed(GQA, "02930152", "question", value="A <video>?")
    assert len(run("gqa", "train", annotations=[bad], skip_unusable=True)) == len(GQA) - 1
    (reason,) = run.report.skipped
    assert reason.startswith("`conversations[0].value` has '<video>', which is not")


def test_unusable_entries_are_left_out_and_counted_if_asked_for(run):
    bad = changed(GQA, "02930152", "answer", value="")
    rows = run("gqa", "train", annotations=[bad], skip_unusable=True)
    assert [row["id"] for row in rows] == ["07333408"]
    assert run.report.skipped == {"`answer` is missing, empty or not text.": 1}


@pytest.mark.parametrize(
    ("name", "annotations", "questions", "message"),
    [
        ("gqa", [[1]], [], "annotations-0.json must hold an object"),
        ("gqa", [{}], [], "annotations-0.json holds no entry"),
        ("gqa", [GQA, GQA], [], "the id '02930152' came before"),
        ("ocr_vqa", [changed(OCR_VQA, "761183272", "split", value=4)], [], "`split` is 4 but must"),
        (
            "ocr_vqa",
            [changed(OCR_VQA, "761183272", "answers", value=["one"])],
            [],
            "`questions` and `answers` must be lists of one length",
        ),
        ("coco_captions", [changed(COCO, "images", value=None)], [], "list `images`"),
        ("coco_captions", [changed(COCO, "images", 1, "id", value=8)], [], "image 7 is not among"),
        ("boxes", [{"data": []}], [], "must hold a list"),
        ("scienceqa", [PROBLEMS], [{"train": ["5"]}], "problem '5' of `train` is in no file"),
        ("scienceqa", [PROBLEMS], [{"test": ["1"]}], "has no list `train`"),
        ("vqav2", [changed(VQA_ANNOTATIONS, "data_subtype", value=None)], None, "`data_subtype`"),
    ],
)
def test_a_file_that_is_not_as_it_must_be(name, annotations, questions, message, run):
    with pytest.raises(DataError, match=message):
        run(name, "train", annotations=annotations, questions=questions)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_annotations_are_read_by_the_rules_for_rows(encoding, pack, tmp_path):
    path, out = tmp_path / "a.json", tmp_path / "out.jsonl"
    text = json.dumps(COCO).replace('"images"', '"score": NaN, "n": 12345, "images"', 1)
    path.write_bytes(pack(text.encode(encoding)))
    assert convert("coco_captions", Sources((path,)), out).rows == len(COCO["annotations"])


QUESTION = json.dumps(next(iter(GQA.values())))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": {"answer": "a", "answer": "b"}}', r"entry 1 has the key 'answer' twice"),
        (f'{{"1": {QUESTION}, "1": {QUESTION}}}', "a.json has the key '1' twice"),
        (f'{{"1": {QUESTION}}} {{}}', "a.json continues after its value, at byte"),
        ("{'1': {}}", "entry 1 is broken JSON at byte 1"),
        ("version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
        ("<html>", "is an HTML page"),
    ],
)
def test_annotations_that_cannot_be_read_are_named(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        convert("gqa", Sources((tmp_path / "a.json",)), tmp_path / "out.jsonl")


def test_an_absolute_image_name_is_refused(run):
    bad = changed(COCO, "images", 0, "file_name", value="/data/1.jpg")
    with pytest.raises(DataError, match="image's name is absolute"):
        run("coco_captions", "train", annotations=[bad])


def test_a_split_without_rows_is_an_error(run):
    with pytest.raises(DataError, match="There is no row for split 'val'"):
        run("ocr_vqa", "val")


@pytest.mark.parametrize("text", ["", "{", '{"a": {', "nothing", '{"a": 1} {'])
def test_a_torn_file_is_an_error(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json"):
        convert("gqa", Sources((tmp_path / "a.json",)), tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]


def test_arguments_that_do_not_fit(tmp_path):
    gqa, out = Sources((tmp_path / "a.json",)), tmp_path / "out.jsonl"
    for name, sources, message in [
        ("coco", gqa, "`NAME` is 'coco' but must be one of gqa, ocr_vqa"),
        ("gqa", Sources(()), r"`--annotations` is empty but must name \*_questions.json"),
        ("vqav2", gqa, "`--questions` is empty but must name v2_OpenEnded"),
        ("gqa", Sources((out,), (out,)), "`--questions` is given, but 'gqa' has only"),
        ("gqa", Sources((out,), split="dev"), "`--split` is 'dev' but must be one of train, val"),
    ]:
        with pytest.raises(ConfigError, match=message):
            convert(name, sources, out)
    with pytest.raises(DataError, match=r"a\.json cannot be opened \(No such file"):
        convert("gqa", gqa, out)
    out.write_text("mine")
    with pytest.raises(ConfigError, match="must be a new file: this one exists"):
        convert("gqa", gqa, out)
    assert out.read_text() == "mine"


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(number):
        path, out = tmp_path / f"{number}.json", tmp_path / f"{number}.jsonl"
        long = GQA["07333408"] | {"semanticStr": "x" * 2000}
        path.write_text(json.dumps({str(n): long for n in range(number)}))
        tracemalloc.start()
        convert("gqa", Sources((path,)), out)
        kept = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return kept

    assert peak(2000) < peak(200) + 2000 * 500  # of 2,000 further bytes a question


def test_the_command(tmp_path, capsys):
    (path,) = write(tmp_path, [changed(GQA, "02930152", "answer", value="")], "gqa")
    out = tmp_path / "rows.jsonl"
    words = ["data", "convert", "gqa", "--annotations", str(path), "--split", "train"]
    words += ["--out", str(out)]
    assert main(words) == 1
    assert "`answer` is missing" in capsys.readouterr().err
    assert main([*words, "--skip-unusable", "--image-prefix", "gqa"]) == 0
    assert json.loads(out.read_text())["image"] == "gqa/2375429.jpg"
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 rows about 1 images",
        "skipped 1: `answer` is missing, empty or not text.",
    ]
    assert main([*words, "--skip-unusable"]) == 2


def test_the_commands_help_names_every_data_set(capsys):
    assert main(["data", "convert", "--help"]) == 0
    described = capsys.readouterr().out
    assert ", ".join(CONVERTERS) in " ".join(described.split())
