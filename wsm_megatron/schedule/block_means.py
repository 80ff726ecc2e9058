"""Block means: what a merge of means over the steps between checkpoints is equal to. Pure.

A block ends in a checkpoint. Its mean is over the points after every K-th step since the checkpoint
before, and the checkpoint itself. A merge of means B_j of n_j points is a merge of all points::

    sum_j c_j B_j = sum_j sum_(t in block j) c_j / n_j theta_t

so within block j the effective LR falls by c_j in n_j equal steps: it is piecewise linear, and at
the edges of the blocks it is what a merge of the checkpoints alone has behind them. For n evenly
spaced blocks and a decay s it is s(i / n) behind block i: the curve of the decay from s(0) = 1 on,
drawn by straight lines between n + 1 of its points, down to 0 behind the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Block:
    """The steps whose mean stands for a checkpoint.

    Attributes:
        every: K, steps between two points.
        first: iteration of the oldest point. last: of the newest, the checkpoint.
        points: how many there are, ``last`` among them; all others are multiples of K.
    """

    every: int
    first: int
    last: int
    points: int

    @property
    def iterations(self) -> tuple[int, ...]:
        """Of the points, oldest first."""
        inner = range(-(-self.first // self.every) * self.every, self.last, self.every)
        points = (*inner, self.last)
        assert len(points) == self.points and points[0] == self.first, self
        return points

    def describe(self) -> dict[str, Any]:
        """For a merge's provenance, which ``Block(**...)`` reads."""
        return asdict(self)


def explicit(
    coefficients: Sequence[float], blocks: Sequence[Block]
) -> tuple[tuple[int, ...], tuple[Fraction, ...]]:
    """The merge of single checkpoints that a merge of block means is equal to, exactly.

    Args:
        coefficients: of the blocks, oldest first.

    Returns:
        iterations, oldest first, and the coefficient of each.
    """
    shares = [
        (iteration, Fraction(coefficient) / block.points)
        for coefficient, block in zip(coefficients, blocks, strict=True)
        for iteration in block.iterations
    ]
    return tuple(i for i, _ in shares), tuple(share for _, share in shares)
