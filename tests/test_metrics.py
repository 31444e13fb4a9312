import pytest

from pilot_flwr.metrics import METRICS, exact_match


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
    assert exact_match(prediction, reference) == score
    assert METRICS["exact_match"] is exact_match
