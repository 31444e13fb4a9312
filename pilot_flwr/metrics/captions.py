"""Metrics of captions: CIDEr-D, BLEU-4 and ROUGE-L on Penn Treebank tokens.

The formulas, constants included, are those of the COCO caption evaluation (pycocoevalcap), and
tests hold these functions to its figures. They are written anew because that package is 100 MB
of Java programs, writes into its own folder and prints as it scores. To add a caption metric,
write a function of tokens and wrap it in `on_tokens`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz.distance import LCSseq

from pilot_flwr.metrics.ptb import tokenize
from pilot_flwr.metrics.score import References, Score, check_pairs

Tokens = list[str]
NGram = tuple[str, ...]

ORDER = 4
"""The longest n-grams of BLEU-4 and CIDEr-D."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty on a difference in length."""
BETA = 1.2
"""Weight of recall in ROUGE-L."""

_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's, against logarithms and divisions of zero


def on_tokens(
    function: Callable[[list[Tokens], list[list[Tokens]]], Score],
) -> Callable[[Sequence[str], References], Score]:
    """Return the scorer that gives `function` the tokens of predictions and references."""

    def score(predictions: Sequence[str], references: References) -> Score:
        check_pairs(predictions, references)
        texts = [*predictions, *(text for group in references for text in group)]
        tokens = iter(tokenize(texts))
        said = [next(tokens) for _ in predictions]
        return function(said, [[next(tokens) for _ in group] for group in references])

    return score


def bleu_4(predictions: list[Tokens], references: list[list[Tokens]]) -> Score:
    """Return BLEU-4 of the corpus, and of each prediction by itself, in [0, 1].

    ``BP · (prod_n p_n)^(1/4)``, n = 1..4, with the clipped precision p_n of n-grams and the
    brevity penalty ``BP = exp(1 - r/c)`` if the length c is below r. The reference length r of a
    prediction is that of the reference closest in length, the shorter of two.
    """
    counts = [_bleu_counts(*pair) for pair in zip(predictions, references, strict=True)]
    corpus = [sum(column) for column in zip(*counts, strict=True)]
    return Score(_bleu(corpus), [_bleu(count) for count in counts])


def rouge_l(predictions: list[Tokens], references: list[list[Tokens]]) -> Score:
    """Return ROUGE-L, in [0, 1].

    ``(1 + β²) P R / (R + β² P)``, β = 1.2, with the precision P = max_r lcs/|p| and the recall
    R = max_r lcs/|r| of the longest common subsequence, each the best over the references.
    """
    each = [_rouge(*pair) for pair in zip(predictions, references, strict=True)]
    return Score(sum(each) / len(each), each)


def cider_d(predictions: list[Tokens], references: list[list[Tokens]]) -> Score:
    """Return CIDEr-D, in [0, 10].

    The mean over n = 1..4 and over the references r of
    ``10 exp(-(l_p - l_r)²/2σ²) · min(g_p, g_r)·g_r / (|g_p| |g_r|)`` with the TF-IDF vectors g of
    n-grams, σ = 6 and the lengths l (counted in bigrams, as the reference does). The document
    frequency is the number of images, of those scored together, with the n-gram in a reference;
    so the figure depends on the whole split, and one image alone always scores 0.
    """
    counted = [[_ngrams(tokens) for tokens in group] for group in references]
    frequency: Counter[NGram] = Counter()
    for group in counted:
        frequency.update(set().union(*group))
    images = math.log(len(predictions))
    idf = {ngram: images - math.log(number) for ngram, number in frequency.items()}

    def vectors(ngrams: Counter[NGram]) -> list[dict[NGram, float]]:
        split: list[dict[NGram, float]] = [{} for _ in range(ORDER)]
        for ngram, number in ngrams.items():
            split[len(ngram) - 1][ngram] = number * idf.get(ngram, images)
        return split

    each = []
    for tokens, answers, counts in zip(predictions, references, counted, strict=True):
        said = vectors(_ngrams(tokens))
        similarities = [
            _cider_similarity(said, vectors(ngrams)) * _length_penalty(tokens, answer)
            for answer, ngrams in zip(answers, counts, strict=True)
        ]
        each.append(10.0 * sum(similarities) / len(similarities))
    return Score(sum(each) / len(each), each)


def _ngrams(tokens: Tokens) -> Counter[NGram]:
    """Return how often each n-gram of 1 to 4 tokens occurs."""
    return Counter(
        tuple(tokens[start : start + n])
        for n in range(1, ORDER + 1)
        for start in range(len(tokens) - n + 1)
    )


def _bleu_counts(prediction: Tokens, references: list[Tokens]) -> list[int]:
    """Return |p|, r, then for n = 1..4 the number of n-grams, then of those in a reference."""
    allowed: Counter[NGram] = Counter()
    for reference in references:
        allowed |= _ngrams(reference)
    common = Counter(dict.fromkeys(range(1, ORDER + 1), 0))
    for ngram, number in (_ngrams(prediction) & allowed).items():
        common[len(ngram)] += number
    length = len(prediction)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    total = [max(0, length - n + 1) for n in range(1, ORDER + 1)]
    return [length, closest, *total, *(common[n] for n in range(1, ORDER + 1))]


def _bleu(counts: Sequence[int]) -> float:
    length, closest = counts[:2]
    total, common = counts[2 : 2 + ORDER], counts[2 + ORDER :]
    product = math.prod((c + _TINY) / (t + _SMALL) for c, t in zip(common, total, strict=True))
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return float(product ** (1 / ORDER) * penalty)


def _rouge(prediction: Tokens, references: list[Tokens]) -> float:
    common = [LCSseq.similarity(prediction, reference) for reference in references]
    precision = max(common) / max(len(prediction), 1)
    recall = max(c / max(len(r), 1) for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _cider_similarity(
    prediction: list[dict[NGram, float]], reference: list[dict[NGram, float]]
) -> float:
    """Return the mean over n of the clipped cosine of two TF-IDF vectors."""
    total = 0.0
    for said, expected in zip(prediction, reference, strict=True):
        product = sum(
            min(v, expected.get(ngram, 0.0)) * expected.get(ngram, 0.0) for ngram, v in said.items()
        )
        norms = math.hypot(*said.values()) * math.hypot(*expected.values())
        total += product / norms if norms else 0.0
    return total / ORDER


def _length_penalty(prediction: Tokens, reference: Tokens) -> float:
    """Return ``exp(-(difference of the lengths)²/2σ²)``, lengths in bigrams."""
    difference = max(len(prediction) - 1, 0) - max(len(reference) - 1, 0)
    return math.exp(-(difference**2) / (2 * SIGMA**2))
