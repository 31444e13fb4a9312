"""The embedded demo's tasks: what is asked about a mosaic of four digits, and the answer.

To add a task, write its question and answer as one function of four digits and a generator, and
enter it in `WRITERS`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
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


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


Writer = Callable[[NDArray[np.int64], np.random.Generator], tuple[str, str]]
"""From the four digits and a generator to a question and its answer."""

WRITERS: dict[str, Writer] = {
    "vqa": ask_position,
    "counting": ask_count,
    "captioning": ask_caption,
}
"""The federation's tasks."""
