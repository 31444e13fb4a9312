"""Metrics of captions: CIDEr-D, BLEU-4 and ROUGE-L on Penn Treebank tokens.

Formulas and constants are those of the COCO caption evaluation (pycocoevalcap), and tests compare
these functions with its figures. They are reimplemented because that package is 100 MB of Java
programs, writes into its own folder and prints while scoring. To add a caption metric, write a
function of tokens and wrap it in `on_tokens`.

The standard tokenizer is Stanford CoreNLP 3.4.1's, a Java program in pycocoevalcap
(``pip install 'pilot-flwr[captions]'``). Without it or without Java, `approximate_tokens` replaces
it, and `why_approximate` reports that.
"""

import importlib.util
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from rapidfuzz.distance import LCSseq

from pilot_flwr.errors import DataError
from pilot_flwr.metrics.score import References, Score, check_pairs

JAR = "stanford-corenlp-3.4.1.jar"

REMOVED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens to drop. Brackets stay: the official list has them in upper case, but the tokenizer
writes lower case."""

PROBE_SECONDS, ALL_SECONDS = 60.0, 1800.0
"""Time limits of the Java program: to test that it runs, and for a split's captions."""

_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})

_CONTRACTED = ("can not", "gon na", "wan na", "got ta", "gim me", "lem me")
_SPLIT = {text.replace(" ", ""): text for text in _CONTRACTED}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SUFFIX = r"'(?:s|m|d|ll|re|ve)\b"

