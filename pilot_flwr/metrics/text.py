"""Metrics that compare an answer's text with its references, one prediction at a time.

To add one, write a function of a prediction and its references, and add its row to `METRICS` in
`pilot_flwr.metrics.table`. Sources and formulas: docs/metrics.md.
"""

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from pilot_flwr.errors import DataError

ANLS_THRESHOLD = 0.5
"""The least similarity that counts, of the benchmarks' own evaluation."""

OPTIONS = "ABCDE"
"""The letters of ScienceQA's options."""

_ANSWER_IS = re.compile("The answer is ([A-Z]).")  # LLaVA's own: any character may end it


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if a reference is the prediction but for case and white space, else 0."""
    return float(_plain(prediction) in map(_plain, references))


def gqa(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if a reference is the prediction but for case and periods at its end, else 0.

    GQA's own script compares strings; LLaVA lower-cases an answer and takes periods off its end
    before it hands it to that script.
    """
    return float(_gqa_form(prediction) in map(_gqa_form, references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Return the largest normalised Levenshtein similarity, or 0 if it is below the threshold.

    ``s = 1 - d(p, r) / max(|p|, |r|)`` with the edit distance d, both texts in lower case and
    with single blanks; the score is ``max_r s`` if that is at least 0.5.
    """
    said = _lowered(prediction)
    best = max(Levenshtein.normalized_similarity(said, _lowered(r)) for r in references)
    return float(best) if best >= ANLS_THRESHOLD else 0.0


def scienceqa(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the option's letter in the prediction is that of a reference, else 0.

    Raises
    ------
    DataError
        As `check_letters`.
    """
    check_letters(references)
    return float(option_letter(prediction) in map(option_letter, references))


def check_letters(references: Sequence[str]) -> None:
    """Raise unless every reference names an option, as `scienceqa` needs it.

    Raises
    ------
    DataError
        One does not; the message does not have its text.
    """
    for number, reference in enumerate(references, start=1):
        if option_letter(reference) is None:
            raise DataError(
                f"Reference {number} names no option but must be a letter from {OPTIONS[0]} to "
                f"{OPTIONS[-1]}, or have 'The answer is', such a letter and a period once."
            )


def option_letter(answer: str) -> str | None:
    """Return the letter that a ScienceQA answer names, or None.

    In this order, as in LLaVA's script: the answer is a letter and nothing else; it begins with
    a letter, a period and a blank; it has ``The answer is``, a capital and one more character
    somewhere, exactly once. White space around the answer does not count.
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
