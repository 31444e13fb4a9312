"""Score predicted boxes against reference boxes by intersection over union (IoU).

A box is written as LLaVA does, ``[x1, y1, x2, y2]``: left, upper, right and lower edge as shares of
the image's width and height. Numbers are compared as exact fractions, so that rounding does not
move a box across the threshold.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from pilot_flwr.errors import DataError

THRESHOLD = Fraction(1, 2)


class Box(NamedTuple):
    """Edges as shares of the image's width and height, in [0, 1]."""

    left: Fraction
    upper: Fraction
    right: Fraction
    lower: Fraction

    @property
    def area(self) -> Fraction:
        """Share of the image inside the box; 0 if opposite edges are in the wrong order."""
        return max(self.right - self.left, Fraction(0)) * max(self.lower - self.upper, Fraction(0))


_NUMBER = r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def parse_box(text: str) -> Box | None:
    """Return the first box in `text`, None unless it has an area and is inside the image."""
    found = _BOX.search(text)
    if not found:
        return None
    box = Box(*(Fraction(number.rstrip(".")) for number in found.groups()))
    return box if box.area > 0 and max(box) <= 1 else None


def grounding(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the predicted box overlaps a reference with IoU > 0.5, else 0.

    A prediction is wrong if it has no box, or if its first box is not valid.
    """
    boxes = check_boxes(references)
    predicted = parse_box(prediction)
    return float(predicted is not None and any(iou(predicted, box) > THRESHOLD for box in boxes))


def check_boxes(references: Sequence[str]) -> list[Box]:
    """Return the references as boxes.

    Raises
    ------
    DataError
        A reference is not a box with an area; the message does not quote it.
    """
    boxes = []
    for number, text in enumerate(references, start=1):
        box = parse_box(text)
        if box is None:
            raise DataError(
                f"Reference {number} is not a box; it must be '[x1, y1, x2, y2]' with edges from "
                "0 to 1 and x1 < x2, y1 < y2."
            )
        boxes.append(box)
    return boxes


def iou(first: Box, second: Box) -> Fraction:
    """Return the intersection's area over the union's, for boxes that have an area."""
    common = Box(
        max(first.left, second.left),
        max(first.upper, second.upper),
        min(first.right, second.right),
        min(first.lower, second.lower),
    ).area
    return common / (first.area + second.area - common)
