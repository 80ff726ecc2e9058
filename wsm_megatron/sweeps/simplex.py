"""Coefficients as softmax of logits, and the search over them. Pure but for what it is given.

The optimizer is COBYQA (scipy), a trust-region method without derivatives: a loss is close to
quadratic in the coefficients of a merge, which is what its models are. It is deterministic, so a
search that is started again asks for the same points in the same order, and whoever remembers
their scores goes on where it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from wsm_megatron.errors import UsageError

SMALLEST = 1e-3
"""Coefficients of a start are taken as no smaller: softmax reaches 0 at infinity only."""
RADII, LAST_RADIUS = (1.0, 0.5, 0.25), 0.01
"""Of the trust region, in logits: at the start, and anew from the best where that has ended, as
scores of rounded weights are not smooth; and where it ends: finer differences do not show."""


class SpentError(Exception):
    """The budget is spent; raised by the function that is minimised."""


def softmax(logits: Sequence[float]) -> tuple[float, ...]:
    """Coefficients above 0 with sum 1, up to rounding."""
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    total = math.fsum(powers)
    return tuple(power / total for power in powers)


def logits_of(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Logits, with mean 0, of coefficients that are none of them negative."""
    logs = [math.log(max(c, SMALLEST)) for c in coefficients]
    middle = math.fsum(logs) / len(logs)
    return tuple(x - middle for x in logs)


def minimize(
    score: Callable[[tuple[float, ...]], float],
    start: Sequence[float],
    most: int,
    radius: float = RADII[0],
) -> None:
    """Ask for scores of coefficients, from a start on, until they become no better.

    Args:
        score: of coefficients, the less the better; keeps what it is asked. What it raises ends
            this: :class:`SpentError` is for a budget.
        start: coefficients.
        most: calls of ``score``, at most; does not change which they are.
        radius: how far from the start is looked first, in logits.

    Raises:
        UsageError: scipy is not there.
    """
    optimize = _scipy()
    origin = logits_of(start)

    def objective(x: Any) -> float:
        return score(softmax([*map(float, x), origin[-1]]))

    options = {"maxfev": most, "initial_tr_radius": radius, "final_tr_radius": LAST_RADIUS}
    optimize.minimize(objective, list(origin[:-1]), method="COBYQA", options=options)


def _scipy() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise UsageError("wsm search needs scipy: pip install 'wsm_megatron[search]'") from error
    return optimize
