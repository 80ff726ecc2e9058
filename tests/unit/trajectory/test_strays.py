"""Planted strays are named; ordinary runs of every kind raise no alarm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.trajectory.paths import KINDS, SIZE, geometry, jitter, straight, walk
from wsm_megatron.trajectory.strays import Stray, find_strays

Kind = Callable[[int, int], np.ndarray]


def strays(points: np.ndarray, positions: list[int] | None = None, **more: list) -> list[Stray]:
    squared = geometry(points).squared_distances
    return find_strays(squared, positions or list(range(len(points))), **more)


def step_of(points: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(np.diff(points, axis=0), axis=1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 16])
def test_ordinary_runs_raise_no_alarm(kind: Kind, count: int) -> None:
    for seed in range(20):
        assert strays(kind(count, seed)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_windows_raise_no_alarm(kind: Kind) -> None:
    for seed in range(20):
        chosen = sorted(np.random.default_rng(seed).choice(24, size=7, replace=False).tolist())
        assert strays(kind(24, seed)[chosen], chosen) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_spike_within_the_window_is_named(kind: Kind, count: int) -> None:
    for seed in range(5):
        points, rng = kind(count, seed), np.random.default_rng(seed + 100)
        place = 1 + seed % (count - 2)
        nearby = np.linalg.norm(np.diff(points, axis=0), axis=1)[place - 1 : place + 1]
        spike = rng.normal(size=SIZE)
        points[place] += 4 * nearby.max() * spike / np.linalg.norm(spike)
        (found,) = strays(points)
        assert (found.place, found.rule) == (place, "detour")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, -1, 2])
def test_another_run_s_checkpoint_is_named_wherever_it_is(kind: Kind, place: int) -> None:
    for seed in range(5):
        points = kind(6, seed)
        points[place] = kind(6, seed + 1000)[place]
        found = strays(points)
        assert [one.place for one in found] == [place % 6]


@pytest.mark.parametrize("kind", [walk, straight])
def test_another_iteration_under_its_name_is_named(kind: Kind) -> None:
    for seed in range(5):
        run = kind(24, seed)
        points = run[:16:2].copy()
        points[2] = run[11]
        (found,) = strays(points)
        assert (found.place, found.rule, found.others) == (2, "order", (5, 6))


def test_the_same_weights_under_two_names_are_named() -> None:
    for kind in KINDS:
        points = kind(8, 0)
        points[5] = points[2]
        first, *_ = strays(points)
        assert first.rule == "same" and {first.place, *first.others} == {2, 5}


def test_two_runs_in_one_window_are_told_apart() -> None:
    points = walk(8, 0)
    points[4:] = walk(8, 1)[4:]
    (found,) = strays(points)
    assert (found.place, found.rule, found.others) == (4, "jump", (3,))


def test_several_strays_are_all_named() -> None:
    points, rng = walk(12, 0), np.random.default_rng(5)
    for place in (3, 7):
        points[place] += 6 * rng.normal(size=SIZE)
    assert {one.place for one in strays(points)} == {3, 7}


def test_a_longer_interval_explains_a_longer_step() -> None:
    points = straight(30, 0)[[0, 1, 2, 3, 4, 14]]
    assert strays(points, [0, 1, 2, 3, 4, 14]) == []
    assert [one.place for one in strays(points)] == [5]


def test_a_higher_learning_rate_explains_a_longer_step() -> None:
    rng = np.random.default_rng(0)
    rates = [0.1, 0.1, 0.1, 0.1, 1.0]
    points = (np.array(rates)[:, None] * rng.normal(size=(5, SIZE))).cumsum(0)
    assert strays(points, rates=rates) == []
    assert [one.place for one in strays(points)] == [4]


def test_weights_that_are_not_finite_are_named_before_anything_else() -> None:
    points = jitter(5, 0)
    found = strays(points, nonfinite=[0, 0, 3, 0, 0])
    assert found == [Stray(2, "nonfinite", 3.0)]


def test_a_run_that_stands_still_raises_no_alarm() -> None:
    assert strays(np.ones((6, SIZE))) == []
