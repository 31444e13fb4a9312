"""Means with intervals, and paired tests, of scores over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95
ROUNDING = 1e-12
"""Scores, which are at most 1, that differ by less are the same."""


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval, None for fewer than two values."""

    mean: float
    half_width: float | None


class Paired(NamedTuple):
    """Differences of pairs: how many, their mean with its interval, and the test's p.

    `p` is that of the two-sided paired t-test against a difference of zero. It is None where there
    is no such test: for fewer than two pairs, or differences that are all the same.
    """

    pairs: int
    difference: Interval
    p: float | None


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % interval by Student's t.

    The half-width is t · s / √n, where s has n − 1 in its denominator and t is the 97.5 %
    quantile of Student's distribution with n − 1 degrees of freedom.

    Parameters
    ----------
    values : sequence of float
        At least one, independent of each other.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return Interval(mean, quantile * deviation / math.sqrt(n))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two methods over the same seeds.

    Parameters
    ----------
    values, baseline : sequence of float
        Scores of both, seed by seed.

    Notes
    -----
    Differences that are all the same, up to rounding, have no spread to test by.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    found = interval(differences)
    if max(differences) - min(differences) <= ROUNDING:
        return Paired(len(differences), found, None)
    return Paired(len(differences), found, float(stats.ttest_1samp(differences, 0.0).pvalue))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p of several tests by Holm's method; None stays None and does not count.

    The k-th smallest of m is multiplied by m − k + 1, made at least as large as those before it
    and at most 1 (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    order = sorted((p, index) for index, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted
