"""Converters of questions with short answers: GQA, OCR-VQA, VQAv2, TextVQA, ScienceQA.

Each data set has a function that yields its entries, and one that makes a row of an entry. Rows
of a test split have `references`: one answer, or the ten of VQAv2 and TextVQA.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pilot_flwr.data.converters.common import (
    Entry,
    Row,
    Sources,
    Unusable,
    as_fields,
    elements,
    field,
    member,
    members,
    optional,
    texts,
    to_row,
)
from pilot_flwr.errors import DataError

OCR_VQA_SPLITS = {"train": 1, "val": 2, "test": 3}
LETTERS = "ABCDE"
NO_CONTEXT = "N/A"  # LLaVA's, for a ScienceQA question without a hint


def gqa_entries(sources: Sources) -> Iterator[Entry]:
    """Yield the questions of GQA's ``*_questions.json``: an object by question id."""
    for path in sources.annotations:
        for key, value in members(path):
            yield Entry(f"{path}, question {key}", key, as_fields(value))


def gqa_row(entry: Entry, sources: Sources) -> Row:
    """Return a GQA question's row; its columns are the question's types."""
    columns = ("types.semantic", "types.structural", "types.detailed")
    return to_row(entry, sources, f"{field(entry, 'imageId')}.jpg", columns=columns)


def ocr_vqa_entries(sources: Sources) -> Iterator[Entry]:
    """Yield the split's questions of OCR-VQA's ``dataset.json``: an object by book."""
    for path in sources.annotations:
        for key, value in members(path):
            book = as_fields(value)
            origin = f"{path}, book {key}"
            if book.get("split") not in OCR_VQA_SPLITS.values():
                raise DataError(
                    f"{origin}: `split` is {book.get('split')!r} but must be 1, 2 or 3."
                )
            if book["split"] != OCR_VQA_SPLITS[sources.split]:
                continue
            questions, answers = book.get("questions"), book.get("answers")
            if not isinstance(questions, list) or not isinstance(answers, list):
                raise DataError(f"{origin}: `questions` and `answers` must be lists.")
            if len(questions) != len(answers):
                raise DataError(f"{origin}: `questions` and `answers` must be lists of one length.")
            for number, pair in enumerate(zip(questions, answers, strict=True)):
                fields = {**book, "book": key, "question": pair[0], "answer": pair[1]}
                yield Entry(f"{origin}, question {number + 1}", f"{key}-{number}", fields)


def ocr_vqa_row(entry: Entry, sources: Sources) -> Row:
    """Return an OCR-VQA question's row; its column is the book's genre.

    The image has the name that the data set's own script gives it: the book, with the suffix of
    its address.
    """
    suffix = PurePosixPath(urlsplit(field(entry, "imageURL")).path).suffix or ".jpg"
    return to_row(entry, sources, field(entry, "book") + suffix, columns=("genre",))


def vqav2_entries(sources: Sources) -> Iterator[Entry]:
    """Yield VQAv2's annotations, each with the text of its question."""
    asked: dict[str, Any] = {}
    for path in sources.questions:
        for fields in elements(path, "questions"):
            asked[str(fields.get("question_id"))] = fields.get("question")
    for path in sources.annotations:
        subtype = member(path, "data_subtype")
        for fields in elements(path, "annotations"):
            key = str(fields.get("question_id"))
            fields |= {"question": asked.get(key), "subtype": subtype}
            yield Entry(f"{path}, question {key}", key, fields)


def vqav2_row(entry: Entry, sources: Sources) -> Row:
    """Return a VQAv2 question's row: the most common answer, and at test all ten.

    The image is in COCO's folder of the subtype, such as ``val2014``.
    """
    number, subtype = field(entry, "image_id"), field(entry, "subtype")
    return to_row(
        entry,
        sources,
        f"{subtype}/COCO_{subtype}_{number.zfill(12)}.jpg",
        answer=field(entry, "multiple_choice_answer"),
        references=texts(entry, "answers", "answer") if sources.scored else (),
        columns=("question_type", "answer_type"),
    )


def textvqa_entries(sources: Sources) -> Iterator[Entry]:
    """Yield the questions of ``TextVQA_*.json``: the list `data`."""
    for path in sources.annotations:
        for fields in elements(path, "data"):
            key = str(fields.get("question_id"))
            yield Entry(f"{path}, question {key}", key, fields)


def textvqa_row(entry: Entry, sources: Sources) -> Row:
    """Return a TextVQA question's row: the most common answer, and at test all ten."""
    answers = texts(entry, "answers")
    answer = Counter(answers).most_common(1)[0][0]  # of several, the first
    image = f"{field(entry, 'image_id')}.jpg"
    return to_row(entry, sources, image, answer=answer, references=answers)


def scienceqa_entries(sources: Sources) -> Iterator[Entry]:
    """Yield the split's problems of ScienceQA, in the order of ``pid_splits.json``."""
    problems: dict[str, Any] = {}
    for path in sources.annotations:
        problems.update(members(path))
    for path in sources.questions:
        splits = dict(members(path))
        if not isinstance(splits.get(sources.split), list):
            raise DataError(f"{path} has no list `{sources.split}`.")
        for key in map(str, splits[sources.split]):
            if key not in problems:
                raise DataError(f"{path}: problem {key!r} of `{sources.split}` is in no file.")
            yield Entry(f"problem {key}", key, as_fields(problems[key]))


def scienceqa_row(entry: Entry, sources: Sources) -> Row:
    """Return a ScienceQA problem's row; the answer is the option's letter.

    Context, question and options are joined as in LLaVA's ``CQM`` form. The image is in the data
    set's folder for the split and the problem.
    """
    choices = texts(entry, "choices")
    right = entry.fields.get("answer")
    if not isinstance(right, int) or not 0 <= right < len(choices) <= len(LETTERS):
        raise Unusable(entry.origin, "`answer` must be the number of one of at most 5 choices.")
    options = " ".join(f"({LETTERS[n]}) {choice}" for n, choice in enumerate(choices))
    context = optional(entry, "hint").get("hint", NO_CONTEXT)
    image = None
    if entry.fields.get("image") is not None:
        image = f"{sources.split}/{entry.id}/{field(entry, 'image')}"
    return to_row(
        entry,
        sources,
        image,
        question=f"Context: {context}\nQuestion: {field(entry, 'question')}\nOptions: {options}",
        answer=LETTERS[right],
        columns=("subject", "topic", "category", "grade"),
    )
