"""Launch flags: one place that the merge, the documentation and the launches in tests share."""

from __future__ import annotations

from argparse import Namespace

import pytest

from wsm_megatron.planning.launch_flags import (
    CONTINUE,
    DECAY,
    EVALUATE,
    FINETUNE,
    GOALS,
    Position,
    launches,
    position_of,
)

ITERATIONS = Position(unit="iters", trained=8, scheduled=6)
SAMPLES = Position(unit="samples", trained=64, scheduled=48)


def flags(optimizer: bool, position: Position, steps: int | None = None) -> dict[str, str]:
    found = launches(optimizer=optimizer, position=position, decay_steps=steps)
    assert [one.goal for one in found] == list(GOALS)
    return {one.goal: " ".join(one.flags) for one in found}


def test_with_optimizer_state():
    assert flags(True, ITERATIONS) == {
        CONTINUE: "",
        DECAY: "--override-opt_param-scheduler --lr-decay-style WSD --lr-wsd-decay-style "
        "minus_sqrt --lr-wsd-decay-iters D --lr-decay-iters 6+D --train-iters 8+D",
        FINETUNE: "--finetune",
        EVALUATE: "--skip-train",
    }


def test_weights_only():
    assert flags(False, ITERATIONS) == {
        CONTINUE: "--no-load-optim --no-load-rng --lr-warmup-iters 0",
        DECAY: "--no-load-optim --no-load-rng --lr-warmup-iters 0 --lr-decay-style WSD "
        "--lr-wsd-decay-style minus_sqrt --lr-wsd-decay-iters D --lr-decay-iters D "
        "--train-iters 8+D",
        FINETUNE: "--finetune",
        EVALUATE: "--skip-train",
    }


@pytest.mark.parametrize("optimizer, decay_samples", [(True, 148), (False, 100)])
def test_by_samples(optimizer, decay_samples):
    words = flags(optimizer, SAMPLES, steps=100)[DECAY]
    assert f"--lr-wsd-decay-samples 100 --lr-decay-samples {decay_samples}" in words
    assert "--train-samples 164" in words and "iters" not in words


def test_position_of_a_common_state():
    scheduler = {"num_steps": 60}
    args = {"train_samples": None, "global_batch_size": 8, "consumed_train_samples": 64}
    state = {"iteration": 9, "opt_param_scheduler": scheduler, "args": Namespace(**args)}
    assert position_of(state) == Position(unit="iters", trained=9, scheduled=8)
    state["args"].train_samples = 1000
    assert position_of(state) == Position(unit="samples", trained=64, scheduled=60)
