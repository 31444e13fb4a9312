"""The digits' tasks: what is asked about a mosaic of four digits, and the answer.

To add a task, write its question and answer as one function of four digits and a generator, and
enter it in `WRITERS`, behind the others: a task's place is part of what seeds its examples. A task
that is not scored by exact match has a row in `METRIC_OF`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
BLANK = -1
"""Label of a place without a digit."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def ask_position(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the digit at one of the four positions; the answer is a word."""
    place = int(rng.integers(4))
    asked = _pick(
        rng,
        "What digit is at the {}?",
        "Which digit is at the {}?",
        "Name the digit at the {}.",
    )
    return asked.format(POSITIONS[place]), WORDS[labels[place]]


def ask_count(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[str, str]:
    """Ask how many of the four digits are odd; the answer is a numeral."""
    asked = _pick(
        rng,
        "How many digits are odd?",
        "How many of the digits are odd?",
        "Count the odd digits.",
    )
    return asked, str(int((labels % 2).sum()))


def ask_caption(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[str, str]:
    """Ask for a caption; the answer names the four digits in reading order."""
    asked = _pick(
        rng,
        "Describe the image.",
        "Write a short caption.",
        "What does the image show?",
    )
    first, second, third, fourth = (WORDS[label] for label in labels)
    return asked, f"the digits {first}, {second}, {third} and {fourth}"


def ask_row(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the two digits of a row; the answer is two words."""
    row = int(rng.integers(2))
    return f"Read the {('top', 'bottom')[row]} row.", _words(labels[2 * row : 2 * row + 2])


def ask_numeral(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the digit at a position as a numeral."""
    place = int(rng.integers(4))
    return f"Write the numeral at the {POSITIONS[place]}.", str(labels[place])


def ask_columns(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[str, str]:
    """Ask for a caption by columns; the answer names the four digits, column by column."""
    asked = _pick(
        rng,
        "Describe the image by columns.",
        "Write a caption by columns.",
        "What does the image show, by columns?",
    )
    return asked, f"{_words(labels[[0, 2]])}, {_words(labels[[1, 3]])}"


def ask_box(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[str, str]:
    """Ask where a digit is; the answer is its box in quarters of the page: x1 y1 x2 y2.

    Places may be `BLANK`; at least one digit must occur exactly once.
    """
    places = [p for p in range(4) if labels[p] != BLANK and (labels == labels[p]).sum() == 1]
    place = places[int(rng.integers(len(places)))]
    x, y = 2 * (place % 2), 2 * (place // 2)
    asked = _pick(rng, "Where is the {}?", "Locate the {}.", "Give the box of the {}.")
    return asked.format(WORDS[labels[place]]), f"{x} {y} {x + 2} {y + 2}"


def _words(labels: NDArray[np.int64]) -> str:
    return " ".join(WORDS[label] for label in labels)


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


Writer = Callable[[NDArray[np.int64], np.random.Generator], tuple[str, str]]
"""From the four digits and a generator to a question and its answer."""

WRITERS: dict[str, Writer] = {
    "vqa": ask_position,
    "counting": ask_count,
    "captioning": ask_caption,
    "row": ask_row,
    "numeral": ask_numeral,
    "columns": ask_columns,
    "grounding": ask_box,
}
"""All tasks. The demo's are the first three; docs/scenarios.md says what the others are for."""

METRIC_OF = {"columns": "rouge_l", "grounding": "grounding_quarters"}
"""Metric of a task that is not scored by exact match."""
