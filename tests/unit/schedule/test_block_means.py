"""A merge of block means is a merge of all their points, exactly."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_megatron.schedule.block_means import Block, explicit
from wsm_megatron.schedule.decay import DECAYS, coefficients


@st.composite
def blocks(draw: st.DrawFn) -> list[Block]:
    """Consecutive blocks, of which some lost their first points and the last may end in between."""
    every = draw(st.integers(1, 7))
    found, end = [], draw(st.integers(0, 50)) * every
    for _ in range(draw(st.integers(2, 6))):
        lost, points = draw(st.integers(0, 2)), draw(st.integers(1, 5))
        first, end = end + (lost + 1) * every, end + (lost + points) * every
        found.append(Block(every=every, first=first, last=end, points=points))
    if every > 1 and draw(st.booleans()):
        last = found[-1].last + every + 1
        found.append(Block(every=every, first=last - 1, last=last, points=2))
    return found


def decayed(blocks: list[Block], decay: str, floor: float) -> tuple[float, ...]:
    return coefficients([block.last for block in blocks], decay, floor)


@given(blocks(), st.sampled_from(DECAYS), st.sampled_from([0.0, 0.25]), st.randoms())
def test_the_merge_of_means_is_the_explicit_merge(
    blocks: list[Block], decay: str, floor: float, random: object
) -> None:
    weights = decayed(blocks, decay, floor)
    iterations, shares = explicit(weights, blocks)
    assert list(iterations) == sorted(set(iterations))
    theta = {i: Fraction(random.randint(-999, 999), random.randint(1, 99)) for i in iterations}  # type: ignore[attr-defined]
    means = [sum(theta[i] for i in block.iterations) / block.points for block in blocks]
    merged = sum(Fraction(c) * mean for c, mean in zip(weights, means, strict=True))
    assert merged == sum(share * theta[i] for i, share in zip(iterations, shares, strict=True))


@given(blocks(), st.sampled_from(DECAYS))
def test_the_effective_lr_is_piecewise_linear(blocks: list[Block], decay: str) -> None:
    """By c_j / n_j at each point of block j, exactly; at the edges as in the end points' merge."""
    weights = decayed(blocks, decay, 0.0)
    _, shares = explicit(weights, blocks)
    behind = [sum(shares[index:], Fraction(0)) for index in range(len(shares) + 1)]
    start = 0
    for number, block in enumerate(blocks):
        within = behind[start : start + block.points + 1]
        falls = {before - after for before, after in pairwise(within)}
        assert falls == {Fraction(weights[number]) / block.points}
        assert within[-1] == sum(map(Fraction, weights[number + 1 :]))
        start += block.points
    assert behind[-1] == 0


@pytest.mark.parametrize("decay", ["linear", "cosine", "1-sqrt", "exponential"])
def test_even_blocks_draw_the_curve_of_the_decay(decay: str) -> None:
    """Twice as many blocks pass through the same points, and one in between each two."""
    few = [Block(every=5, first=i - 35, last=i, points=8) for i in range(40, 361, 40)]
    many = [Block(every=5, first=i - 15, last=i, points=4) for i in range(20, 361, 20)]
    behind = {}
    for blocks in (few, many):
        iterations, shares = explicit(decayed(blocks, decay, 0.0), blocks)
        lr = [sum(shares[index:], Fraction(0)) for index in range(len(shares))]
        behind[len(blocks)] = dict(zip(iterations, lr, strict=True))
    for block in few:
        assert float(behind[9][block.first] - behind[18][block.first]) == pytest.approx(
            0, abs=1e-12
        )


def test_the_mean_of_means_is_the_mean() -> None:
    blocks = [Block(every=2, first=i - 6, last=i, points=4) for i in (8, 16, 24)]
    iterations, shares = explicit((Fraction(1, 3),) * 3, blocks)  # type: ignore[arg-type]
    assert iterations == tuple(range(2, 25, 2)) and set(shares) == {Fraction(1, 12)}


def test_points_of_a_block() -> None:
    assert Block(every=5, first=15, last=30, points=4).iterations == (15, 20, 25, 30)
    assert Block(every=5, first=35, last=37, points=2).iterations == (35, 37)
    assert Block(every=5, first=37, last=37, points=1).iterations == (37,)
    with pytest.raises(AssertionError):
        _ = Block(every=5, first=15, last=30, points=3).iterations


def test_a_block_is_read_as_it_was_described() -> None:
    block = Block(every=5, first=35, last=37, points=2)
    assert Block(**json.loads(json.dumps(block.describe()))) == block
