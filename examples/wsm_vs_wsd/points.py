"""The weights of a run after some of its steps, and merges of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from wsm_megatron.kernels import weighted_sum
from wsm_megatron.schedule.decay import coefficients


@dataclass(kw_only=True)
class Points:
    """Points that a run has passed through.

    Attributes:
        steps: of the points, ascending.
        weights: (elements,) float32 each: main params, and float32 buffers.
        means: of the block of steps that ends in the point, where block means were kept; the
            first point ends no block.
    """

    steps: list[int] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Points:
        return cls(**torch.load(path))

    def at(self, step: int) -> torch.Tensor:
        return self.weights[self.steps.index(step)]

    def window(self, length: int, interval: int, end: int) -> list[int]:
        """Steps of the points from ``end - length`` to ``end``, both included: the decay that a
        merge of them stands for begins in the first."""
        return list(range(end - length, end + 1, interval))

    def merged(self, decay: str, length: int, interval: int, end: int) -> torch.Tensor:
        """As ``wsm merge --window-iterations length --every interval --to end`` merges."""
        steps = self.window(length, interval, end)
        return merge([self.at(step) for step in steps], coefficients(steps, decay))

    def merged_blocks(self, decay: str, length: int, interval: int, end: int) -> torch.Tensor:
        """The same of block means: those of the blocks that fill the window."""
        steps = self.window(length, interval, end)[1:]
        means = [self.means[self.steps.index(step) - 1] for step in steps]
        return merge(means, coefficients(steps, decay))


def merge(weights: Sequence[torch.Tensor], c: Sequence[float]) -> torch.Tensor:
    """(elements,) of the points' dtype: summed in float64, rounded once."""
    merged = torch.empty_like(weights[0])
    weighted_sum(weights, [c], [merged])
    return merged


class BlockMean:
    """The mean of the weights that are added, in float64."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, weights: torch.Tensor) -> None:
        self._sum = weights.double() if self._sum is None else self._sum.add_(weights)
        self._count += 1

    def take(self) -> torch.Tensor:
        """The mean as float32; the next one starts empty."""
        assert self._sum is not None
        mean = (self._sum / self._count).float()
        self._sum, self._count = None, 0
        return mean
