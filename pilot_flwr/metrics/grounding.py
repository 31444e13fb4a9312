"""Grounding: whether the predicted box is the reference's, by intersection over union.

Boxes are text in LLaVA's form, ``[x1, y1, x2, y2]``: the left, upper, right and lower edge as
shares of the image's width and height. Numbers are compared as exact fractions, so that rounding
does not move a box across the threshold.

`grounding_quarters` is the same for boxes on a coarse grid, ``x1 y1 x2 y2`` in quarters of the
width and height, for a model whose tokens are too few to write fractions.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from pilot_flwr.errors import DataError

THRESHOLD = Fraction(1, 2)
_NUMBER = r"\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_QUARTERS = re.compile(r"([0-4]) ([0-4]) ([0-4]) ([0-4])")


class Box(NamedTuple):
    """Edges as shares of the image's width and height, in [0, 1]."""

    left: Fraction
    upper: Fraction
    right: Fraction
    lower: Fraction

    @property
    def area(self) -> Fraction:
        """Share of the image that is inside; 0 if an edge is beyond its opposite."""
        return max(self.right - self.left, Fraction(0)) * max(self.lower - self.upper, Fraction(0))


def grounding(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the predicted box overlaps a reference with IoU > 0.5, else 0.

    A prediction without a box, or whose first box is not one, is wrong.

    Raises
    ------
    DataError
        As `check_boxes`.
    """
    return _hit(parse_box(prediction), check_boxes(references))


def grounding_quarters(prediction: str, references: Sequence[str]) -> float:
    """Return what `grounding` does, for boxes in quarters of the page: ``0 0 2 4``.

    A prediction that is anything but four such numbers of a box with an area is wrong.

    Raises
    ------
    DataError
        As `check_quarters`.
    """
    return _hit(parse_quarters(prediction), check_quarters(references))


def check_boxes(references: Sequence[str]) -> list[Box]:
    """Return the references as boxes.

    Raises
    ------
    DataError
        One is not a box of LLaVA's form with an area; the message does not have its text.
    """
    form = "'[x1, y1, x2, y2]' with edges from 0 to 1 and x1 < x2, y1 < y2"
    return _boxes(references, parse_box, form)


def check_quarters(references: Sequence[str]) -> list[Box]:
    """Return the references, in quarters of the page, as boxes.

    Raises
    ------
    DataError
        One is not four numbers from 0 to 4 with an area; the message does not have its text.
    """
    form = "'x1 y1 x2 y2' in quarters, whole numbers from 0 to 4 with x1 < x2, y1 < y2"
    return _boxes(references, parse_quarters, form)


def _boxes(references: Sequence[str], parse: Callable[[str], Box | None], form: str) -> list[Box]:
    boxes = []
    for number, text in enumerate(references, start=1):
        box = parse(text)
        if box is None:
            raise DataError(f"Reference {number} is not a box; it must be {form}.")
        boxes.append(box)
    return boxes


def parse_quarters(text: str) -> Box | None:
    """Return `text` as a box in quarters of the page, or None if it is not one with an area."""
    found = _QUARTERS.fullmatch(text.strip())
    if not found:
        return None
    box = Box(*(Fraction(int(number), 4) for number in found.groups()))
    return box if box.area > 0 else None


def parse_box(text: str) -> Box | None:
    """Return the first box in `text`, or None if there is none with an area inside the image."""
    found = _BOX.search(text)
    if not found:
        return None
    box = Box(*(Fraction(number.rstrip(".")) for number in found.groups()))
    return box if box.area > 0 and max(box) <= 1 else None


def iou(first: Box, second: Box) -> Fraction:
    """Return the intersection's area over the union's, for boxes that have an area."""
    common = Box(
        max(first.left, second.left),
        max(first.upper, second.upper),
        min(first.right, second.right),
        min(first.lower, second.lower),
    ).area
    return common / (first.area + second.area - common)


def _hit(said: Box | None, expected: Sequence[Box]) -> float:
    return float(said is not None and any(iou(said, box) > THRESHOLD for box in expected))
