"""Compare with the official scripts (official_vqa.json) and accuracies derived by hand."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.errors import DataError
from pilot_flwr.metrics import text as vqa

OFFICIAL = json.loads((Path(__file__).parent / "official_vqa.json").read_text(encoding="utf-8"))


def test_texts_are_normalised_as_by_the_official_scripts():
    for row in OFFICIAL["normalised"]:
        line = row["text"].replace("\n", " ").replace("\t", " ").strip()
        assert vqa.strip_punctuation(row["text"]) == row["punctuation"]
        assert vqa.replace_words(vqa.strip_punctuation(line)) == row["vqav2"]
        assert vqa.textvqa_form(row["text"]) == row["textvqa"]


@pytest.mark.parametrize("metric", ["vqav2", "textvqa"])
def test_accuracies_are_those_of_the_official_scripts(metric):
    for row in OFFICIAL["accuracies"]:
        score = getattr(vqa, metric)(row["prediction"], row["references"])
        assert score == pytest.approx(row[metric])
    assert len({row[metric] for row in OFFICIAL["accuracies"]}) > 4


@pytest.mark.parametrize(
    ("matches", "accuracy"),
    [
        # One of m matching annotators is left out m times, another 10 - m times:
        # (m min(1, (m - 1)/3) + (10 - m) min(1, m/3)) / 10.
        (0, 0.0),
        (1, (1 * 0 + 9 / 3) / 10),  # 0.3
        (2, (2 / 3 + 8 * 2 / 3) / 10),  # 0.6
        (3, (3 * 2 / 3 + 7 * 1) / 10),  # 0.9
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_leave_one_out(matches, accuracy):
    references = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa.soft_accuracy("red", references) == pytest.approx(accuracy)
    assert vqa.vqav2("Red.", references) == pytest.approx(accuracy)
    assert vqa.textvqa("the red", references) == pytest.approx(accuracy)


def test_references_of_vqav2_are_taken_as_the_data_set_holds_them():
    assert vqa.vqav2("two", ["2"] * 10) == 1
    assert vqa.vqav2("two", ["two"] * 10) == 0
    assert vqa.textvqa("two", ["two"] * 10) == 1


@pytest.mark.parametrize("metric", [vqa.vqav2, vqa.textvqa])
@pytest.mark.parametrize("number", [1, 9, 11])
def test_ten_references_are_needed(metric, number):
    with pytest.raises(DataError, match=f"has {number} reference answers but must have 10"):
        metric("red", ["red"] * number)


@given(st.lists(st.text("ab1,. '-", max_size=6), min_size=10, max_size=10), st.integers(0, 9))
def test_giving_an_annotators_answer_scores_by_how_many_gave_it(references, chosen):
    score = vqa.textvqa(references[chosen], references)
    same = [vqa.textvqa_form(r) for r in references].count(vqa.textvqa_form(references[chosen]))
    assert score == pytest.approx(min(1, 0.3 * same))
