"""Conversations as most tools write them are read as LLaVA's; what is doubtful is refused."""

from pathlib import Path

import pytest

from pilot_flwr.data.llava import Reading, row_id, to_example
from pilot_flwr.data.turns import UNANSWERED
from pilot_flwr.errors import DataError

READING = Reading(Path("/images"))
TEXT = {"type": "text", "text": "What?"}
PLACE = {"type": "image"}
ANSWER = {"role": "assistant", "content": "two"}


def read(row, **options):
    return to_example(row, "3:", "a.json, row 3", READING, **options)


def chat(*contents, role="user"):
    """Messages of a user and an assistant in turn."""
    roles = (role, "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


EXPECTED = read(
    {
        "id": 1,
        "image": "x.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "two"},
        ],
    }
)

SAME = {
    "marker": {"images": ["x.png"], "messages": chat("<image>What?", "two")},
    "no marker": {"image": "x.png", "messages": chat("What?", "two")},
    "role, content": {"image": "x.png", "conversations": chat("<image>\nWhat?", "two")},
    "from, value": {
        "image": "x.png",
        "messages": [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "two"}],
    },
    "parts": {
        "images": ["x.png"],
        "messages": chat([PLACE, TEXT], [{"type": "text", "text": "two"}]),
    },
    "parts with nulls": {
        "images": ["x.png"],
        "messages": [
            {
                "role": "user",
                "name": None,
                "content": [
                    {"index": None, "text": "What?", "type": "text"},
                    {"index": 0, "text": None, "type": "image"},
                ],
            },
            {"role": "assistant", "content": "two", "tool_calls": None},
        ],
    },
    "part's image": {"messages": chat([{"type": "image", "image": "x.png"}, TEXT], "two")},
    "part's path": {"messages": chat([{"type": "image", "path": "x.png"}, TEXT], "two")},
    "image_url": {
        "messages": chat([TEXT, {"type": "image_url", "image_url": {"url": "x.png"}}], "two")
    },
    "untyped parts": {"messages": chat([{"image": "x.png"}, {"text": "What?"}], "two")},
    "text among parts": {"images": "x.png", "messages": chat([PLACE, "What?"], "two")},
    "prompt": {"image": "x.png", "prompt": "What?", "completion": "two"},
    "prompt of turns": {
        "images": ["x.png"],
        "prompt": chat([PLACE, TEXT]),
        "completion": [ANSWER],
    },
    "weights": {
        "image": "x.png",
        "weight": 1,
        "conversations": [
            chat("What?")[0] | {"loss_mask": 0, "name": "x"},
            ANSWER | {"weight": 1.0, "loss_mask": 1, "train": True},
        ],
    },
    "null conversations": {
        "conversations": None,
        "image": "x.png",
        "messages": chat("What?", "two"),
        "prompt": None,
    },
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_is_read_as_llavas(form):
    found = read(SAME[form])
    assert (found.turns, found.images) == (EXPECTED.turns, EXPECTED.images)
    assert found.id == "3"


def test_several_pictures_among_parts_stay_in_their_places():
    parts = [{"type": "image", "image": "a"}, TEXT, {"type": "image", "image": "b"}]
    found = read({"messages": chat(parts, "two")})
    assert found.turns[0].text == "<image>\nWhat?\n<image>"
    assert [image.name for image in found.images] == ["a", "b"]


