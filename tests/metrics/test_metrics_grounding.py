from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.errors import DataError
from pilot_flwr.metrics.grounding import Box, grounding, iou, parse_box

WHOLE = "[0.0, 0.0, 1.0, 1.0]"


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", "[0.10, 0.20, 0.30, 0.40]", 1),
        ("The box is [0.1,0.2,0.3,0.4].", "[0.1, 0.2, 0.3, 0.4]", 1),
        ("[0, 0, 1, 0.51]", WHOLE, 1),
        ("[0, 0, 1, 0.5]", WHOLE, 0),  # IoU is 0.5, and must be above
        ("[0, 0, 1, 0.49]", WHOLE, 0),
        ("[0.0, 0.0, 0.1, 0.1]", "[0.5, 0.5, 1.0, 1.0]", 0),
        ("", WHOLE, 0),
        ("0.0, 0.0, 1.0, 1.0", WHOLE, 0),
        ("[0.0, 0.0, 1.0]", WHOLE, 0),
        ("[0.0, 0.0, 1.0, 1.0, 1.0]", WHOLE, 0),
        ("[1.0, 1.0, 0.0, 0.0]", WHOLE, 0),
        ("[0, 0, 336, 336]", WHOLE, 0),
        ("[-0.1, 0, 1, 1]", WHOLE, 0),
        ("[nan, 0, 1, 1]", WHOLE, 0),
    ],
)
def test_grounding(prediction, reference, score):
    assert grounding(prediction, [reference]) == score
    assert grounding(prediction, ["[0.98, 0.98, 0.99, 0.99]", reference]) == score


@pytest.mark.parametrize("text", ["left", "[0.5, 0.5, 0.5, 0.9]", "[10, 20, 30, 40]", "[0, 0, 1]"])
def test_a_reference_must_be_a_box(text):
    message = r"^Reference 2 is not a box; it must be '\[x1, y1, x2, y2\]' with .*"
    with pytest.raises(DataError, match=message) as error:
        grounding(WHOLE, [WHOLE, text])
    assert text not in str(error.value)  # errors go to the server


SIDES = st.sampled_from([(low, high) for low in range(12) for high in range(low + 1, 13)])
BOXES = st.tuples(SIDES, SIDES).map(lambda sides: (*(s[0] for s in sides), *(s[1] for s in sides)))


@given(BOXES, BOXES)
def test_iou_is_that_of_counted_cells(first, second):
    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    counted = Fraction(len(cells(first) & cells(second)), len(cells(first) | cells(second)))
    boxes = [Box(*(Fraction(edge, 12) for edge in box)) for box in (first, second)]
    assert iou(*boxes) == counted
    texts = ["[{}, {}, {}, {}]".format(*(edge / 20 for edge in box)) for box in (first, second)]
    assert grounding(texts[0], [texts[1]]) == (counted > Fraction(1, 2))
    assert parse_box(texts[0]) == tuple(Fraction(edge, 20) for edge in first)
