"""Norms, distances and angles of checkpoints, from their inner products. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsm_megatron.trajectory.gram import Gram


@dataclass(frozen=True)
class Geometry:
    """n = k + 1 checkpoints θ_0 ... θ_k, oldest first, as points.

    All lengths are Euclidean, over the elements of the Gram matrix that this is made of; squares
    are float64. Rounding may leave a square of nothing a little below zero: it counts as zero.
    """

    gram: Gram

    @property
    def count(self) -> int:
        return len(self.gram.products)

    @property
    def norms(self) -> np.ndarray:
        """(n,): |θ_j|."""
        products = self.gram.products
        squares = products[0, 0] + 2 * products[0] + np.diag(products)
        squares[0] = products[0, 0]
        return np.sqrt(np.maximum(squares, 0.0))

    @property
    def from_first(self) -> np.ndarray:
        """(n, n): (θ_i − θ_0)·(θ_j − θ_0)."""
        products = self.gram.products.copy()
        products[0, :] = products[:, 0] = 0.0
        return products

    @property
    def squared_distances(self) -> np.ndarray:
        """(n, n): |θ_i − θ_j|²."""
        inner = self.from_first
        squares = np.diag(inner)
        return np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0.0)

    @property
    def updates(self) -> np.ndarray:
        """(k, k): g_i·g_j of the updates g_i = θ_i − θ_{i−1}."""
        inner = self.from_first
        return inner[1:, 1:] - inner[1:, :-1] - inner[:-1, 1:] + inner[:-1, :-1]

    @property
    def steps(self) -> np.ndarray:
        """(k,): |θ_i − θ_{i−1}|."""
        return np.sqrt(np.maximum(np.diag(self.updates), 0.0))

    @property
    def cosines(self) -> np.ndarray:
        """(k − 1,): of the angles between successive updates; 0 where one is nothing."""
        updates, steps = self.updates, self.steps
        lengths = steps[1:] * steps[:-1]
        inner = np.diag(updates, 1)
        return np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)

    @property
    def to_mean(self) -> np.ndarray:
        """(n,): |θ_j − mean of all|."""
        return np.sqrt(np.maximum(np.diag(self._centred), 0.0))

    def to_merge(self, coefficients: Sequence[float]) -> np.ndarray:
        """(n,): |θ_j − Σ c_i θ_i|, for coefficients whose sum is 1."""
        inner, c = self.from_first, np.asarray(coefficients)
        squares = np.diag(inner) - 2 * inner @ c + c @ inner @ c
        return np.sqrt(np.maximum(squares, 0.0))

    def projected(self) -> tuple[np.ndarray, np.ndarray]:
        """The points in the plane that holds most of their spread, through their mean.

        Returns:
            (n, 2) coordinates, and the (2,) shares of the squared distances from the mean that
            each axis shows. Signs are such that the newest point lies to the right and above.
        """
        values, vectors = np.linalg.eigh(self._centred)
        places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0.0))
        if places.shape[1] < 2:
            places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
        places = places * np.where(places[-1] < 0, -1.0, 1.0)
        total = max(float(np.maximum(values, 0.0).sum()), 1e-300)
        shares = np.maximum(np.pad(values[::-1][:2], (0, max(0, 2 - len(values)))), 0.0) / total
        return places, shares

    @property
    def _centred(self) -> np.ndarray:
        inner = self.from_first
        rows = inner.mean(0)
        return inner - rows[None, :] - rows[:, None] + rows.mean()
