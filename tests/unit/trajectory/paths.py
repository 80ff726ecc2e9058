"""Synthetic runs: checkpoints as rows of float64, and their Gram matrix by numpy alone."""

from __future__ import annotations

import numpy as np

from wsm_megatron.trajectory.geometry import Geometry
from wsm_megatron.trajectory.gram import Gram

SIZE = 3000
"""Weights of a model."""


def gram(points: np.ndarray) -> Gram:
    rows = np.concatenate([points[:1], points[1:] - points[:1]])
    return Gram(points.shape[1], rows @ rows.T, (0,) * len(points))


def geometry(points: np.ndarray) -> Geometry:
    return Geometry(gram(points))


def start(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=SIZE) * 10


def walk(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return start(rng) + rng.normal(size=(count, SIZE)).cumsum(0)


def straight(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    direction, noise = rng.normal(size=SIZE), rng.normal(size=(count, SIZE))
    return start(rng) + np.arange(count)[:, None] * direction + 0.3 * noise.cumsum(0)


def jitter(count: int, seed: int) -> np.ndarray:
    """Noise around one point: a constant LR that has settled."""
    rng = np.random.default_rng(seed)
    return start(rng) + rng.normal(size=(count, SIZE))


def settling(count: int, seed: int) -> np.ndarray:
    """A pull back to one point, and noise (Ornstein-Uhlenbeck): between a walk and jitter."""
    rng = np.random.default_rng(seed)
    centre, away = start(rng), [rng.normal(size=SIZE)]
    for _ in range(count - 1):
        away.append(0.7 * away[-1] + rng.normal(size=SIZE))
    return centre + np.stack(away)


def decaying(count: int, seed: int) -> np.ndarray:
    """A walk whose steps fall to a tenth, as under a decaying LR."""
    rng = np.random.default_rng(seed)
    rates = np.linspace(1.0, 0.1, count)[:, None]
    return start(rng) + (rates * rng.normal(size=(count, SIZE))).cumsum(0)


def early(count: int, seed: int) -> np.ndarray:
    """The beginning of a run: each step 85 % of the last, all much the same way."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=SIZE)
    steps = 0.85 ** np.arange(count)[:, None] * (direction + rng.normal(size=(count, SIZE)))
    return start(rng) + steps.cumsum(0)


def drifting_jitter(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=SIZE)
    noise = rng.normal(size=(count, SIZE))
    return start(rng) + 0.5 * np.arange(count)[:, None] * direction + noise


KINDS = (walk, straight, jitter, settling, decaying, early, drifting_jitter)
