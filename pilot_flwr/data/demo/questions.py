"""The demo's questions about a mosaic of four digits, and the styles in which clients see it.

To add a task, write its question and answer as a function of four digits and a generator, and
append it to `WRITERS`: a task's position seeds its examples. A task that is not scored by exact
match has a row in `METRIC_OF`. To add a trait of a style, give `Style` a field with a neutral
default, draw it in `draw_style` and apply it in `render`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

POSITIONS = ("top left", "top right", "bottom left", "bottom right")

BLANK = -1
"""Label of a position without a digit."""

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
"""All tasks: the demo's three, then those of the scenarios (docs/explanation/scenarios.md)."""

METRIC_OF = {"columns": "rouge_l", "grounding": "grounding_quarters"}
"""Metric of a task that is not scored by exact match."""


@dataclass(frozen=True)
class Style:
    """A client's acquisition style."""

    ink: tuple[float, float, float] = (1.0, 1.0, 1.0)
    paper: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slant: float = 0.0
    stroke: float = 1.0
    blur: float = 0.0
    shading: float = 0.0
    shading_angle: float = 0.0
    noise: float = 0.0
    rotation: float = 0.0
    mirrored: bool = False


PLAIN = Style()
"""White ink on black paper, as the scans are."""


def draw_style(rng: np.random.Generator, strength: float) -> Style:
    """Draw colours, blur, shading and noise scaled by `strength`, with neutral slant and stroke."""
    dark = rng.uniform(0.0, 0.4 * strength, 3)
    light = 1.0 - rng.uniform(0.0, 0.4 * strength, 3)
    ink, paper = (dark, light) if rng.random() < 0.5 else (light, dark)
    return Style(
        ink=(float(ink[0]), float(ink[1]), float(ink[2])),
        paper=(float(paper[0]), float(paper[1]), float(paper[2])),
        blur=float(rng.uniform(0.0, 0.8 * strength)),
        shading=float(rng.uniform(0.0, 0.6 * strength)),
        shading_angle=float(rng.uniform(0.0, 2 * np.pi)),
        noise=float(rng.uniform(0.0, 0.08 * strength)),
    )


def render(tiles: NDArray[np.float32], style: Style, rng: np.random.Generator) -> Image.Image:
    """Compose four scans into one page and render it in a style."""
    tile = tiles.shape[-1]
    size = 2 * tile
    if style.mirrored:
        tiles = tiles[:, :, ::-1]
    if style.rotation:
        tiles = np.stack([_turn(one, style.rotation) for one in tiles])
    if style.slant:
        tiles = np.stack([_shear(one, style.slant) for one in tiles])
    tiles = tiles ** np.float32(style.stroke)
    page: NDArray[Any] = tiles.reshape(2, 2, tile, tile).transpose(0, 2, 1, 3).reshape(size, size)
    if style.blur > 0:
        sheet = Image.fromarray((page * 255).round().astype(np.uint8))
        blurred = sheet.filter(ImageFilter.GaussianBlur(style.blur))
        page = np.asarray(blurred, dtype=np.float32) / 255
    colour = np.asarray(style.paper) + page[..., None] * np.subtract(style.ink, style.paper)
    rows, columns = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    ramp = rows * np.sin(style.shading_angle) + columns * np.cos(style.shading_angle)
    colour = colour * (1 - style.shading * (0.5 + ramp / np.sqrt(2)))[..., None]
    colour = colour + style.noise * rng.standard_normal(colour.shape)
    return Image.fromarray((colour.clip(0, 1) * 255).round().astype(np.uint8))


def _turn(tile: NDArray[np.float32], degrees: float) -> NDArray[np.float32]:
    """Turn one digit about its centre (bilinear); what leaves the tile is lost."""
    sheet = Image.fromarray((tile * 255).round().astype(np.uint8))
    turned = sheet.rotate(degrees, Image.Resampling.BILINEAR)
    return np.asarray(turned, dtype=np.float32) / np.float32(255)


def _shear(tile: NDArray[np.float32], slant: float) -> NDArray[np.float32]:
    """Shear one digit about its centre row (bilinear); what leaves the tile is lost."""
    sheet = Image.fromarray((tile * 255).round().astype(np.uint8))
    matrix = (1.0, slant, -slant * tile.shape[0] / 2, 0.0, 1.0, 0.0)
    sheared = sheet.transform(sheet.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(sheared, dtype=np.float32) / np.float32(255)
