"""What the updates of a window are made of, and how much of it a decay averages away. Pure.

The model, in which a checkpoint is a point on a path, seen with some noise::

    θ_j = path_j + ε_j        path_j − path_{j−1} = τ_j·d + n_j

``d`` is the drift, where training goes; ``n_j`` is a random walk, independent steps that stay;
``ε_j`` is jitter, which is gone by the next checkpoint. ``τ_j`` is the length of the interval over
the mean length. Then, with D = |d|², S = E|n|² for τ = 1, J = E|ε|²::

    E g_i·g_j = τ_i·τ_j·D                  |i − j| > 1
                τ_i·τ_j·D − J              |i − j| = 1
                τ_i²·D + τ_i·S + 2J        i = j

so the Gram matrix of the updates has all three, by its distance from the diagonal. Jitter is what a
merge averages: of it Σ c_j² is left. Of the walk a decay keeps the share Σ w_i²·τ_i / Σ τ_i, of the
drift Σ w_i·τ_i / Σ τ_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsm_megatron.schedule.decay import effective_lr


@dataclass(frozen=True)
class UpdateVariance:
    """The three parts of a mean squared update: they sum to ``mean``, but for what is cut at zero.

    Attributes:
        drift: τ²·D, its square; ``walk``: S; ``jitter``: 2J. Each at least 0.
        intervals: τ_1 ... τ_k.
    """

    drift: float
    walk: float
    jitter: float
    intervals: tuple[float, ...]

    @property
    def mean(self) -> float:
        return self.drift + self.walk + self.jitter

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of drift, walk and jitter."""
        total = self.mean or 1.0
        return self.drift / total, self.walk / total, self.jitter / total

    def averaged_away(self, coefficients: Sequence[float]) -> float:
        """The share of the variance of the updates, walk and jitter, that a merge does not have."""
        noise = self.walk + self.jitter
        if noise <= 0:
            return 0.0
        lengths, w = np.asarray(self.intervals), np.asarray(effective_lr(coefficients))
        walk = 1.0 - float(lengths @ w**2 / lengths.sum())
        jitter = 1.0 - sum(c * c for c in coefficients)
        return (self.walk * walk + self.jitter * jitter) / noise

    def progress_kept(self, coefficients: Sequence[float]) -> float:
        """The share of the window's drift that a merge keeps."""
        lengths, w = np.asarray(self.intervals), np.asarray(effective_lr(coefficients))
        return float(lengths @ w / lengths.sum())


def update_variance(updates: np.ndarray, positions: Sequence[float]) -> UpdateVariance:
    """Drift, walk and jitter of updates.

    Few updates say little: without two that are no neighbours (k < 3) drift and jitter cannot be
    told apart, and a negative product of neighbours counts as jitter, a positive one as drift; one
    alone counts as walk.

    Args:
        updates: (k, k), :attr:`.Geometry.updates`.
        positions: of the k + 1 checkpoints, not decreasing.
    """
    lengths = np.diff(np.asarray(positions, dtype=float))
    mean = lengths.mean()
    tau = lengths / mean if mean > 0 and (lengths > 0).all() else np.ones(len(lengths))
    products = np.outer(tau, tau)
    near, far = np.diag(updates, 1), np.triu(updates, 2)
    weights = np.triu(products, 2)
    if weights.sum() > 0:
        drift = max(float(far.sum() / weights.sum()), 0.0)
    elif near.size:
        drift = max(float(near.sum() / np.diag(products, 1).sum()), 0.0)
    else:
        drift = 0.0
    jitter = 0.0
    if near.size:
        jitter = max(drift * float(np.diag(products, 1).mean()) - float(near.mean()), 0.0)
    squares = float(np.diag(updates).mean())
    going = drift * float((tau**2).mean())
    walk = max(squares - going - 2 * jitter, 0.0)
    return UpdateVariance(going, walk, 2 * jitter, tuple(tau.tolist()))
