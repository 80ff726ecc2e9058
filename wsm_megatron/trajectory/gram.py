"""Inner products of the same tensors in several checkpoints, added up tile by tile in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 2**14
"""Elements of each checkpoint that are multiplied at a time: with 12 of them 1.5 MiB."""

Group = tuple[str, str]
"""A role, and a layer or another part of the model."""


@dataclass(frozen=True)
class Gram:
    """Inner products over some elements.

    Attributes:
        elements: how many.
        products: (n, n) float64, of the rows θ_0, θ_1 − θ_0, ..., θ_k − θ_0. Differences of
            neighbours are small beside θ itself: so no product of two of them drowns.
        nonfinite: of each checkpoint, how many elements are NaN or Inf; they count as zero.
    """

    elements: int
    products: np.ndarray
    nonfinite: tuple[int, ...]

    def __add__(self, other: Gram) -> Gram:
        counts = zip(self.nonfinite, other.nonfinite, strict=True)
        return Gram(
            self.elements + other.elements,
            self.products + other.products,
            tuple(a + b for a, b in counts),
        )


class GramSums:
    """Sums for every group, of one thread: ``add`` takes a tile of all checkpoints."""

    def __init__(self, checkpoints: int):
        self._rows = torch.empty(checkpoints, BLOCK, dtype=torch.float64)
        self._products: dict[Group, torch.Tensor] = {}
        self._elements: dict[Group, int] = {}
        self._nonfinite: dict[Group, torch.Tensor] = {}

    def add(self, group: Group, values: Sequence[torch.Tensor]) -> None:
        """One-dimensional floating tensors of one size, a checkpoint each, oldest first."""
        n = len(self._rows)
        assert len(values) == n
        if group not in self._products:
            self._products[group] = torch.zeros(n, n, dtype=torch.float64)
            self._elements[group] = 0
            self._nonfinite[group] = torch.zeros(n, dtype=torch.int64)
        self._elements[group] += values[0].numel()
        for start in range(0, values[0].numel(), BLOCK):
            parts = [one[start : start + BLOCK] for one in values]
            rows = self._rows[:, : parts[0].numel()]
            self._products[group] += self._multiplied(rows, parts, group)

    def sums(self) -> dict[Group, Gram]:
        return {
            group: Gram(
                self._elements[group],
                products.numpy().copy(),
                tuple(self._nonfinite[group].tolist()),
            )
            for group, products in self._products.items()
        }

    def _multiplied(
        self, rows: torch.Tensor, parts: Sequence[torch.Tensor], group: Group
    ) -> torch.Tensor:
        for row, part in zip(rows, parts, strict=True):
            row.copy_(part)
        rows[1:] -= rows[0]
        products = rows @ rows.T
        if bool(torch.isfinite(products).all()):
            return products
        for row, part in zip(rows, parts, strict=True):
            row.copy_(part)
        bad = ~torch.isfinite(rows)
        self._nonfinite[group] += bad.sum(1)
        rows[:, bad.any(0)] = 0.0
        rows[1:] -= rows[0]
        return rows @ rows.T


def added(many: Iterable[dict[Group, Gram]]) -> dict[Group, Gram]:
    """The sums of several threads or ranks together, group by group."""
    found: dict[Group, Gram] = {}
    for sums in many:
        for group, gram in sums.items():
            found[group] = found[group] + gram if group in found else gram
    return dict(sorted(found.items()))
