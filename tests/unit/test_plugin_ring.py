"""Which kept checkpoints form the window."""

from __future__ import annotations

from typing import Any

import pytest

from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.restart import leads_to
from wsm_megatron.plugin.ring import Ring, window_size
from wsm_megatron.schedule.decay import coefficients
from wsm_megatron.schedule.window import Consumed


def filled(options: dict[str, Any], iterations: list[int], tokens_each: int = 100) -> Ring:
    ring = Ring(WSMConfig(**options))
    for iteration in iterations:
        ring.add(Consumed(iteration, iteration * tokens_each, 1))
        ring.confirm(iteration)
    return ring


def kept(ring: Ring) -> list[int]:
    return [c.iteration for c in ring.kept]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num": 3}, [30, 40, 50]),
        ({"num": 9}, [10, 20, 30, 40, 50]),
        ({"window_iters": 20}, [30, 40, 50]),
        ({"window_iters": 25}, [30, 40, 50]),
        ({"window_tokens": 2000}, [30, 40, 50]),
        ({"window_tokens": 1999}, [40, 50]),
    ],
)
def test_the_window_moves_on(options: dict[str, Any], expected: list[int]) -> None:
    assert kept(filled(options, [10, 20, 30, 40, 50])) == expected


def test_confirming_says_what_left_the_window() -> None:
    ring = filled({"num": 2}, [10, 20])
    ring.add(Consumed(30, 3000, 1))
    assert kept(ring) == [10, 20] and 30 in ring and ring.pending == (30,)
    assert ring.confirm(30) == (10,)


def test_a_failed_keep_pushes_nothing_out() -> None:
    ring = filled({"num": 2}, [10, 20])
    ring.add(Consumed(30, 3000, 1))
    ring.discard(30)
    assert kept(ring) == [10, 20] and 30 not in ring


def test_older_ones_may_enter_later_after_a_restart() -> None:
    assert kept(filled({"num": 3}, [50, 40, 30])) == [30, 40, 50]
    ring = filled({"num": 3}, [50, 40, 30])
    assert not ring.may_hold(20)
    assert filled({"num": 3}, [50, 40]).may_hold(30)


def test_nothing_before_the_start() -> None:
    ring = filled({"num": 3, "start_iter": 30}, [50])
    assert ring.may_hold(30) and not ring.may_hold(20)


def test_the_recipe_weighs_what_was_trained_in_between() -> None:
    ring = filled({"num": 3, "decay": "1-sqrt", "min_decay": 0.1}, [10, 40, 50])
    recipe = ring.recipe()
    assert recipe is not None and recipe.unit == "tokens" and recipe.iterations == (10, 40, 50)
    assert recipe.coefficients == coefficients((1000, 4000, 5000), "1-sqrt", 0.1)


def trained(*consumed: tuple[int, int, int, int], **options: Any) -> Ring:
    """A ring of checkpoints: iteration, samples, sequence length, where the job began."""
    ring = Ring(WSMConfig(**options))
    for one in consumed:
        ring.add(Consumed(*one))
        ring.confirm(one[0])
    return ring


GROWS = ((10, 100, 16, 0), (20, 200, 16, 0), (30, 300, 128, 20), (40, 400, 128, 20))


def test_positions_count_each_interval_at_its_own_sequence_length() -> None:
    recipe = trained(*GROWS, num=4).recipe()
    assert recipe is not None and recipe.unit == "tokens" and recipe.why_iterations is None
    assert recipe.positions == (1600, 3200, 16000, 28800)
    assert recipe.coefficients == coefficients((1600, 3200, 16000, 28800), "linear", 0.0)


@pytest.mark.parametrize(("tokens", "expected"), [(12800, [30, 40]), (25600, [20, 30, 40])])
def test_a_window_in_tokens_counts_them_too(tokens: int, expected: list[int]) -> None:
    assert kept(trained(*GROWS, window_tokens=tokens)) == expected


def test_a_length_that_changed_in_between_cannot_be_counted() -> None:
    """In a job that began at 15, of which nothing was kept."""
    changed = ((10, 100, 16, 0), (20, 200, 128, 15), (30, 300, 128, 15))
    recipe = trained(*changed, num=3).recipe()
    assert recipe is not None and recipe.unit == "iterations"
    assert recipe.positions == (10, 20, 30)
    assert "between iterations 10 and 20" in str(recipe.why_iterations)
    assert kept(trained(*changed, window_tokens=10**9)) == [20, 30], "how far back 10 lies?"


def test_what_leads_to_a_later_checkpoint() -> None:
    """Started from 4, after a branch from 0 had gone on to 8."""
    later = Consumed(12, 120, 16, 4)
    assert leads_to(Consumed(8, 80, 16, 4), later)
    assert not leads_to(Consumed(8, 80, 16, 0), later)
    assert not leads_to(Consumed(8, 80, 16, 6), later)
    assert leads_to(Consumed(4, 40, 16, 0), later) and leads_to(Consumed(2, 20, 16, 0), later)
    assert leads_to(Consumed(8, 80, 16), later) and leads_to(later, Consumed(16, 160, 16))


def test_one_checkpoint_is_no_merge() -> None:
    assert filled({"num": 3}, [10]).recipe() is None


def test_the_size_of_a_full_window() -> None:
    assert window_size(WSMConfig(num=5), 10, None) == 5
    assert window_size(WSMConfig(window_iters=40), 10, None) == 5
    assert window_size(WSMConfig(window_tokens=4000), 10, 100) == 5
    assert window_size(WSMConfig(window_tokens=4000), None, 100) is None
