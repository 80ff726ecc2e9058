"""Theorem 3.1, the decay shapes, CSV curves and explicit weights."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.schedule.decay import (
    DECAYS,
    Curve,
    check_weights,
    coefficients,
    effective_lr,
    from_effective_lr,
    load_curve,
)

PAPER_EMA_10 = (0.126, 0.033, 0.041, 0.052, 0.065, 0.082, 0.103, 0.130, 0.163, 0.206)

unit = st.floats(0.0, 1.0)
floors = st.one_of(st.just(0.0), unit)
positions = st.lists(st.integers(0, 10**13), min_size=2, max_size=40, unique=True).map(sorted)
falling = st.lists(unit, min_size=1, max_size=40).map(lambda w: sorted(w, reverse=True))


def test_ema_is_the_papers_figure_2() -> None:
    assert tuple(round(c, 3) for c in coefficients(range(10), "ema")) == PAPER_EMA_10


def test_linear_of_even_spacing_is_the_mean() -> None:
    assert coefficients(range(0, 1000, 100), "linear") == pytest.approx([0.1] * 10, abs=1e-15)


def test_one_sqrt_weighs_the_oldest_most() -> None:
    c = coefficients(range(1, 11), "1-sqrt")
    assert c[0] == pytest.approx(math.sqrt(0.1))
    assert list(c) == sorted(c, reverse=True)
    assert c == coefficients(range(1, 11), "minus_sqrt")


def test_cosine_and_exponential_follow_their_formulas() -> None:
    w = effective_lr(coefficients(range(4), "cosine"))
    assert w == pytest.approx([(1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3)])
    w = effective_lr(coefficients(range(4), "exponential"))
    assert w == pytest.approx([2 * 0.5 ** (i / 4) - 1 for i in (1, 2, 3)])


def test_uneven_spacing_is_weighted_by_what_was_trained() -> None:
    # Three intervals of 100, 100 and 200 tokens: u = 3/16, 6/16, 12/16.
    c = coefficients([1000, 1100, 1200, 1400], "linear")
    assert effective_lr(c) == pytest.approx([13 / 16, 10 / 16, 4 / 16])
    assert c == pytest.approx([3 / 16, 3 / 16, 6 / 16, 4 / 16])


@given(positions)
def test_mean_ignores_the_spacing(p: list[int]) -> None:
    assert coefficients(p, "mean") == (1 / len(p),) * len(p)


def test_mean_with_a_floor_is_the_floor_formula_over_the_mean() -> None:
    w = effective_lr(coefficients([0, 1, 10, 100], "mean", 0.2))
    assert w == pytest.approx([0.2 + 0.8 * (4 - i) / 4 for i in (1, 2, 3)])


@pytest.mark.parametrize("decay", DECAYS)
@given(p=positions, floor=floors)
def test_every_shape_sums_to_one_and_is_never_negative(
    decay: str, p: list[int], floor: float
) -> None:
    c = coefficients(p, decay, floor)
    w = effective_lr(c)
    assert len(c) == len(p)
    assert min(c) >= 0.0
    assert math.fsum(c) == pytest.approx(1.0, abs=1e-14)
    assert w[-1] >= floor - 1e-14
    assert all(a >= b - 1e-14 for a, b in pairwise(w))


@given(falling)
def test_every_non_increasing_decay_is_a_merge_and_back(w: list[float]) -> None:
    c = from_effective_lr(w)
    assert min(c) >= 0.0
    assert math.fsum(c) == pytest.approx(1.0, abs=1e-14)
    assert effective_lr(c) == pytest.approx(w, abs=1e-14)


@given(st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=20))
def test_round_trip_holds_for_extrapolation_too(w: list[float]) -> None:
    assert effective_lr(from_effective_lr(w)) == pytest.approx(w, abs=1e-12)


@given(st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=12), st.data())
def test_theorem_3_1(updates: list[float], data: st.DataObject) -> None:
    """The merge of the trajectory equals the trajectory of the decayed updates."""
    w = data.draw(st.lists(unit, min_size=len(updates), max_size=len(updates)))
    theta = [0.5]
    for g in updates:
        theta.append(theta[-1] - g)
    merged = sum(c * x for c, x in zip(from_effective_lr(w), theta, strict=True))
    decayed = theta[0] - sum(a * g for a, g in zip(w, updates, strict=True))
    assert merged == pytest.approx(decayed, abs=1e-12)


def test_a_full_floor_keeps_the_newest_checkpoint_alone() -> None:
    for decay in DECAYS:
        assert coefficients([1, 2, 4], decay, 1.0) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5], "mean"), "at least two"),
        (([1, 2, 2], "mean"), "2 is followed by 2"),
        (([2, 1], "ema"), "2 is followed by 1"),
        (([0.0, math.nan], "ema"), "finite"),
        (([1, 2], "cubic"), "unknown decay 'cubic'.*1-sqrt"),
        (([1, 2], "linear", 1.5), "--min-decay"),
        (([1, 2], "mean", math.nan), "--min-decay"),
        (([1, 2, 3], lambda t: t), "never increase"),
        (([1, 2, 3], lambda t: 2 - t), r"\[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coefficients(*arguments)


@pytest.mark.parametrize("header", ["", "t,s\n", "\ufeffT, S\n\n"])
def test_a_csv_curve_is_a_decay(tmp_path: Path, header: str) -> None:
    path = tmp_path / "curve.csv"
    path.write_text(header + "0,1\n0.5, 0.5\n\n1,0\n", encoding="utf-8")
    assert coefficients(range(10), str(path)) == pytest.approx(coefficients(range(10), "linear"))
    curve = load_curve(path)
    assert [curve(t) for t in (0, 0.25, 0.5, 0.75, 1)] == [1, 0.75, 0.5, 0.25, 0]


@given(st.lists(st.tuples(unit, unit), max_size=10), falling, unit, unit)
def test_a_curve_never_increases_nor_leaves_its_points(
    inner: list[tuple[float, float]], s: list[float], a: float, b: float
) -> None:
    t = sorted({0.0, 1.0, *(x for x, _ in inner)})
    s = (s + [s[-1]] * len(t))[: len(t)]
    curve = Curve(tuple(t), tuple(s))
    assert curve(min(a, b)) >= curve(max(a, b))
    assert [curve(x) for x in t] == s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no point"),
        ("t,s\n", "no point"),
        ("t,s\n0,1\n0.5,0\n", r"t = 0\.5 \(line 3\)"),
        ("0.1,1\n1,0\n", "line 1: .*start at t = 0"),
        ("0,1\n0.5,0.5\n0.5,0.2\n1,0\n", "line 3: t must increase"),
        ("0,0.5\n1,0.6\n", "line 2: s must not increase"),
        ("0,1\n1,-0.1\n", r"line 2: .*\[0, 1\]"),
        ("0,1\n1,nan\n", r"line 2: .*\[0, 1\]"),
        ("0,1\n0.5\n1,0\n", "line 2: expected two numbers"),
        ("0,1\nx,0\n", "line 2: expected two numbers t,s, not 'x,0'"),
        ("0,1\n,\n1,0\n", "line 2: expected two numbers"),
    ],
)
def test_a_bad_curve_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.csv.*{message}"):
        load_curve(path)


def test_unreadable_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: No such file"):
        coefficients([1, 2], str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"binary\.csv is not a text file"):
        load_curve(tmp_path / "binary.csv")


def test_weights_are_checked_and_never_rescaled() -> None:
    assert check_weights([-0.5, 1.5], 2) == (-0.5, 1.5)
    assert check_weights([0.3333333, 0.3333333, 0.3333333], 3) == (0.3333333,) * 3
    assert check_weights([1, 1], 2, allow_unnormalized=True) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "2 weights for 3 checkpoints"),
        ([0.5, 0.5, 0.1], "sum to 1.1, not 1.*--allow-unnormalized"),
        ([0.5, math.inf, 0.5], "weight 2 of 3 is inf"),
        ([0.5, 0.5, math.nan], "weight 3 of 3 is nan"),
    ],
)
def test_bad_weights_are_named(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights, 3)


def test_weights_that_are_not_finite_stay_refused_when_unnormalized() -> None:
    with pytest.raises(ValueError, match="inf"):
        check_weights([math.inf, 1.0], 2, allow_unnormalized=True)
