"""Paired differences between arms, and their 95 % t-intervals. Pure.

The intervals are of one comparison each: nothing corrects for the number of comparisons of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: of the values. half: of the width of its 95 % t-interval; NaN for a single seed.
        count: seeds.
    """

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out 0; else 0, as for a single seed."""
        if self.low > 0:
            return 1
        return -1 if self.high < 0 else 0


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, at least one."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, t_quantile(0.975, n - 1) * math.sqrt(variance / n), n)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """Of ``one - other``, seed by seed: those that both have."""
    return interval([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's distribution, for a probability above 1/2: by bisection."""
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _t_within(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_within(t: float, freedom: int) -> float:
    """P(|T| < t): the finite series for whole degrees of freedom.

    Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = term if freedom > 1 or not odd else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, without ties: NaN for fewer than three."""
    if len(x) < 3:
        return math.nan
    a, b = (_ranks(values) for values in (x, y))
    n = len(a)
    return 1 - 6 * sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (n * (n**2 - 1))


def _ranks(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0] * len(values)
    for rank, position in enumerate(order):
        ranks[position] = rank
    return ranks
