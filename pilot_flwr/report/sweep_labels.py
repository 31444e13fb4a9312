"""The names of a sweep's methods and variants, as short as they can be told apart."""

from collections.abc import Iterable

from pilot_flwr.report.fitting import in_lines
from pilot_flwr.sweeping.table import UNTOUCHED


def short_labels(labels: Iterable[str]) -> dict[str, str]:
    """Shorten what `pilot_flwr.sweeping.rows.label_of` made, a method and the settings swept over.

    A setting that all lines have alike is left out, and of a setting's name only the end stays
    that no other one has.

    Parameters
    ----------
    labels : iterable of str
        All lines of a table.

    Returns
    -------
    dict
        Label → short label, in lines; all are different.
    """
    labels = list(labels)
    given = [label for label in labels if label != UNTOUCHED]
    alike = common_settings(given)
    ends = _ends({word.split("=")[0] for label in given for word in label.split() if "=" in word})
    short = {label: " ".join(_words(label, alike, ends)) for label in given}
    if len(set(short.values())) < len(short):
        short = {label: label for label in given}
    return {label: in_lines(short.get(label, label)) for label in labels}


def common_settings(labels: Iterable[str]) -> list[str]:
    """Return the settings that all of several lines have alike, as ``name=value``."""
    variants = [label.split()[1:] for label in labels if label != UNTOUCHED]
    if len(variants) < 2:
        return []
    return [word for word in variants[0] if "=" in word and all(word in v for v in variants)]


def shortened(labels: Iterable[str]) -> str:
    """Say what `short_labels` left out, empty if it was nothing."""
    labels = list(labels)
    words = ""
    if alike := common_settings(labels):
        words += f" All lines have {' '.join(alike)}."
    names = {word.split("=")[0] for label in labels for word in label.split() if "=" in word}
    ends = _ends(names - {word.split("=")[0] for word in alike})
    if cut := [f"{end} is {name}" for name, end in sorted(ends.items()) if end != name]:
        words += f" In the names, {', '.join(cut)}."
    return words


def _words(label: str, alike: list[str], ends: dict[str, str]) -> list[str]:
    words = []
    for word in label.split():
        name, equals, value = word.partition("=")
        words += [] if word in alike else [ends.get(name, name) + equals + value]
    return words


def _ends(names: set[str]) -> dict[str, str]:
    """Return the shortest end of every dotted name that no other name has."""
    ends = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in names - {name}]
        unlike = (t for t in tails if not any(other.endswith(f".{t}") for other in others))
        ends[name] = next(unlike, name)
    return ends