BAD = [
    (chat("What?", "two", role="tool"), r"messages\[0\].role` must be user or assistant"),
    (
        chat("Be brief.", "two", role="system"),
        r"\[0\].role` is system but must be user or ass.*mod",
    ),
    (chat("What?", "two")[::-1], r"`messages\[0\].role` is assistant but must be user"),
    (chat("What?", "two", "Why?"), r"`messages\[2\].content` is the last turn, but an .*\(assist"),
    (chat("What?", None), r"`messages\[1\].content` is null or missing but must be text or a list"),
    (chat("What?", []), r"`messages\[1\].content` is an empty list but must be"),
    (chat("What?", " "), r"`messages\[1\].content` is empty"),
    (chat("What?", 2), r"`messages\[1\].content` is a number but must"),
    (chat([{"type": "text"}], "two"), r"content\[0\].text` is null or missing but must be text"),
    (chat([5], "two"), r"`messages\[0\].content\[0\]` is a number but must be an object"),
    (chat([{"type": "video", "video": "a.mp4"}], "two"), r"\[0\].type` must be text, image or"),
    (chat([{"type": "input_audio"}], "two"), r"\[0\].type` must be text, image or image_url"),
    (chat([TEXT | {"image": "x.png"}], "two"), r"content\[0\].image` is not read"),
    (chat([PLACE | {"image": "x", "text": "y"}], "two"), r"\[0\]` must hold one image and no te"),
    (chat([PLACE, TEXT], "two"), "has 1 image marker .* but 0 images"),
    (chat("What?", [PLACE]), r"`messages\[1\].content` is an answer but holds an image marker"),
    (chat("What?", "<|image_pad|>"), r"`messages\[1\].content` has '<|image_pad|>'"),
    ([{"role": "user", "content": "A?", "image": "x"}, ANSWER], r"messages\[0\].image` is not rea"),
    (
        [*chat("A?"), ANSWER | {"tool_calls": [{"name": "f"}]}],
        r"`messages\[1\].tool_calls` is not read: tool calls and reasoning are not supported. Rem",
    ),
    ([*chat("A?"), ANSWER | {"weight": 0}], r"messages\[1\].weight` is not supported: every answ"),
    *(
        ([*chat("A?"), ANSWER | mask], rf"messages\[1\].{[*mask][0]}` is not supported: every an")
        for mask in (
            *({"loss_mask": 0}, {"loss_mask": [1, 0]}, {"mask": 0}, {"mask": True}),
            *({"weight": 0.5}, {"loss": False}, {"training": False}, {"loss_scale": 2}),
        )
    ),
    (chat([{"text": "A?", "image_2": "x"}], "two"), r"content\[0\].image_2` is not read"),
    ([{"role": "user", "value": "A?"}, ANSWER], r"`messages\[0\]` mixes `from`, `value` with"),
    ({"role": "user"}, "`messages` is an object but must be a list of turns"),
    ([None], r"`messages\[0\]` is null or missing but must be an object"),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_a_doubtful_message_is_named_by_file_row_and_field(messages, message):
    with pytest.raises(DataError, match=f"^a.json, row 3.*{message}"):
        read({"messages": messages})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": chat("A?", "b"), "conversations": []}, "has both `conversations` and `mess"),
        ({"messages": chat("A?", "b"), "prompt": "A?"}, "has both `messages` and `prompt`; rem"),
        (
            {"conversations": chat("A?", "b"), "completion": "c"},
            "has both `conv.* and `completion`",
        ),
        *(
            (
                {"prompt": "A?", "completion": "b"} | field,
                f": `{[*field][0]}` is not read; {remedy}",
            )
            for field, remedy in (
                ({"system": "Be brief."}, "remove it. `model.system_prompt` sets"),
                ({"system_prompt": "Be brief."}, "remove it"),
                ({"functions": [{"name": "f"}]}, "remove it"),
                ({"history": [["A?", "b"]]}, "write its turns into the conversation"),
            )
        ),
        *(
            ({"prompt": "A?", "completion": "b"} | field, f"`{[*field][0]}` is not supported: eve")
            for field in ({"weight": 0.0}, {"weight": 0.5}, {"loss_mask": [0]}, {"loss_weight": 2})
        ),
        ({"prompt": "A?"}, "`prompt` is the last turn, but an answer"),
        ({"completion": "b"}, "`conversations` is missing; a row has"),
        ({"instruction": "A?", "output": "b"}, "`conversations` is missing; a row has"),
        ({"text": "A corpus."}, "`conversations` is missing; a row has"),
        ({"question_id": 1, "text": "What?"}, "`text` is the last turn, but an answer"),
        (
            {"image": "y", "messages": chat([{"type": "image", "image": "x"}], "b")},
            r"has images both in `messages\[0\].content\[0\].image` and in `images`",
        ),
        (
            {"messages": chat([PLACE, {"type": "image", "image": "x"}, TEXT], "b")},
            "has images both in",
        ),
        (
            {"images": ["x", "y"], "messages": chat([PLACE | {"index": 1}, PLACE, TEXT], "b")},
            r"`messages\[0\].content\[0\].index` must be 0",
        ),
    ],
)
def test_a_doubtful_row_is_refused(row, message):
    with pytest.raises(DataError, match=f"^a.json, row 3.*{message}"):
        read(row)


QUESTION = [{"from": "human", "value": "What?"}]

UNANSWERED_ROWS = {
    "none": {"conversations": QUESTION},
    "empty": {"conversations": [*QUESTION, {"from": "gpt", "value": ""}]},
    "blank": {"conversations": [*QUESTION, {"from": "gpt", "value": " \n"}]},
    "null": {"conversations": [*QUESTION, {"from": "gpt", "value": None}]},
    "absent": {"conversations": [*QUESTION, {"from": "gpt"}]},
    "message": {"messages": chat("What?", None)},
    "parts": {"messages": chat("What?", [])},
    "empty part": {"messages": chat("What?", [{"type": "text", "text": ""}])},
    "prompt": {"prompt": "What?"},
    "completion": {"prompt": "What?", "completion": ""},
    "empty completion": {"prompt": chat("What?"), "completion": []},
    "evaluation": {"question_id": 7, "text": "What?", "category": "default"},
}


@pytest.mark.parametrize("form", UNANSWERED_ROWS)
@pytest.mark.parametrize("images", [{}, {"image": "x.png"}])
def test_a_question_may_lack_its_answer(form, images):
    row = UNANSWERED_ROWS[form] | images
    found = read(row, answered=False)
    front = "<image>\n" if images else ""
    assert [turn.text for turn in found.prompt] == [f"{front}What?"]
    assert found.turns[-1] is UNANSWERED and len(found.images) == len(images)
    with pytest.raises(DataError, match="^a.json, row 3"):
        read(row)


def test_an_answer_that_is_there_is_kept():
    assert read(SAME["parts"], answered=False).turns == EXPECTED.turns
    with pytest.raises(DataError, match="has no question"):
        read({"conversations": [{"from": "gpt", "value": ""}]}, answered=False)


@pytest.mark.parametrize(
    "answer",
    [
        [{"type": "image", "image": "x.png"}],
        [PLACE],
        [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": "x.png"}}],
        [{"path": "x.png"}],
    ],
)
def test_an_answer_that_is_only_an_image_is_not_taken_for_a_missing_one(answer):
    with pytest.raises(DataError, match=r"^a.json, row 3: `messages\[1\].content"):
        read({"messages": chat("What?", answer)}, answered=False)


def test_the_id_of_an_evaluation_row():
    row = UNANSWERED_ROWS["evaluation"]
    assert row_id(row) == 7 and row_id(row | {"id": "a"}) == "a" and row_id({}) is None
    assert read(row, answered=False).id == "3:7"
