"""Orders of coefficients, normalised weights, and windows thinned from the newest back."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.reference import RUNS, load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron import MergeConfig, UsageError, coefficients, merge
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.decay import DECAYS, normalized
from wsm_megatron.schedule.order import ORDERS, REVERSED, SCRAMBLED, SEQUENTIAL, reorder
from wsm_megatron.schedule.window import Checkpoint, Window, select

ITERATIONS = st.lists(st.integers(0, 10**6), min_size=2, max_size=40, unique=True).map(sorted)


@given(
    ITERATIONS,
    st.sampled_from(DECAYS),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_an_order_deals_out_the_same_coefficients(
    iterations: list[int], decay: str, floor: float, seed: int
) -> None:
    checkpoints = [Checkpoint(i) for i in iterations]

    def weighed(order: str) -> tuple[float, ...]:
        merge = MergeCoefficients.over(checkpoints, decay, floor, order=order, order_seed=seed)
        assert merge.iterations == tuple(iterations), "the checkpoints stay oldest first"
        return merge.coefficients

    plain = weighed(SEQUENTIAL)
    assert plain == coefficients(iterations, decay, floor)
    assert weighed(REVERSED) == plain[::-1]
    assert sorted(weighed(SCRAMBLED)) == sorted(plain)
    assert weighed(SCRAMBLED) == weighed(SCRAMBLED)


def test_scrambled_is_what_megatrons_tool_makes_of_a_seed() -> None:
    """``random.Random(seed).shuffle``, whose values are pinned here."""
    assert reorder((1.0, 2.0, 3.0, 4.0, 5.0), SCRAMBLED) == (3.0, 2.0, 1.0, 5.0, 4.0)
    assert reorder((1.0, 2.0, 3.0, 4.0, 5.0), SCRAMBLED, 1) == (3.0, 4.0, 5.0, 1.0, 2.0)


@pytest.mark.parametrize("order", ORDERS)
def test_merged_bits_of_every_order(tmp_path: Path, order: str) -> None:
    seed = 3 if order == SCRAMBLED else 0
    config = MergeConfig(
        load=RUNS / runs.DENSE, save=tmp_path, decay="ema", order=order, order_seed=seed
    )
    done = merge(config)
    plain = list(coefficients([2, 4, 6, 8], "ema"))
    shuffled = list(plain)
    random.Random(3).shuffle(shuffled)
    expected = {SEQUENTIAL: plain, REVERSED: plain[::-1], SCRAMBLED: shuffled}[order]
    assert list(done.coefficients) == expected and done.iterations == runs.ITERATIONS
    read = [load_tensors(runs.checkpoint(runs.DENSE, i)) for i in runs.ITERATIONS]
    for key, tensor in load_tensors(done.output).items():
        if tensor.is_floating_point():
            total = weighted_sum64(expected, [one[key] for one in read])
            assert same_bits(tensor, rounded(total, tensor.dtype)), key


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=20))
def test_normalised_weights_are_quotients_by_the_exact_sum(weights: list[float]) -> None:
    total = float(sum(map(Fraction, weights)))  # correctly rounded
    assert normalized(weights) == tuple(w / total for w in weights)
    assert math.isclose(math.fsum(normalized(weights)), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize(
    "weights", [(1.0, -1.0), (-2.0, 1.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)]
)
def test_weights_without_a_positive_sum_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="--normalize"):
        normalized(weights)


@given(ITERATIONS, st.integers(1, 10**5))
def test_a_least_interval_is_kept_from_the_newest_back(iterations: list[int], least: int) -> None:
    run = [Checkpoint(i) for i in iterations]
    expected = iterations[-1:]
    for iteration in iterations[-2::-1]:
        if expected[-1] - iteration >= least:
            expected.append(iteration)
    window = Window(min_interval=least)
    if len(expected) < 2:
        with pytest.raises(UsageError, match="at least two"):
            select(run, window)
        return
    chosen = [c.iteration for c in select(run, window)]
    assert chosen == expected[::-1]
    assert all(b - a >= least for a, b in pairwise(chosen))


def test_too_few_checkpoints_are_refused() -> None:
    run = [Checkpoint(i) for i in (2, 4, 6, 8)]
    assert len(select(run, Window(min_checkpoints=4))) == 4
    with pytest.raises(UsageError, match=r"--min-checkpoints 4: only 3 selected \(4, 6, 8\)"):
        select(run, Window(last=3, min_checkpoints=4))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"every": 2, "min_interval": 2}, "--every and --min-interval contradict"),
        ({"iterations": (2, 4), "min_interval": 2}, "--iterations and --min-interval contradict"),
        ({"min_interval": 0}, "--min-interval must be at least 1"),
        ({"min_checkpoints": 0}, "--min-checkpoints must be at least 1"),
    ],
)
def test_contradictions(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Window(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"order": REVERSED, "weights": (0.5, 0.5)}, "--order contradict"),
        ({"order": "backwards"}, "one of sequential, reversed, scrambled"),
        ({"order_seed": 3}, "no effect without --order scrambled"),
        ({"normalize": True}, "no effect without weights"),
        (
            {"normalize": True, "allow_unnormalized": True, "weights": (1.0, 1.0)},
            "--normalize and --allow-unnormalized contradict",
        ),
    ],
)
def test_options_that_do_not_fit(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MergeConfig(load="run", save="out", **options)
