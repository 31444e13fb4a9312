"""The demo's data: scanned handwritten digits, four to a mosaic, one style per client.

The scans are the UCI handwritten digits that scikit-learn bundles (1,797 scans of 8 x 8 pixels),
each enlarged to 16 x 16. Four of them make a 32 x 32 RGB mosaic, about which the tasks ask.

Scans are split once, by digit, into four disjoint subsets: pretraining of the base, its validation,
federated training, federated test. No two clients share a training scan, up to
`max_disjoint_clients` clients; beyond that they take the shares in turn. Test and validation scans
are common to all clients, each in its own style.

To add a task, write its question and answer as a function of four digits and a generator, and
append it to `WRITERS`: a task's position seeds its examples. To add a trait of a style, give
`Style` a field with a neutral default, draw it in `draw_style` and apply it in `render`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pilot_flwr.config.rules import at_least, one_of
from pilot_flwr.data.examples import IMAGE_MARKER, Example, KeptImage, Turn
from pilot_flwr.errors import ConfigError

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float32]

SPLIT_SHARES = {"pretraining": 0.45, "validation": 0.05, "train": 0.30, "test": 0.20}
"""Share of each digit's scans in each disjoint subset."""

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_SPLIT_SEED = 20250127  # the base has seen the pretraining scans, so no run may move the split
_TILE = 16
_STREAM = {"train": 0, "test": 1, "validation": 2}


