"""The demo's data: scanned handwritten digits, four to a mosaic, one style per client.

The scans are the UCI handwritten digits that scikit-learn bundles (1,797 scans of 8 x 8 pixels),
each enlarged to 16 x 16. Four of them make a 32 x 32 RGB mosaic, about which the tasks ask.

Scans are split once, by digit, into four disjoint subsets: pretraining of the base, its validation,
federated training, federated test. No two clients share a training scan, up to
`max_disjoint_clients` clients; beyond that they take the shares in turn. Test and validation scans
are common to all clients, each in its own style.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pilot_flwr.config.rules import at_least, one_of
from pilot_flwr.data.demo.questions import BLANK, WRITERS, Style, draw_style, render
from pilot_flwr.data.examples import IMAGE_MARKER, Example, KeptImage, Turn
from pilot_flwr.errors import ConfigError

TASKS: tuple[str, ...] = tuple(WRITERS)
"""Tasks that a federation over the digits can have."""

SPLIT_SHARES = {"pretraining": 0.45, "validation": 0.05, "train": 0.30, "test": 0.20}
"""Share of each digit's scans in each disjoint subset."""

_SPLIT_SEED = 20250127  # the base has seen the pretraining scans, so no run may move the split
_TILE = 16
_STREAM = {"train": 0, "test": 1, "validation": 2}
Subset = Literal["pretraining", "validation", "train", "test"]
ClientSplit = Literal["train", "test", "validation"]
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float32]


class Scans(NamedTuple):
    """All source scans.

    ``ink`` has shape (1797, 16, 16) with values in [0, 1], 1 being full ink; ``labels`` has
    shape (1797,).
    """

    ink: _Floats
    labels: _Ints


@lru_cache(maxsize=1)
def load_scans() -> Scans:
    """Read the scans and enlarge each to 16 x 16 pixels (bilinear)."""
    from sklearn.datasets import load_digits  # takes two seconds, which a look at `TASKS` need not

    images, labels = load_digits(return_X_y=True)
    small = (images.reshape(-1, 8, 8) * (255.0 / 16.0)).round().astype(np.uint8)
    size = (_TILE, _TILE)
    large = [Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR) for scan in small]
    ink = (np.stack([np.asarray(scan) for scan in large]) / np.float32(255)).astype(np.float32)
    scans = Scans(ink, labels.astype(np.int64))
    for array in scans:
        array.setflags(write=False)
    return scans


def scan_indices(subset: Subset) -> _Ints:
    """Return the indices of one subset's source scans, the same for every seed."""
    one_of("subset", subset, tuple(SPLIT_SHARES))
    return np.sort(np.concatenate(_by_digit(subset)))


def max_disjoint_clients() -> int:
    """Count of clients up to which no two share a training scan."""
    return min(len(scans) for scans in _by_digit("train"))


def client_scan_indices(client_index: int, *, num_clients: int) -> _Ints:
    """Source scans of one client's training examples, every digit among them."""
    _check_client(client_index, num_clients)
    shares = min(num_clients, max_disjoint_clients())
    return np.sort(np.concatenate([s[client_index % shares :: shares] for s in _by_digit("train")]))


def _by_digit(subset: Subset) -> list[_Ints]:
    """List the scans of a subset, one shuffled array per digit."""
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
    """Numbers of training examples, spread evenly over 0.6 to 1.4 times the mean.

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
    """Draw one client's acquisition style from the seed and the client's index alone.

    Its colours, blur, shading and noise come from ranges twice as wide as the base model's
    pretraining; slant and stroke are traits that the base has never seen.
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
    split: ClientSplit,
    num_examples: int,
    seed: int,
    rotation: float = 0.0,
    mirrored: bool = False,
) -> list[Example]:
    """Examples of one client: its task, its scans, its style.

    An id ends in the four source scans, so that an answer can be checked against their labels;
    a place without a digit is ``_``.
    """
    one_of("task", task, TASKS)
    one_of("split", split, tuple(_STREAM))
    at_least("num_examples", num_examples, 1)
    at_least("seed", seed, 0)
    own = client_style(client_index, seed=seed)
    style = replace(own, rotation=rotation, mirrored=mirrored)
    pool = client_scan_indices(client_index, num_clients=num_clients)
    if split != "train":
        pool = scan_indices(split)
    stream = [seed, client_index, TASKS.index(task), _STREAM[split]]
    rng = np.random.default_rng(stream)
    return [_example(f"{split}/{n}", task, pool, style, rng) for n in range(num_examples)]


def _example(name: str, task: str, pool: _Ints, style: Style, rng: np.random.Generator) -> Example:
    scans = load_scans()
    chosen = _choose(task, pool, rng)
    filled = chosen != BLANK
    labels = np.where(filled, scans.labels[chosen], BLANK)
    question, answer = WRITERS[task](labels, rng)
    ink = scans.ink[chosen] * filled[:, None, None].astype(np.float32)
    return Example(
        id=f"{name}/" + "-".join(str(scan) if scan != BLANK else "_" for scan in chosen),
        images=(KeptImage(render(ink, style, rng)),),
        turns=(Turn("user", f"{IMAGE_MARKER}\n{question}"), Turn("assistant", answer)),
    )


def _choose(task: str, pool: _Ints, rng: np.random.Generator) -> _Ints:
    """Four different scans, except for two tasks.

    For counting, every count from 0 to 4 is equally likely; for grounding, the page has one digit
    or two different ones, equally likely, and the other places are blank.
    """
    if task == "grounding":
        return _choose_few(pool, rng)
    if task != "counting":
        return rng.choice(pool, 4, replace=False)
    odd = load_scans().labels[pool] % 2 == 1
    count = int(rng.integers(5))
    parts = (rng.choice(pool[odd], count, False), rng.choice(pool[~odd], 4 - count, False))
    return rng.permutation(np.concatenate(parts))


def _choose_few(pool: _Ints, rng: np.random.Generator) -> _Ints:
    labels = load_scans().labels[pool]
    first = int(rng.integers(len(pool)))
    second = int(rng.choice(np.flatnonzero(labels != labels[first])))
    other = pool[second] if rng.integers(2) else BLANK
    return rng.permutation(np.array([pool[first], other, BLANK, BLANK]))


def _check_client(client_index: int, num_clients: int) -> None:
    at_least("num_clients", num_clients, 1)
    if not 0 <= client_index < num_clients:
        raise ConfigError(f"`client_index` is {client_index} but must be 0 to {num_clients - 1}.")
