"""Odd inputs: random bytes and texts, and valid ones with something wrong in them.

Everything is drawn by hypothesis, so that a failing input is made small before it is shown.
"""

import copy
import json
import string
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
Spot = tuple[Any, Any]
"""A container and a key of it."""

ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "\0",
    "a\nb",
    "\ud800",
    "\u202e\u0661\u00df",
    "../../etc/passwd",
    "/etc/passwd",
    "~nobody-is-called-this/x",
    "${oc.env:HOME}",
    "???",
    "9" * 5000,
    "x" * 100_000,
    [],
    [[]],
    {},
    {"a": {}},
    [None],
    ["a", 1],
]
"""Values that are wrong in most places."""

ODD_TOKENS: list[bytes] = [
    b"[" * 3000,
    b"{" * 3000,
    b'{"a":' * 2000,
    b"9" * 5000,
    b"-",
    b"1e999",
    b"NaN",
    b'"',
    b"\\u",
    b"\\ud800",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b",",
    b"]",
    b"}",
    b"(" * 1000,
    b"&a [*a, *a]",
    b"!!python/object:os.system",
    b"${oc.env:HOME}",
    b"\x00\x00\x00\x00\x00\x00\x00\x80",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
]
"""Pieces that are wrong in most texts and files."""


def seeded(make: Callable[[Random], T]) -> st.SearchStrategy[T]:
    """Return a strategy of what `make` makes of a random generator."""
    return st.integers(0, 2**64 - 1).map(lambda seed: make(Random(seed)))


def mutated_bytes(corpus: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return valid files with a few pieces changed, cut out, doubled, or cut short."""

    def make(random: Random) -> bytes:
        data = bytearray(random.choice(corpus))
        for _ in range(random.randint(1, 4)):
            # Formats have their headers in front: look there more often.
            reach = len(data) if random.random() < 0.5 else min(len(data), 200)
            place = random.randint(0, reach)
            kind = random.randrange(6)
            if kind == 0 and data:
                data[min(place, len(data) - 1)] ^= 1 << random.randrange(8)
            elif kind == 1:
                data[place : place + random.randint(1, 8)] = random.randbytes(random.randint(0, 8))
            elif kind == 2:
                del data[place:]
            elif kind == 3:
                del data[place : place + random.randint(1, 64)]
            elif kind == 4:
                data[place:place] = random.choice(ODD_TOKENS)
            else:
                piece = data[place : place + random.randint(1, 64)]
                data[place:place] = piece * random.randint(1, 3)
        return bytes(data)

    return seeded(make)


def files(corpus: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return mutated files mostly, random bytes sometimes."""
    return st.one_of(mutated_bytes(corpus), mutated_bytes(corpus), st.binary(max_size=300))


def spots(value: Any) -> list[Spot]:
    """Return every place in nested dicts and lists."""
    found: list[Spot] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def mutated_tree(corpus: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Return nested dicts and lists with a few values odd, gone, moved or of another name."""

    def make(random: Random) -> Any:
        tree = copy.deepcopy(random.choice(corpus))
        for _ in range(random.randint(1, 3)):
            found = spots(tree)
            if not found:
                break
            container, key = random.choice(found)
            kind = random.randrange(5)
            if kind < 3:
                container[key] = copy.deepcopy(random.choice(ODD_VALUES))
            elif kind == 3:
                del container[key]
            elif isinstance(container, dict):
                container[random_name(random)] = container.pop(key)
            else:
                container.append(container[key])
        return tree

    return seeded(make)


def json_bytes(tree: Any) -> bytes:
    """Return JSON with halves of characters, NaN and numbers of any length as they are."""
    return json.dumps(tree).encode()


def random_name(random: Random) -> str:
    """Return a short text."""
    return "".join(random.choices(string.printable, k=random.randint(0, 12)))


def texts(words: Sequence[str]) -> st.SearchStrategy[str]:
    """Return words and odd pieces put together, and random texts."""
    odd = [token.decode("latin-1") for token in ODD_TOKENS]

    def make(random: Random) -> str:
        parts = [
            random.choice(words) if random.random() < 0.6 else random.choice([*odd, "=", " ", ","])
            for _ in range(random.randint(1, 6))
        ]
        return random.choice(["", " ", " ", "="]).join(parts)

    return st.one_of(seeded(make), seeded(make), st.text(max_size=60))
