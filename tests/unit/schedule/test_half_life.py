"""What each sample of a moving average weighs."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.schedule.half_life import Averaged, HalfLife
from wsm_megatron.schedule.window import Consumed

ITERATIONS = st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True).map(sorted)


def at(iteration: int) -> Consumed:
    return Consumed(iteration, 8 * iteration, 16, 0)


def averaged(half_life: HalfLife, samples: list[Consumed]) -> list[Averaged]:
    states = [Averaged(half_life=half_life, last=samples[0])]
    for one in samples[1:]:
        states.append(states[-1].advanced(one))
    return states


@given(ITERATIONS)
def test_step_by_step_is_the_closed_form(iterations: list[int]) -> None:
    """Exactly, where weights are powers of two: a half-life of one iteration."""
    states = averaged(HalfLife(length=1, unit="iterations"), [at(i) for i in iterations])
    weights = [Fraction(1, 2 ** (iterations[-1] - i)) for i in iterations]
    assert Fraction(states[-1].weight) == sum(weights) and states[-1].samples == len(iterations)
    average, theta = Fraction(0), [Fraction(3 * i - 50, 7) for i in iterations]
    for state, value in zip(states, theta, strict=True):
        average += (value - average) / Fraction(state.weight)
    assert average == sum(w * t for w, t in zip(weights, theta, strict=True)) / sum(weights)


@given(ITERATIONS, st.integers(1, 1000))
def test_a_weight_halves_in_a_half_life(iterations: list[int], length: int) -> None:
    state = averaged(HalfLife(length=length, unit="iterations"), [at(i) for i in iterations])[-1]
    expected = sum(2.0 ** (-(iterations[-1] - i) / length) for i in iterations)
    assert state.weight == pytest.approx(expected, rel=1e-13)


def test_the_first_sample_counts_for_all_and_none_for_more_than_it_should() -> None:
    """n equal samples give what they are: no start at zero wears off."""
    states = averaged(HalfLife(length=100, unit="iterations"), [at(i) for i in range(1, 5)])
    assert states[0].weight == 1.0
    q = 2.0 ** (-1 / 100)
    assert [s.weight for s in states] == pytest.approx([(1 - q**n) / (1 - q) for n in range(1, 5)])


def test_tokens_count_at_their_own_length() -> None:
    """8 samples an iteration, of 16 tokens; then a job that began at 20, of 64."""
    samples = [at(10), at(20), Consumed(30, 240, 64, 20)]
    states = averaged(HalfLife(length=80 * 16, unit="tokens"), samples)
    halves = [1.0, 1.5, 2.0**-4 * 1.5 + 1]
    assert [s.weight for s in states] == halves


@pytest.mark.parametrize(
    "later",
    [Consumed(30, 160, 16, 0), Consumed(30, None, 16, 0), Consumed(30, 240, 64, 25)],
    ids=["no samples", "not said", "a length that changed between"],
)
def test_tokens_that_cannot_be_counted_begin_anew(later: Consumed) -> None:
    state = averaged(HalfLife(length=100, unit="tokens"), [at(10), at(20), later])[-1]
    assert (state.weight, state.samples, state.last) == (1.0, 1, later)
    counted = averaged(HalfLife(length=100, unit="iterations"), [at(10), at(20), later])
    assert [s.samples for s in counted] == [1, 2, 3]


def test_what_is_described_is_read() -> None:
    for unit in ("iterations", "tokens"):
        states = averaged(HalfLife(length=37, unit=unit), [at(i) for i in (3, 4, 9)])
        for state in states:
            assert Averaged.read(json.loads(json.dumps(state.describe()))) == state
