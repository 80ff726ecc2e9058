"""What is told by inner products is what the points themselves say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trajectory.paths import drifting_jitter, geometry, gram, jitter, straight, walk
from wsm_megatron.schedule.decay import DECAYS, coefficients
from wsm_megatron.trajectory.geometry import Geometry
from wsm_megatron.trajectory.gram import BLOCK, GramSums, added
from wsm_megatron.trajectory.variance import update_variance


def lengths(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points, axis=1)


@given(st.integers(2, 9), st.integers(0, 1000))
def test_geometry_is_that_of_the_points(count: int, seed: int) -> None:
    points = walk(count, seed)
    found = geometry(points)
    updates = np.diff(points, axis=0)
    np.testing.assert_allclose(found.norms, lengths(points), rtol=1e-12)
    np.testing.assert_allclose(found.steps, lengths(updates), rtol=1e-12)
    np.testing.assert_allclose(found.to_mean, lengths(points - points.mean(0)), rtol=1e-10)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairwise(updates)]
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-12)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.testing.assert_allclose(found.squared_distances, apart**2, rtol=1e-10, atol=1e-9)
    weights = coefficients(range(count), "ema")
    away = lengths(points - np.asarray(weights) @ points)
    np.testing.assert_allclose(found.to_merge(weights), away, rtol=1e-9)


def test_the_plane_shows_distances_of_points_that_lie_in_one() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 40)) + rng.normal(size=40)
    places, shares = geometry(flat).projected()
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.testing.assert_allclose(apart**2, geometry(flat).squared_distances, atol=1e-9)
    assert shares.sum() == pytest.approx(1.0) and (places[-1] >= 0).all()
    assert geometry(flat[:2]).projected()[0].shape == (2, 2)


def test_sums_over_tiles_and_threads_are_the_whole() -> None:
    values = torch.randn(3, 2 * BLOCK + 77).to(torch.bfloat16)
    points = values.double().numpy()
    one, other = GramSums(3), GramSums(3)
    one.add(("model", "a"), list(values[:, :50]))
    other.add(("model", "a"), list(values[:, 50:]))
    total = added([one.sums(), other.sums()])["model", "a"]
    np.testing.assert_allclose(total.products, gram(points).products, rtol=1e-12, atol=1e-9)
    assert total.elements == values.shape[1] and total.nonfinite == (0, 0, 0)


def test_differences_far_below_the_weights_keep_their_digits() -> None:
    """Of products of the weights themselves, 1e15 here, a difference of 1e-3 would not be left."""
    base = torch.full((100,), 3.0e6, dtype=torch.float64)
    sums = GramSums(2)
    sums.add(("model", "a"), [base, base + 2.0**-10])
    found = Geometry(sums.sums()["model", "a"])
    assert found.steps[0] == 10 * 2.0**-10


def test_nan_is_counted_where_it_is_and_counts_as_nothing() -> None:
    values = torch.randn(3, 100)
    clean = values.double().numpy().copy()
    values[0, 7], values[2, 8], values[2, 9] = torch.nan, torch.inf, torch.nan
    clean[:, [7, 8, 9]] = 0.0
    sums = GramSums(3)
    sums.add(("model", "a"), list(values))
    found = sums.sums()["model", "a"]
    assert found.nonfinite == (1, 0, 2)
    np.testing.assert_allclose(found.products, gram(clean).products, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(walk, (0, 1, 0)), (jitter, (0, 0, 1)), (straight, (0.917, 0.083, 0))],
)
def test_updates_are_told_apart(kind, expected: tuple[float, float, float]) -> None:
    points = kind(16, 3)
    found = update_variance(geometry(points).updates, range(16))
    assert found.shares == pytest.approx(expected, abs=0.05)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert found.mean == pytest.approx((steps**2).mean(), rel=0.05)


def test_drift_and_jitter_together_are_told_apart() -> None:
    """|d|² is a quarter of one point's noise, of which an update has twice."""
    found = update_variance(geometry(drifting_jitter(24, 1)).updates, range(24))
    assert found.shares == pytest.approx((0.25 / 2.25, 0, 2 / 2.25), abs=0.05)


def test_uneven_spacing_changes_no_part() -> None:
    chosen = [0, 1, 4, 5, 9, 11, 12, 17, 20, 22, 23, 29]
    points = walk(30, 2)[chosen]
    found = update_variance(geometry(points).updates, chosen)
    assert found.shares == pytest.approx((0, 1, 0), abs=0.05)


@pytest.mark.parametrize("decay", DECAYS)
def test_what_a_decay_averages_away_is_what_a_merge_lacks(decay: str) -> None:
    """Against merges that are made: of jitter by its distance from the point that it is around, of
    a walk by the squared length of the updates that remain."""
    weights = np.asarray(coefficients(range(12), decay))
    noise = jitter(12, 4)
    centre = noise - _centre(4)
    left = np.square(weights @ centre).sum() / np.square(centre).sum(1).mean()
    found = update_variance(geometry(noise).updates, range(12))
    assert found.averaged_away(weights) == pytest.approx(1 - left, abs=0.05)
    path = walk(12, 5)
    away = np.square(weights @ path - path[0]).sum() / np.square(np.diff(path, axis=0)).sum()
    found = update_variance(geometry(path).updates, range(12))
    assert found.averaged_away(weights) == pytest.approx(1 - away, abs=0.06)


def test_a_line_s_progress_is_kept_as_the_effective_lr_says() -> None:
    points = np.arange(6)[:, None] * np.ones((6, 8))
    found = update_variance(geometry(points).updates, range(6))
    weights = np.asarray(coefficients(range(6), "1-sqrt"))
    assert found.shares == pytest.approx((1, 0, 0))
    assert found.progress_kept(weights) == pytest.approx((weights @ points)[0] / points[-1][0])


def _centre(seed: int) -> np.ndarray:
    """The point that :func:`.jitter` is around: its first draw."""
    return np.random.default_rng(seed).normal(size=3000) * 10