def ask_position(labels: _Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the digit at one of the four positions; the answer is a word."""
    place = int(rng.integers(4))
    asked = _pick(
        rng, "What digit is at the {}?", "Which digit is at the {}?", "Name the digit at the {}."
    )
    return asked.format(POSITIONS[place]), WORDS[labels[place]]


def ask_count(labels: _Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask how many of the four digits are odd; the answer is a numeral."""
    asked = _pick(
        rng, "How many digits are odd?", "How many of the digits are odd?", "Count the odd digits."
    )
    return asked, str(int((labels % 2).sum()))


def ask_caption(labels: _Ints, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for a caption; the answer names the four digits in reading order."""
    asked = _pick(rng, "Describe the image.", "Write a short caption.", "What does the image show?")
    first, second, third, fourth = (WORDS[label] for label in labels)
    return asked, f"the digits {first}, {second}, {third} and {fourth}"


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


Writer = Callable[[_Ints, np.random.Generator], tuple[str, str]]
"""From the four digits and a generator to a question and its answer."""

WRITERS: dict[str, Writer] = {
    "vqa": ask_position,
    "counting": ask_count,
    "captioning": ask_caption,
}

TASKS: tuple[str, ...] = tuple(WRITERS)
"""Tasks that a federation over the digits can have, all scored by exact match."""


@dataclass(frozen=True)
class Style:
    """A client's acquisition style; by default white ink on black paper, like the scans."""

    ink: tuple[float, float, float] = (1.0, 1.0, 1.0)
    paper: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slant: float = 0.0
    stroke: float = 1.0
    blur: float = 0.0
    shading: float = 0.0
    shading_angle: float = 0.0
    noise: float = 0.0


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


def render(tiles: _Floats, style: Style, rng: np.random.Generator) -> Image.Image:
    """Compose four scans into one page and render it in a style."""
    tile = tiles.shape[-1]
    size = 2 * tile
    if style.slant:
        tiles = np.stack([_sheared(scan, style.slant) for scan in tiles])
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


def _sheared(scan: _Floats, slant: float) -> _Floats:
    """Shear a scan about its centre row; ink that leaves it is lost."""
    sheet = Image.fromarray((scan * 255).round().astype(np.uint8))
    matrix = (1.0, slant, -slant * len(scan) / 2, 0.0, 1.0, 0.0)
    moved = sheet.transform(sheet.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(moved, np.float32) / np.float32(255)


class Scans(NamedTuple):
    """All scans: `ink` in [0, 1], shape (1797, 16, 16), and `labels`, shape (1797,)."""

    ink: _Floats
    labels: _Ints


@lru_cache(maxsize=1)
def load_scans() -> Scans:
    """Read the scans and enlarge each to 16 x 16 pixels (bilinear)."""
    from sklearn.datasets import load_digits  # takes two seconds

    images, labels = load_digits(return_X_y=True)
    small = (images.reshape(-1, 8, 8) * (255.0 / 16.0)).round().astype(np.uint8)
    size = (_TILE, _TILE)
    large = [Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR) for scan in small]
    ink = (np.stack([np.asarray(scan) for scan in large]) / np.float32(255)).astype(np.float32)
    scans = Scans(ink, labels.astype(np.int64))
    for array in scans:
        array.setflags(write=False)
    return scans


def scan_indices(subset: str) -> _Ints:
    """Return the indices of a subset's scans, the same for every seed."""
    one_of("subset", subset, tuple(SPLIT_SHARES))
    return np.sort(np.concatenate(_by_digit(subset)))


def max_disjoint_clients() -> int:
    """Return the largest number of clients of which no two share a training scan."""
    return min(len(scans) for scans in _by_digit("train"))


def client_scan_indices(client_index: int, *, num_clients: int) -> _Ints:
    """Return the indices of one client's training scans, every digit among them."""
    at_least("num_clients", num_clients, 1)
    if not 0 <= client_index < num_clients:
        raise ConfigError(f"`client_index` is {client_index} but must be 0 to {num_clients - 1}.")
    shares = min(num_clients, max_disjoint_clients())
    return np.sort(np.concatenate([s[client_index % shares :: shares] for s in _by_digit("train")]))


@lru_cache(maxsize=len(SPLIT_SHARES))
def _by_digit(subset: str) -> list[_Ints]:
    """Return a subset's scans, one shuffled array per digit."""
    rng = np.random.default_rng(_SPLIT_SEED)
    labels = load_scans().labels
    names = list(SPLIT_SHARES)
    cuts = np.cumsum(list(SPLIT_SHARES.values()))[:-1]
    chosen = []
    for digit in range(10):
        scans = rng.permutation(np.flatnonzero(labels == digit))
        parts = np.split(scans, np.round(cuts * len(scans)).astype(int))
        chosen.append(parts[names.index(subset)])
    return chosen


def client_sizes(num_clients: int, mean: int) -> list[int]:
    """Return numbers of training examples, spread evenly over 0.6 to 1.4 times the mean.

    Neighbouring clients get far-apart sizes, so that any grouping of neighbours is mixed.
    """
    at_least("num_clients", num_clients, 1)
    at_least("mean", mean, 1)
    if num_clients == 1:
        return [mean]
    golden = (np.arange(num_clients) * 0.6180339887498949) % 1.0
    rank = np.argsort(np.argsort(golden))
    sizes = mean * (0.6 + 0.8 * rank / (num_clients - 1))
    return [max(1, round(float(size))) for size in sizes]


def client_style(client_index: int, *, seed: int) -> Style:
    """Draw one client's acquisition style from the seed and its index alone.

    Colours, blur, shading and noise have ranges twice as wide as in the base's pretraining; the
    base has seen neither slant nor stroke.
    """
    at_least("client_index", client_index, 0)
    at_least("seed", seed, 0)
    rng = np.random.default_rng([seed, client_index])
    return replace(
        draw_style(rng, strength=1.0),
        slant=float(rng.choice((-1, 1)) * rng.uniform(0.1, 0.3)),
        stroke=float(2 ** rng.uniform(-0.75, 0.75)),
    )


def client_examples(
    task: str,
    *,
    client_index: int,
    num_clients: int,
    split: str,
    num_examples: int,
    seed: int,
) -> list[Example]:
    """Return the examples of one client: its task, its scans, its style.

    An id ends in the four source scans, so that an answer can be checked against their labels.
    """
    one_of("task", task, TASKS)
    one_of("split", split, tuple(_STREAM))
    at_least("num_examples", num_examples, 1)
    at_least("seed", seed, 0)
    style = client_style(client_index, seed=seed)
    pool = client_scan_indices(client_index, num_clients=num_clients)
    if split != "train":
        pool = scan_indices(split)
    rng = np.random.default_rng([seed, client_index, TASKS.index(task), _STREAM[split]])
    return [_example(f"{split}/{n}", task, pool, style, rng) for n in range(num_examples)]


def _example(name: str, task: str, pool: _Ints, style: Style, rng: np.random.Generator) -> Example:
    scans = load_scans()
    chosen = _choose(task, pool, rng)
    question, answer = WRITERS[task](scans.labels[chosen], rng)
    return Example(
        id=f"{name}/" + "-".join(map(str, chosen)),
        images=(KeptImage(render(scans.ink[chosen], style, rng)),),
        turns=(Turn("user", f"{IMAGE_MARKER}\n{question}"), Turn("assistant", answer)),
    )


def _choose(task: str, pool: _Ints, rng: np.random.Generator) -> _Ints:
    """Choose four different scans; for counting, every count from 0 to 4 is equally likely."""
    labels = load_scans().labels[pool]
    if task != "counting":
        return rng.choice(pool, 4, replace=False)
    odd = labels % 2 == 1
    count = int(rng.integers(5))
    parts = (rng.choice(pool[odd], count, False), rng.choice(pool[~odd], 4 - count, False))
    return rng.permutation(np.concatenate(parts))
