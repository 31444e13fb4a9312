"""Metrics that compare an answer's text with its references, one prediction at a time.

To add one, write a function of a prediction and its references, and add its row to `METRICS` in
`pilot_flwr.metrics`. Sources and formulas: docs/reference/metrics.md.

VQAv2 and TextVQA score against ten annotators: an answer counts in full if at least three gave it.
For comparison with human accuracy, each annotator is left out in turn, and the ten figures are
averaged. Texts are normalised as in the official VQA script, which TextVQA's (M4C's) extends. For
another data set of this kind, combine `soft_accuracy` with the normalisation of its script.
"""

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from pilot_flwr.errors import DataError

ANLS_THRESHOLD = 0.5
"""Minimum similarity that counts, as in the benchmarks' evaluation."""

OPTIONS = "ABCDE"
"""The letters of ScienceQA's options."""

_ANSWER_IS = re.compile("The answer is ([A-Z]).")  # as in LLaVA: any character may end it

ANNOTATORS = 10

ENOUGH = 3
"""Annotators who must agree with an answer for it to count in full."""

ARTICLES = frozenset(("a", "an", "the"))

_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# Without capitals such as "I'm", as texts are in lower case when they are looked up.
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


CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # as in both official scripts
"""Form with one apostrophe missing → contraction."""


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if a reference equals the prediction up to case and white space, else 0."""
    return float(_plain(prediction) in map(_plain, references))


def gqa(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if a reference equals the prediction up to case and final periods, else 0.

    GQA's script compares strings; LLaVA lower-cases an answer and strips its final periods first.
    """
    return float(_gqa_form(prediction) in map(_gqa_form, references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Return the largest normalised Levenshtein similarity, or 0 if it is below the threshold.

    ``s = 1 - d(p, r) / max(|p|, |r|)`` with the edit distance d, both texts in lower case and
    with single blanks; the score is ``max_r s`` if that is at least 0.5.
    """
    text = _lowered(prediction)
    best = max(Levenshtein.normalized_similarity(text, _lowered(r)) for r in references)
    return float(best) if best >= ANLS_THRESHOLD else 0.0


def scienceqa(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if prediction and a reference name the same option's letter, else 0."""
    check_letters(references)
    return float(option_letter(prediction) in map(option_letter, references))


def check_letters(references: Sequence[str]) -> None:
    """Raise `DataError`, without quoting it, for a reference that names no option."""
    for number, reference in enumerate(references, start=1):
        if option_letter(reference) is None:
            raise DataError(
                f"Reference {number} names no option but must be a letter from {OPTIONS[0]} to "
                f"{OPTIONS[-1]}, or have 'The answer is', such a letter and a period once."
            )


def option_letter(answer: str) -> str | None:
    """Return the letter that a ScienceQA answer names, or None.

    In this order, as in LLaVA's script: the answer is just a letter; it begins with a letter, a
    period and a blank; it contains ``The answer is``, a capital and one more character exactly
    once. White space around the answer is ignored.
    """
    text = answer.strip()
    if text in set(OPTIONS):
        return text
    if text[:1] in set(OPTIONS) and text[1:3] == ". ":
        return text[0]
    stated = _ANSWER_IS.findall(text)
    return stated[0] if len(stated) == 1 and stated[0] in OPTIONS else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _lowered(text: str) -> str:
    return " ".join(text.lower().split())


def _gqa_form(text: str) -> str:
    return text.strip().rstrip(".").lower()


def vqav2(prediction: str, references: Sequence[str]) -> float:
    """Return the VQAv2 accuracy of a prediction, in [0, 1].

    The data set's answers are normalised already. As in the official script, only their
    punctuation is stripped, and only if they differ.
    """
    answers = list(references)
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    return soft_accuracy(_vqa_form(prediction), answers)


def textvqa(prediction: str, references: Sequence[str]) -> float:
    """Return the TextVQA accuracy of a prediction, in [0, 1]."""
    return soft_accuracy(textvqa_form(prediction), [textvqa_form(r) for r in references])


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the mean over the annotators i of ``min(1, #{j != i: reference_j = answer} / 3)``."""
    check_annotators(references)
    matches = [reference == answer for reference in references]
    left_out = [min(1.0, (sum(matches) - match) / ENOUGH) for match in matches]
    return sum(left_out) / ANNOTATORS


def check_annotators(references: Sequence[str]) -> None:
    """Raise `DataError` unless there are ten references."""
    if len(references) != ANNOTATORS:
        raise DataError(
            f"A question has {len(references)} reference answers but must have {ANNOTATORS} for "
            "VQA accuracy, one per annotator."
        )


def strip_punctuation(text: str) -> str:
    """Return `text` without punctuation, like the VQA script.

    A mark is removed if it is next to a blank anywhere in the text, or if the text has a number
    with a comma; otherwise a blank replaces it. A period is removed unless a digit follows.
    """
    joined = _DIGITS_WITH_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or beside_blank else " ")
    return _PERIOD.sub("", result)


def replace_words(text: str) -> str:
    """Lower-case, write numbers to ten as digits, drop articles and restore apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def textvqa_form(text: str) -> str:
    """Normalise `text` like TextVQA's answer processor."""
    return _vqa_form(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def _vqa_form(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return replace_words(strip_punctuation(text))
