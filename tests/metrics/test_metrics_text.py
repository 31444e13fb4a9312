import pytest

from pilot_flwr.metrics import text


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("seven", "seven", 1),
        (" Seven\n", "seven", 1),
        ("seven  eight", "seven eight", 1),
        ("seven", "eight", 0),
        ("seven", "", 0),
        ("seven.", "seven", 0),
    ],
)
def test_exact_match(prediction, reference, score):
    assert text.exact_match(prediction, [reference]) == score
    assert text.exact_match(prediction, ["nine", reference]) == score
