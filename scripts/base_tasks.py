"""Pretraining data of the demo's base model: mosaics, questions and styles.

The tasks are reading and captioning as in the federation, and auxiliary ones: rows, numerals,
parity, presence. Counting is left for the federation to learn. To add a task, write a function of
four digits and a generator, and give it a weight.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.data.demo import (
    POSITIONS,
    WORDS,
    Style,
    Writer,
    ask_caption,
    ask_position,
    client_style,
    draw_style,
    load_scans,
    render,
)
from pilot_flwr.data.examples import IMAGE_MARKER, Example, KeptImage, Turn

Ints = NDArray[np.int64]
Tasks = dict[Writer, float]
Styles = Callable[[np.random.Generator], Style]


def ask_row(labels: Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the two digits of a row; the answer is two words."""
    row = int(rng.integers(2))
    words = " ".join(WORDS[label] for label in labels[2 * row : 2 * row + 2])
    return f"Read the {('top', 'bottom')[row]} row.", words


def ask_numeral(labels: Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the digit at a position as a numeral."""
    place = int(rng.integers(4))
    return f"Write the numeral at the {POSITIONS[place]}.", str(labels[place])


def ask_parity(labels: Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask whether the digit at a position is odd."""
    place = int(rng.integers(4))
    return f"Is the {POSITIONS[place]} digit odd?", "yes" if labels[place] % 2 else "no"


def ask_parities(labels: Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the parity of each digit."""
    return "Is each digit odd or even?", ", ".join("odd" if n % 2 else "even" for n in labels)


def ask_presence(labels: Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask whether a digit occurs; yes and no are about equally likely."""
    digit = int(labels[rng.integers(4)]) if rng.random() < 0.4 else int(rng.integers(10))
    return f"Is there a {WORDS[digit]}?", "yes" if digit in labels else "no"


PLAIN_TASKS: Tasks = {ask_position: 0.5, ask_caption: 0.5}
STYLED_TASKS: Tasks = {
    ask_position: 0.3,
    ask_caption: 0.3,
    ask_numeral: 0.1,
    ask_parity: 0.05,
    ask_parities: 0.1,
    ask_row: 0.1,
    ask_presence: 0.05,
}


def plain(rng: np.random.Generator) -> Style:
    """White on black, always."""
    return Style()


def mild(rng: np.random.Generator) -> Style:
    """Half of the clients' ranges, without slant and stroke."""
    return draw_style(rng, strength=0.5)


def like_a_client(rng: np.random.Generator) -> Style:
    """Draw the style of a client of another federation, for the held-out figures only."""
    return client_style(int(rng.integers(2**31)), seed=int(rng.integers(1000, 2**31)))


def jitter(tiles: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Shift each tile by up to one pixel in each direction, to augment 800 scans."""
    padded = np.pad(tiles, ((0, 0), (1, 1), (1, 1)))
    shifts = rng.integers(0, 3, (len(tiles), 2))
    return np.stack([p[y : y + 16, x : x + 16] for p, (y, x) in zip(padded, shifts, strict=True)])


def draw_example(tasks: Tasks, styles: Styles, pool: Ints, rng: np.random.Generator) -> Example:
    """Draw one example: four scans, a task by its weight, a style."""
    chosen = rng.choice(pool, 4, replace=False)
    writer = list(tasks)[rng.choice(len(tasks), p=list(tasks.values()))]
    scans = load_scans()
    question, answer = writer(scans.labels[chosen], rng)
    image = render(jitter(scans.ink[chosen], rng), styles(rng), rng)
    turns = (Turn("user", f"{IMAGE_MARKER}\n{question}"), Turn("assistant", answer))
    return Example("-".join(map(str, chosen)), (KeptImage(image),), turns)
