"""Compare with pycocoevalcap's figures and tokens (pycocoevalcap.json)."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.errors import DataError
from pilot_flwr.metrics import METRICS, captions
from pilot_flwr.metrics import captions as ptb

FIGURES = json.loads((Path(__file__).parent / "pycocoevalcap.json").read_text(encoding="utf-8"))
CORPORA = FIGURES["corpora"]
NAMES = ("cider_d", "bleu_4", "rouge_l")


def tokens(corpus):
    return (
        [text.split() for text in corpus["predicted_tokens"]],
        [[text.split() for text in group] for group in corpus["reference_tokens"]],
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("corpus", CORPORA)
def test_scores_are_those_of_pycocoevalcap(corpus, name):
    expected = CORPORA[corpus]["scores"][name]
    score = getattr(captions, name)(*tokens(CORPORA[corpus]))
    assert score.mean == pytest.approx(expected["mean"], rel=1e-9, abs=1e-12)
    assert score.each == pytest.approx(expected["each"], rel=1e-9, abs=1e-12)


def every_caption():
    for corpus in CORPORA.values():
        said, references = tokens(corpus)
        yield from zip(corpus["predictions"], said, strict=True)
        for texts, group in zip(corpus["references"], references, strict=True):
            yield from zip(texts, group, strict=True)


def test_the_approximate_tokenizer_gives_the_standard_ones_tokens_for_usual_captions():
    for caption, expected in every_caption():
        assert ptb.approximate_tokens(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # As Stanford CoreNLP 3.4.1 gives them.
        (
            "A sign reading “No Parking” (on Main St.)",
            "a sign reading no parking -lrb- on main st. -rrb-",
        ),
        ("He'll say we've I'd don’t", "he 'll say we 've i 'd do n't"),
        ("cannot gonna", "can not gon na"),
        ("3,000 things cost $5.00, 25% less", "3,000 things cost $ 5.00 25 % less"),
        ("A 5-year-old's mother-in-law", "a 5-year-old 's mother-in-law"),
        ("hello!! what?! no?", "hello !! what ?! no"),
        ("the dogs' o'clock bird....", "the dogs o'clock bird"),
        ("", ""),
    ],
)
def test_approximate_tokens(caption, expected):
    assert ptb.approximate_tokens(caption) == expected.split()


@pytest.fixture
def java():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    assert ptb.why_approximate() == ""


def test_java_gives_the_tokens_of_the_standard_tokenizer(java):
    texts, expected = zip(*every_caption(), strict=True)
    assert ptb.tokenize(texts) == list(expected)


def test_java_answers_for_each_caption_whatever_characters_it_has(java):
    odd = ["", "a\nb", "a\u2028b\x85c\x0b\x0cd\re", "naïve café", "  ", "😀 cat", ""]
    expected = [[], ["a", "b"], ["a", "b", "c", "d", "e"], ["naïve", "café"], []]
    answer = ptb.tokenize(odd)
    assert answer[:5] + answer[6:] == [*expected, []]
    assert answer[5][-1] == "cat"


def test_without_java_the_figure_is_said_to_be_approximate(monkeypatch, tmp_path):
    monkeypatch.setattr(ptb, "_jar", lambda: tmp_path / "tokenizer.jar")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert ptb.why_approximate() == "PTB tokenizer needs Java"
    assert ptb.tokenize(["A man's hat."]) == [["a", "man", "'s", "hat"]]


def test_a_java_that_does_not_run_is_not_used(monkeypatch, tmp_path):
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ptb, "_jar", lambda: tmp_path / "tokenizer.jar")
    assert ptb.why_approximate() == "PTB tokenizer needs a Java that runs"


def test_without_the_package_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ptb, "_jar", lambda: None)
    for name in NAMES:
        assert "pip install 'pilot-flwr[captions]'" in METRICS[name].approximate()
    corpus = CORPORA["all"]
    score = METRICS["cider_d"].score(corpus["predictions"], corpus["references"])
    assert score.mean == pytest.approx(corpus["scores"]["cider_d"]["mean"])


def test_a_failing_tokenizer_is_a_typed_error(monkeypatch, tmp_path):
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho broken jar >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"exit code 3\): broken jar"):
        ptb._java_tokens(["a"], tmp_path / "tokenizer.jar", 60.0)


WORDS = st.lists(st.sampled_from("a cat dog on the mat sits".split()), max_size=7)
PAIRS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=4)


@given(PAIRS)
def test_bounds(pairs):
    said, references = (list(column) for column in zip(*pairs, strict=True))
    for name in NAMES:
        score = getattr(captions, name)(said, references)
        for figure in (score.mean, *score.each):
            assert 0 <= figure <= METRICS[name].maximum * (1 + 1e-9)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=9))
def test_a_reference_of_four_words_or_more_scores_the_maximum(words):
    other = [[word.upper() for word in words]]
    said, references = [words, other[0]], [[words], other]
    for name in NAMES:
        score = getattr(captions, name)(said, references)
        assert score.each == pytest.approx([METRICS[name].maximum] * 2)
