"""The arm that all others go out from: a run at a constant LR."""

from __future__ import annotations

import shutil
from typing import Any

from examples.cpu_ranks.checkpoint import save_checkpoint
from examples.cpu_ranks.training import Training, train
from examples.wsm_vs_wsd import names
from examples.wsm_vs_wsd.bench import Bench, weights_of
from examples.wsm_vs_wsd.plan import Arm
from examples.wsm_vs_wsd.points import BlockMean, Points
from examples.wsm_vs_wsd.queue import Queue
from examples.wsm_vs_wsd.text import training_data

_LOOKS = 16
"""Times that the validation loss is looked at on the way."""


def stable(
    bench: Bench,
    queue: Queue,
    arm: Arm,
    *,
    run: str,
    steps: int,
    lr: float,
    saved: list[int],
    text: str = "clean",
    experts: bool = False,
) -> dict[str, Any]:
    """Train from the start; keep points, block means, and full checkpoints of the steps saved."""
    profile, folder = bench.profile, queue.state(arm.name)
    shutil.rmtree(folder, ignore_errors=True)
    training = bench.fresh(profile.config(arm.seed, lr, experts))
    points = Points(steps=[0], weights=[weights_of(training)])
    block, curve = BlockMean(), {}
    every = max(profile.interval, steps // _LOOKS // profile.interval * profile.interval)

    def look(training: Training) -> None:
        step = training.iteration
        if step % profile.block_every == 0:
            block.add(weights_of(training))
        if step % profile.interval == 0:
            points.steps.append(step)
            points.weights.append(weights_of(training))
            points.means.append(block.take())
        if step in saved:
            save_checkpoint(training, folder)
        if step % every == 0:
            curve[step] = bench.losses(training, ("validation",))["validation"]

    train(training, steps, training_data(text, profile.seq_length, arm.seed), on_step=look)
    points.save(folder / "points.pt")
    row = {"name": names.stable(run, steps), **bench.losses(training)}
    return {"curve": curve, "training_losses": training.losses[:: profile.interval], "rows": [row]}
