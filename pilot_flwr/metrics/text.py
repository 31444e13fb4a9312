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

_LEADING_LETTER = re.compile(rf"([{OPTIONS}])\. ")
_ANSWER_IS = re.compile(rf"The answer is ([{OPTIONS}])")


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
        A reference has no letter.
    """
    expected = []
    for reference in references:
        letter = option_letter(reference)
        if letter is None:
            raise DataError(
                f"The reference {reference!r} names no option; it must be a letter from "
                f"{OPTIONS[0]} to {OPTIONS[-1]}, or 'The answer is' and such a letter."
            )
        expected.append(letter)
    return float(option_letter(prediction) in expected)


def option_letter(answer: str) -> str | None:
    """Return the letter that a ScienceQA answer names, or None.

    In this order: the answer is a letter and nothing else; it begins with a letter, a period and
    a blank; it has ``The answer is`` and a letter somewhere. A line's end counts as ``". "``.
    """
    line = answer.replace("\n", ". ")
    if line.strip() in set(OPTIONS):
        return line.strip()
    # A letter with a period wins over one without: "The answer is A or B, so The answer is B."
    leading = _LEADING_LETTER.match(line)
    stated = re.search(_ANSWER_IS.pattern + r"\.", line) or _ANSWER_IS.search(line)
    found = leading or stated
    return found.group(1) if found else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _lowered(text: str) -> str:
    return " ".join(text.lower().split())


def _gqa_form(text: str) -> str:
    return text.strip().rstrip(".").lower()
