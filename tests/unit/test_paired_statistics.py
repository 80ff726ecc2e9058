"""The intervals of the evidence, against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from examples.wsm_vs_wsd.statistics import correlation, interval, paired, t_quantile

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 100])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_quantiles_of_student_are_scipys(probability: float, freedom: int) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(
        stats.t.ppf(probability, freedom), rel=1e-9
    )


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_intervals_are_scipys_of_paired_differences(count: int) -> None:
    random = np.random.default_rng(count)
    one, other = random.normal(size=(2, count))
    found = paired(dict(enumerate(one)), dict(enumerate(other)))
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.sign == int(expected.low > 0) - int(expected.high < 0)


def test_only_seeds_that_both_have_are_paired() -> None:
    found = paired({1: 3.0, 2: 5.0, 3: 100.0}, {1: 1.0, 2: 2.0, 4: -7.0})
    assert (found.mean, found.count) == (2.5, 2)


def test_one_seed_decides_nothing() -> None:
    found = interval([2.0])
    assert found.mean == 2.0 and math.isnan(found.half) and found.sign == 0


def test_rank_correlations_are_scipys() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 8))
    assert correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(correlation([1.0, 2.0], [2.0, 1.0]))
