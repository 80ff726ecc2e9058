"""Whether the learning rate was constant over the sources of a merge. Pure.

A merge is a decay of a constant learning rate; over a window in which the rate itself changes, the
two multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wsm_megatron.checkpoint.lr_schedule import TOLERANCE, WARM_UP, LearningRate

_SHOWN = 4


class LRProblem(NamedTuple):
    """What is wrong with the learning rates of sources, and whether a merge of them is refused."""

    message: str
    refused: bool


def lr_problem(rates: Sequence[tuple[int, LearningRate]]) -> LRProblem | None:
    """What keeps a merge from being the decay of a constant learning rate, if anything.

    Args:
        rates: iteration and learning rate of the sources that say it, oldest first.

    Refused is a window inside of which the learning rate warms up or decays. Of one over which it
    is constant, but below the schedule's peak, and of a peak that was changed, one is only told.
    """
    if len(rates) < 2:
        return None
    values = [rate.value for _, rate in rates]
    top = max(rate.peak for _, rate in rates)
    changes = max(values) - min(values) > TOLERANCE * top
    phases = {rate.phase for _, rate in rates if not rate.is_peak}
    said = _listed(rates)
    if not changes:
        if not phases:
            return None
        return LRProblem(f"the learning rate is below its peak at all sources: {said}", False)
    if not phases:
        return LRProblem(f"the learning rate was changed inside the window: {said}", False)
    where = " and ".join(
        name
        for name, found in (("a warm-up", WARM_UP in phases), ("a decay", phases - {WARM_UP}))
        if found
    )
    return LRProblem(
        f"the window reaches into {where} of the learning rate: {said}. A merge takes the place of "
        "the decay, and the two multiply: choose a window of constant learning rate, or have both "
        "with --allow-lr-decay",
        True,
    )


def _listed(rates: Sequence[tuple[int, LearningRate]]) -> str:
    told = [
        f"{r.value:.4g} at iteration {i} ({r.value / r.peak:.1%} of its peak)" for i, r in rates
    ]
    if len(told) > _SHOWN:
        told[_SHOWN // 2 : -_SHOWN // 2] = ["..."]
    return ", ".join(told)
