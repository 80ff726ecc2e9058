"""What the evidence says that the mean of a window gives up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.profile import PROFILES
from examples.wsm_vs_wsd.progress_given_up import given_up, loss_at, progress_given_up
from examples.wsm_vs_wsd.results import Results

HOUR = PROFILES["hour"]


def _results(curves: dict[int, dict[str, float]], rows: Sequence[dict[str, Any]] = ()) -> Results:
    arms = {
        f"s{seed}-main": {"seed": seed, "curve": curve, "rows": rows}
        for seed, curve in curves.items()
    }
    return Results({"arms": arms, "runs": [{"profile": asdict(HOUR)}]})


def test_losses_between_two_points_of_a_curve_lie_on_a_line() -> None:
    curve = {100: 2.0, 200: 1.0, 400: 0.5}
    assert [loss_at(curve, step) for step in (100, 125, 200, 300, 400)] == [2, 1.75, 1, 0.75, 0.5]


def test_of_an_even_fall_the_mean_gives_half_up() -> None:
    steady = {str(step): 3.0 - step / 4000 for step in range(250, 4001, 250)}
    behind = given_up(_results({1: steady, 2: dict.fromkeys(steady, 1.5)}), "main", 800)
    assert behind == {1: pytest.approx(0.1), 2: 0}


def test_a_curve_that_does_not_cover_the_window_says_nothing() -> None:
    begun = {str(step): 1.0 for step in range(250, 2001, 250)}
    late = {str(step): 1.0 for step in range(3500, 4001, 250)}
    assert given_up(_results({1: begun, 2: late}), "main", 800) == {}
    assert given_up(_results({2: late}), "main", 400) == {2: 0}


def test_the_table_adds_what_is_given_up_to_the_gain() -> None:
    steady = {str(step): 3.0 - step / 4000 for step in range(250, 4001, 250)}
    rows = [
        {"name": names.stable("main", 4000), "test": 2.0},
        {"name": names.merged("main", "mean", 800, 25, 4000), "test": 1.75},
        {"name": names.decay("main", "linear", 800), "test": 1.5},
    ]
    found = progress_given_up(_results({1: steady, 2: steady}, rows)).rows
    gain, behind, both, decay = "+0.2500", "+0.1000", "+0.3500", "+0.5000"
    expected = [f"{value} ± 0.0000" for value in (gain, behind, both, decay)]
    assert found == [("main", "800", *expected)]
