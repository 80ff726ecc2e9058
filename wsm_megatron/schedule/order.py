"""In which order the coefficients of a decay go to the checkpoints. Pure.

A decay gives one coefficient to each checkpoint, oldest first. The other orders keep the values and
deal them out differently; the checkpoints stay where they are, oldest first. What follows is no
decay of the learning rate any more, in general: some effective LR may lie above 1. Both are the
modifiers of Megatron-LM's ``weighted_merge.py``, with the same result for the same seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

SEQUENTIAL, REVERSED, SCRAMBLED = "sequential", "reversed", "scrambled"
ORDERS = (SEQUENTIAL, REVERSED, SCRAMBLED)


def reorder(coefficients: Sequence[float], order: str, seed: int = 0) -> tuple[float, ...]:
    """The coefficients of a decay, in the order in which the checkpoints, oldest first, get them.

    Args:
        coefficients: oldest first, as the decay gives them.
        order: ``sequential``: as they are. ``reversed``: the j-th oldest checkpoint gets what the
            j-th newest would. ``scrambled``: as ``random.Random(seed).shuffle`` leaves them.
        seed: of ``scrambled``.
    """
    assert order in ORDERS, order
    dealt = list(coefficients)
    if order == REVERSED:
        dealt.reverse()
    elif order == SCRAMBLED:
        random.Random(seed).shuffle(dealt)
    return tuple(dealt)
