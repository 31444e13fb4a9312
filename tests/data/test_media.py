"""No row loses a picture silently: fields and markers that are not read are errors."""

import pytest

from pilot_flwr.data.llava import Reading, to_example
from pilot_flwr.data.media import unread_field, unread_marker
from pilot_flwr.errors import DataError

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]

LOST = {
    "image_path": "x.png",
    "image_url": "x",
    "image_file": ["x"],
    "imagePath": "x",
    "imagefile": "x",
    "image_2": "x",
    "Image": "x",
    "IMAGES": ["x"],
    "img": "x",
    "img_path": "x",
    "picture": {"bytes": "aGk=", "path": None},
    "photo": "x",
    "pixel_values": [[0.5]],
    "image_base64": "aGk=",
    "video": "a.mp4",
    "videos": ["a.mp4"],
    "audio": "a.wav",
    "audios": ["a.wav"],
    "xray": "scans/17.PNG",
    "slice": ["a.dcm", "b.dcm"],
    "scan": {"path": "a.nii.gz", "bytes": None},
    "mri": {"bytes": "aGk="},
    "content": "data:image/png;base64,aGk=",
    "coco_url": "http://host/y.jpg?x=1",
    "link": "https://host/a.PNG#top",
    "file_name": "000123",
    "filename": "train2017/000123",
    "coco_file_name": "000123",
    "frames": ["f1", "f2"],
    "screenshot": "s1",
    "choices": [["A", "a.png"]],
}

NESTED = {
    "meta.src.image": {"meta": {"src": {"image": "00012"}}},
    "views.img": {"views": [{"n": 1}, {"img": "00012"}]},
    "meta.file_name": {"meta": {"file_name": "00012"}},
}

HARMLESS = {
    "image_id": "17",
    "image_width": 640,
    "image_size": [640, 480],
    "image_source": "coco",
    "image_caption": "A dog.",
    "num_images": 1,
    "has_image": True,
    "videos": [],
    "video": None,
    "audio": "",
    "category": "default",
    "url": "https://host/page",
    "file": "train.json",
    "width": 3,
    "file_name": "train.json",
    "meta": {"src": {"image_id": "00012", "split": "train"}},
    "frames": 8,
    "title": "What is a.png? A file.",
}


@pytest.mark.parametrize("name", LOST)
def test_a_field_that_holds_a_medium_is_an_error_with_file_and_row(name):
    row = {"id": 1, "conversations": TURNS, name: LOST[name]}
    with pytest.raises(DataError, match=f"^a.json, row 3: `{name}` is not read. Images belong"):
        to_example(row, "3:", "a.json, row 3", Reading())


@pytest.mark.parametrize("name", NESTED)
def test_a_nested_field_that_holds_a_medium_is_an_error_unless_the_row_has_images(name):
    row = {"id": 1, "conversations": TURNS} | NESTED[name]
    with pytest.raises(DataError, match=f"^a.json, row 3: `{name}` is not read. Images belong"):
        to_example(row, "3:", "a.json, row 3", Reading())
    assert unread_field(NESTED[name], (), pictures=True) is None


@pytest.mark.parametrize("name", HARMLESS)
def test_a_field_that_only_describes_one_is_ignored(name):
    assert unread_field({name: HARMLESS[name]}, (), pictures=False) is None


def test_a_files_source_is_ignored_where_its_picture_is_read():
    assert unread_field({"file_name": "x.png"}, (), pictures=False) == "file_name"
    assert unread_field({"file_name": "x.png"}, (), pictures=True) is None
    assert unread_field({"image_2": "x.png"}, (), pictures=True) == "image_2"


MARKERS = """
<video> <Video> <IMAGE> <Image> <images> <img> <IMG> </img> <image/> <image_1> <image-2> <image1>
<|image|> <|image_1|> <|image_pad|> <|vision_start|> <|video_pad|> <image_placeholder> <ImageHere>
<IMG_CONTEXT> <start_of_image> <image_soft_token> <audio> <|AUDIO|> <speech> <__media__> <picture>
[IMG] [image] {image} {{image}} &lt;image&gt;
""".split()


NAMED = """
![](ok.png) ![alt](sub/ok.PNG) ![](https://host/a.jpg?x=1) ![](<ok.png>)
![](data:image/png;base64,aGk=)
<image:ok.png> <img=ok.png> <|image:ok.png|> <video:a.mp4> <image:"ok.png">
<image:http://h/a.jpg?x=1>
[image:ok.png] {image:ok.png} &lt;image:ok.png&gt; <screenshot:a.png>
""".split()


@pytest.mark.parametrize(
    "marker",
    [
        *MARKERS,
        *NAMED,
        *("<image 1>", "< image >", "<image id=1>", "<image: ok.png>", "<image ok.png>"),
        *("![a cat](ok.png)", '![](ok.png "a cat")', "[Image: sub/a cat.jpg]"),
    ],
)
def test_a_marker_that_marks_nothing_is_an_error(marker):
    for text in (marker, f"{marker}\nWhat?", f"<image> and {marker}: which?"):
        assert unread_marker(text, answer=False)
    turns = [{"from": "human", "value": f"{marker} What?"}, TURNS[1]]
    with pytest.raises(DataError, match=r"row 3: `conversations\[0\].value` has '"):
        to_example({"conversations": turns}, "3:", "a.json, row 3", Reading())


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat?",
        "<image>",
        "Is a < b or image > c?",
        '<img src="a.png">',
        "<b>bold</b> <source> <table>",
        "see [1] and [the image below]",
        "{name}",
        "a & b",
        "<img src=ok.png> <image src='ok.png'>",
        "[a link](ok.png) and ![](section)",
        "<image:loc> [image: a dog] {image: a.b}",
        "[see ok.png] <https://host/a.png>",
        "The image <of a dog>",
    ],
)
def test_other_text_is_text(text):
    assert unread_marker(text, answer=False) is None


def test_an_answer_may_explain_html_but_draws_nothing():
    assert unread_marker("Use the <video> element or <img>.", answer=True) is None
    assert unread_marker("<|image_pad|>", answer=True) == "<|image_pad|>"
    assert unread_marker("<image_1>", answer=True) == "<image_1>"
    assert unread_marker("Write ![](ok.png) or [image:ok.png].", answer=True) is None
    assert unread_marker("<image:ok.png>", answer=True) == "<image:ok.png>"


@pytest.mark.parametrize("part", ["![a](", "![](a ", "<image:", "<img ", "[image:a ", "![", "{"])
def test_a_long_text_of_half_markers_takes_no_time(part):
    """It would take minutes if the expression tried all ways to divide it."""
    assert unread_marker(part * 10_000, answer=False) is None
