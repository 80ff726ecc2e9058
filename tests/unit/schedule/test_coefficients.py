"""What a merge makes of its checkpoints, the same for command line, planning and plugin."""

from __future__ import annotations

import pytest

from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.decay import coefficients, effective_lr
from wsm_megatron.schedule.window import Checkpoint

COUNTED = [Checkpoint(10, 100), Checkpoint(20, 300), Checkpoint(30, 400)]


def test_a_decay_weighs_the_tokens_in_between() -> None:
    merge = MergeCoefficients.over(COUNTED, "1-sqrt", 0.1)
    assert merge.positions == (100, 300, 400) and merge.unit == "tokens"
    assert merge.coefficients == coefficients((100, 300, 400), "1-sqrt", 0.1)
    assert merge.effective_lr == effective_lr(merge.coefficients)
    assert merge.iterations == (10, 20, 30)
    assert merge.decay == "1-sqrt" and merge.why_iterations is None


def test_without_tokens_it_says_why() -> None:
    merge = MergeCoefficients.over([Checkpoint(10, 100), Checkpoint(20), Checkpoint(40)], "linear")
    assert merge.positions == (10, 20, 40) and merge.unit == "iterations"
    assert merge.coefficients == coefficients((10, 20, 40), "linear")
    assert "iteration 20" in str(merge.why_iterations)


def test_explicit_weights_are_of_no_decay() -> None:
    merge = MergeCoefficients.over(COUNTED, "linear", weights=(-0.5, 0.5, 1.0))
    assert merge.coefficients == (-0.5, 0.5, 1.0) and merge.decay is None
    assert merge.positions == (100, 300, 400)
    with pytest.raises(ValueError, match="sum to 2, not 1"):
        MergeCoefficients.over(COUNTED, "linear", weights=(1.0, 0.5, 0.5))
    scaled = MergeCoefficients.over(COUNTED, "linear", 0.0, (1.0, 0.5, 0.5), True)
    assert scaled.coefficients == (1.0, 0.5, 0.5)


def test_one_learning_rate_that_is_known_shows_all() -> None:
    assert MergeCoefficients.over(COUNTED, "mean").lr == ()
    one = [Checkpoint(10, 100, lr=1e-3), *COUNTED[1:]]
    assert MergeCoefficients.over(one, "mean").lr == (1e-3, None, None)
