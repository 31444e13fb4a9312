"""Soft accuracy against the answers of ten annotators: VQAv2 and TextVQA.

An answer counts in full if at least three annotators gave it. To be comparable with the accuracy
of a human, each annotator is left out in turn, and the ten figures are averaged.

Normalisation is that of the official VQA script, which TextVQA's (M4C's) extends. To add a data
set of this kind, combine `soft_accuracy` with the normalisation of its own script.
"""

import re
from collections.abc import Sequence

from pilot_flwr.errors import DataError

ANNOTATORS = 10
ENOUGH = 3
"""Annotators who must agree with an answer for it to count in full."""

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten".split(), start=0
    )
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Without "I'm" and the like: texts are in lower case when they are looked up.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
""".split()


def _without_one_apostrophe() -> dict[str, str]:
    """Return the contraction that each form with one apostrophe missing stands for."""
    forms = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTED
        for place, letter in enumerate(word)
        if letter == "'"
    }
    return forms | {"somebody'd": "somebodyd"}  # so in both official scripts


CONTRACTIONS = _without_one_apostrophe()


def vqav2(prediction: str, references: Sequence[str]) -> float:
    """Return the VQAv2 accuracy of a prediction, in [0, 1].

    As in the official script, the annotators' answers, which the data set holds in normalised
    form, only have their punctuation treated, and only if they are not all the same.

    Raises
    ------
    DataError
        There are not ten references.
    """
    answers = list(references)
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    said = prediction.replace("\n", " ").replace("\t", " ").strip()
    return soft_accuracy(replace_words(strip_punctuation(said)), answers)


def textvqa(prediction: str, references: Sequence[str]) -> float:
    """Return the TextVQA accuracy of a prediction, in [0, 1].

    Raises
    ------
    DataError
        There are not ten references.
    """
    return soft_accuracy(textvqa_form(prediction), [textvqa_form(r) for r in references])


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the mean over the annotators i of ``min(1, #{j != i: reference_j = answer} / 3)``.

    Raises
    ------
    DataError
        As `check_annotators`.
    """
    check_annotators(references)
    matches = [reference == answer for reference in references]
    left_out = [min(1.0, (sum(matches) - match) / ENOUGH) for match in matches]
    return sum(left_out) / ANNOTATORS


def check_annotators(references: Sequence[str]) -> None:
    """Raise `DataError` unless there are ten references."""
    if len(references) != ANNOTATORS:
        raise DataError(
            f"A question has {len(references)} reference answers but must have {ANNOTATORS} to "
            "be scored by VQA accuracy, one per annotator."
        )


def strip_punctuation(text: str) -> str:
    """Return `text` without punctuation, as the VQA script removes it.

    A mark is removed if anywhere in the text it stands beside a blank, or if the text has a
    number with a comma; otherwise a blank takes its place. A period goes unless a digit follows.
    """
    joined = _DIGITS_WITH_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or beside_blank else " ")
    return _PERIOD.sub("", result)


def replace_words(text: str) -> str:
    """Return `text` in lower case, numbers to ten as digits, articles gone, apostrophes back."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def textvqa_form(text: str) -> str:
    """Return `text` as TextVQA's answer processor normalises it."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return replace_words(strip_punctuation(words.replace("\n", " ").replace("\t", " ").strip()))
