import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.errors import DataError
from pilot_flwr.metrics import METRICS

PERFECT = {  # a reference, and how many of it a prediction needs
    "exact_match": ("seven", 1),
    "gqa": ("yes", 1),
    "vqav2": ("red", 10),
    "textvqa": ("red", 10),
    "anls": ("coca cola", 1),
    "scienceqa": ("B", 1),
    "grounding": ("[0.1, 0.2, 0.3, 0.4]", 1),
}
CAPTIONS = ["a dog runs over the grass", "two cats sleep on my bed"]


@pytest.mark.parametrize("name", METRICS)
def test_a_reference_scores_the_maximum(name):
    if name in PERFECT:
        text, number = PERFECT[name]
        score = METRICS[name].score([text], [[text] * number])
    else:
        score = METRICS[name].score(CAPTIONS, [[text] for text in CAPTIONS])
    maximum = METRICS[name].maximum
    assert score.mean == pytest.approx(maximum)
    assert score.each == pytest.approx([maximum] * len(score.each))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "There is no prediction to score"),
        (["a"], [], "There are 1 predictions but references for 0"),
        (["a"], [["a"], ["b"]], "There are 1 predictions but references for 2"),
        (["a", "b"], [["a"], []], "Prediction 2 has no reference"),
        (["a"], ["a"], "The references of prediction 1 must be a list of texts"),
    ],
)
def test_predictions_and_references_must_fit(name, predictions, references, message):
    with pytest.raises(DataError, match=message):
        METRICS[name].score(predictions, references)


@given(st.lists(st.tuples(st.text("ab ."), st.lists(st.text("ab ."), min_size=1)), min_size=1))
def test_the_mean_is_that_of_each(pairs):
    predictions, references = (list(column) for column in zip(*pairs, strict=True))
    for name in ("exact_match", "gqa", "anls"):
        score = METRICS[name].score(predictions, references)
        assert len(score.each) == len(predictions)
        assert score.mean == pytest.approx(sum(score.each) / len(score.each))
        assert all(0 <= figure <= 1 for figure in score.each)


@pytest.mark.parametrize("name", METRICS)
def test_references_are_refused_beforehand_just_where_scoring_would_refuse_them(name):
    metric, refused = METRICS[name], 0
    sets = [["a"], [""], ["A"], ["The answer is B."], ["a"] * 10, [PERFECT["grounding"][0]]]
    for references in [*sets, ["A", "heat"], ["[0, 0, 1, 1]", "left"], ["A"] * 11]:
        try:
            metric.score(["B", "B"], [references, references])
            scored = True
        except DataError as error:
            scored, message = False, str(error)
        if scored:
            metric.check(references)
        else:
            with pytest.raises(DataError) as found:
                metric.check(references)
            assert str(found.value) == message
            refused += 1
    strict = {"vqav2", "textvqa", "scienceqa", "grounding"}
    assert (refused > 0) == (name in strict)


def test_only_caption_metrics_can_be_approximate():
    exact = {name for name, metric in METRICS.items() if metric.approximate() == ""}
    assert set(PERFECT) <= exact
    assert METRICS["cider_d"].maximum == 10
