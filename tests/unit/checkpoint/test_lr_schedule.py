"""The learning rate of a checkpoint, against Megatron's own scheduler; windows it is not constant
in."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace
from typing import Any

import pytest

from wsm_megatron.checkpoint.common_state import summarize
from wsm_megatron.checkpoint.lr_schedule import (
    CONSTANT,
    DECAY,
    WARM_UP,
    LearningRate,
    learning_rate,
)
from wsm_megatron.planning.learning_rate import lr_problem

STEPS = (0, 1, 99, 100, 101, 400, 799, 800, 801, 900, 999, 1000, 1001, 5000)
ARGS: dict[str, Any] = {
    "global_batch_size": 10,
    "lr": 3e-4,
    "min_lr": 3e-5,
    "lr_warmup_init": 1e-6,
    "lr_warmup_iters": 10,
    "lr_warmup_fraction": None,
    "lr_decay_iters": 100,
    "lr_wsd_decay_iters": 20,
    "train_iters": 200,
}
WSD = [("WSD", shape) for shape in ("linear", "cosine", "exponential", "minus_sqrt")]


def scheduler(style: str, wsd_style: str, warm_up: int) -> Any:
    module = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    return module.OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{"default_config": True}]),
        init_lr=ARGS["lr_warmup_init"],
        max_lr=ARGS["lr"],
        min_lr=ARGS["min_lr"],
        lr_warmup_steps=warm_up,
        lr_decay_steps=1000,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1000,
        wd_incr_style="constant",
        wsd_decay_steps=200,
        lr_wsd_decay_style=wsd_style,
    )


@pytest.mark.parametrize("warm_up", [100, 0])
@pytest.mark.parametrize(
    "style, wsd_style",
    [(s, "linear") for s in ("constant", "linear", "cosine", "inverse-square-root")] + WSD,
)
def test_it_is_what_megatron_sets(style: str, wsd_style: str, warm_up: int) -> None:
    """With its scheduler's state, and from arguments and consumed samples alone."""
    theirs = scheduler(style, wsd_style, warm_up)
    for step in STEPS:
        theirs.num_steps = step
        expected = theirs.get_lr({})
        args = ARGS | {
            "lr_decay_style": style,
            "lr_wsd_decay_style": wsd_style,
            "lr_warmup_iters": warm_up // 10,
            "consumed_train_samples": step,
        }
        for state in ({"opt_param_scheduler": theirs.state_dict()}, {}):
            found = learning_rate(state, args)
            assert found is not None
            assert found.value == pytest.approx(expected, rel=1e-12), (step, state)
            assert found.peak == ARGS["lr"]


def test_lengths_in_samples_and_a_warm_up_by_fraction() -> None:
    args = {
        "train_samples": 2000,
        "consumed_train_samples": 50,
        "lr_decay_style": "constant",
        "lr_decay_samples": 1000,
        "lr_warmup_fraction": 0.1,
        "lr": 1.0,
        "min_lr": 0.0,
    }
    assert learning_rate({}, args) == LearningRate(0.5, 1.0, WARM_UP)
    assert learning_rate({}, args | {"consumed_train_samples": 100}) == LearningRate(
        1.0, 1.0, CONSTANT
    )


def test_older_names_of_the_scheduler() -> None:
    state = {"start_lr": 1.0, "min_lr": 0.0, "num_iters": 75, "warmup_iter": 0, "end_iter": 100}
    found = learning_rate({"lr_scheduler": state | {"decay_style": "linear"}}, {})
    assert found == LearningRate(0.25, 1.0, DECAY)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_decay_style": "square"},
        {"lr_decay_style": None},
        {"lr": None},
        {"lr": "fast"},
        {"lr": math.nan},
        {"lr": 10**400},
        {"lr": 0.0},
        {"lr_decay_iters": -1, "train_iters": None},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": None},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": -5, "lr_wsd_decay_style": "minus_sqrt"},
        {"lr_decay_style": "WSD", "lr_wsd_decay_style": "steep"},
        {"global_batch_size": None},
    ],
)
def test_what_a_checkpoint_does_not_say_is_not_guessed(changes: dict[str, Any]) -> None:
    args = ARGS | {"lr_decay_style": "linear", "consumed_train_samples": 200}
    assert learning_rate({}, args) is not None
    found = learning_rate({}, args | changes)
    assert found is None or changes.get("lr_decay_iters") == -1  # past its end: the floor
    assert summarize({"args": argparse.Namespace(), "opt_param_scheduler": 3}).learning_rate is None


def rates(*values: float, phase: str = DECAY, peak: float = 1.0) -> list[Any]:
    return [
        (10 * (j + 1), LearningRate(v, peak, CONSTANT if v == peak else phase))
        for j, v in enumerate(values)
    ]


def test_a_constant_learning_rate_is_no_problem() -> None:
    assert lr_problem(rates(1.0, 1.0, 1.0)) is None
    assert lr_problem(rates(0.5)) is None and lr_problem([]) is None
    assert lr_problem(rates(1.0, 1.0 - 1e-9)) is None


def test_a_window_inside_a_decay_is_refused_and_listed() -> None:
    problem = lr_problem(rates(1.0, 0.75, 0.5))
    assert problem is not None and problem.refused
    assert "a decay" in problem.message and "--allow-lr-decay" in problem.message
    assert "0.75 at iteration 20 (75.0% of its peak)" in problem.message
    warm = lr_problem(rates(0.5, 1.0, phase=WARM_UP))
    assert warm is not None and warm.refused and "a warm-up" in warm.message
    both = lr_problem([*rates(0.5, 1.0, phase=WARM_UP), (30, LearningRate(0.9, 1.0, DECAY))])
    assert both is not None and "a warm-up and a decay" in both.message
    long = lr_problem(rates(*(1.0 - 0.1 * j for j in range(8))))
    assert long is not None and "..." in long.message and "at iteration 40" not in long.message


def test_a_constant_but_lower_or_changed_learning_rate_is_told() -> None:
    low = lr_problem(rates(0.1, 0.1))
    assert low is not None and not low.refused and "below its peak" in low.message
    changed = lr_problem([*rates(1.0), (20, LearningRate(0.5, 0.5, CONSTANT))])
    assert changed is not None and not changed.refused and "was changed" in changed.message