_TOKEN = re.compile(
    rf"""
      {_SUFFIX}
    | (?:[a-z]\.){{2,}}                                  # p.m.
    | (?:mr|mrs|ms|dr|st|mt|jr|sr|vs|etc|inc|co|ave)\.   # abbreviations
    | n't\b
    | \d+(?:[.,:/]\d+)+                                  # 10:30
    | \w+?(?=n't\b)                                      # the "is" of isn't
    | \w+(?:[-/]\w+)*(?:'(?!(?:s|m|d|ll|re|ve)\b)\w+)*   # mother-in-law, o'clock
    | \.{{3,}} | -{{2,}} | [!?]+
    | \S
    """,
    re.VERBOSE,
)


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Return the tokens of each caption, from the standard tokenizer where it is available.

    Raises
    ------
    DataError
        The Java program failed, or did not answer line by line.
    """
    jar = _jar()
    if jar is None or why_approximate():
        return list(map(approximate_tokens, captions))
    return _java_tokens(captions, jar, ALL_SECONDS)


def why_approximate() -> str:
    """Return why `tokenize` does not use the standard tokenizer, or an empty text if it does."""
    jar = _jar()
    if jar is None:
        return "PTB tokenizer not installed: pip install 'pilot-flwr[captions]'"
    if shutil.which("java") is None:
        return "PTB tokenizer needs Java"
    return "" if _java_works(jar) else "PTB tokenizer needs a Java that runs"


def approximate_tokens(caption: str) -> list[str]:
    """Approximate the standard tokenizer, with the same tokens for most captions.

    Words with hyphens, slashes and inner apostrophes, numbers and common abbreviations are one
    token; suffixes such as ``n't`` and ``'s`` are separate tokens. Web addresses, currencies in
    words and rarer abbreviations are not recognised.
    """
    text = caption.lower().translate(_PLAIN)
    tokens = []
    for token in _TOKEN.findall(text):
        if token.startswith("..."):
            token = "..."  # nosec B105  # a word, no password
        tokens += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return [token for token in tokens if token not in (*REMOVED, '"')]


def _jar() -> Path | None:
    found = importlib.util.find_spec("pycocoevalcap")
    folders = (found and found.submodule_search_locations) or []
    jars = (Path(folder) / "tokenizer" / JAR for folder in folders)
    return next(filter(Path.is_file, jars), None)


@lru_cache(maxsize=1)
def _java_works(jar: Path) -> bool:
    try:
        return _java_tokens(["A man's hat."], jar, PROBE_SECONDS) == [["a", "man", "'s", "hat"]]
    except (DataError, OSError):
        return False


def _java_tokens(captions: Sequence[str], jar: Path, seconds: float) -> list[list[str]]:
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    # The program answers line by line; characters other than "\n" also end a line for it.
    lines = [" ".join(caption.split()) for caption in captions]
    text = "".join(f"{line}\n" for line in lines)
    try:
        run = subprocess.run(  # nosec B603  # no shell; the captions are its input, not arguments
            command, input=text, capture_output=True, encoding="utf-8", check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"The PTB tokenizer did not answer within {seconds} seconds.") from None
    answer = run.stdout.split("\n")[: len(lines)]
    if run.returncode or len(answer) != len(lines):
        raise DataError(
            f"The PTB tokenizer gave {len(answer)} lines for {len(lines)} captions (exit code "
            f"{run.returncode}): {run.stderr.strip()[-300:]}"
        )
    return [[token for token in line.split() if token not in REMOVED] for line in answer]


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
    """Return a scorer that calls `function` with the tokens of predictions and references."""

    def score(predictions: Sequence[str], references: References) -> Score:
        check_pairs(predictions, references)
        texts = [*predictions, *(text for group in references for text in group)]
        tokens = iter(tokenize(texts))
        predicted = [next(tokens) for _ in predictions]
        return function(predicted, [[next(tokens) for _ in group] for group in references])

    return score


def bleu_4(predictions: list[Tokens], references: list[list[Tokens]]) -> Score:
    """Return BLEU-4 of the corpus, and of each prediction, in [0, 1].

    ``BP · (prod_n p_n)^(1/4)``, n = 1..4, with the clipped precision p_n of n-grams and the
    brevity penalty ``BP = exp(1 - r/c)`` if the length c is below r. The reference length r of a
    prediction is that of the reference closest in length, the shorter of two.
    """
    counts = list(map(_bleu_counts, predictions, references))
    corpus = [sum(column) for column in zip(*counts, strict=True)]
    return Score(_bleu(corpus), [_bleu(count) for count in counts])


def rouge_l(predictions: list[Tokens], references: list[list[Tokens]]) -> Score:
    """Return ROUGE-L, in [0, 1].

    ``(1 + β²) P R / (R + β² P)``, β = 1.2, with the precision P = max_r lcs/|p| and the recall
    R = max_r lcs/|r| of the longest common subsequence, each the best over the references.
    """
    each = list(map(_rouge, predictions, references))
    return Score(sum(each) / len(each), each)


def cider_d(predictions: list[Tokens], references: list[list[Tokens]]) -> Score:
    """Return CIDEr-D, in [0, 10].

    The mean over n = 1..4 and over the references r of
    ``10 exp(-(l_p - l_r)²/2σ²) · min(g_p, g_r)·g_r / (|g_p| |g_r|)`` with the TF-IDF vectors g of
    n-grams, σ = 6 and the lengths l (counted in bigrams, as in pycocoevalcap). The document
    frequency of an n-gram is the number of images scored together that have it in a reference; so
    the figure depends on the whole split, and a single image always scores 0.
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
        predicted = vectors(_ngrams(tokens))
        similarities = [
            _cider_similarity(predicted, vectors(ngrams)) * _length_penalty(tokens, answer)
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
    for predicted, expected in zip(prediction, reference, strict=True):
        product = sum(
            min(weight, expected.get(ngram, 0.0)) * expected.get(ngram, 0.0)
            for ngram, weight in predicted.items()
        )
        norms = math.hypot(*predicted.values()) * math.hypot(*expected.values())
        total += product / norms if norms else 0.0
    return total / ORDER


def _length_penalty(prediction: Tokens, reference: Tokens) -> float:
    """Return ``exp(-(difference of the lengths)²/2σ²)``, lengths in bigrams."""
    difference = max(len(prediction) - 1, 0) - max(len(reference) - 1, 0)
    return math.exp(-(difference**2) / (2 * SIGMA**2))
