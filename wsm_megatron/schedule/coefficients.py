"""The coefficients of one merge, and what they follow from. Pure: no files, no tensors.

Command line, planning and plugin all take them from here: what one shows is what another merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from wsm_megatron.errors import UsageError
from wsm_megatron.schedule.decay import check_weights, coefficients, effective_lr, normalized
from wsm_megatron.schedule.order import SEQUENTIAL, reorder
from wsm_megatron.schedule.window import Checkpoint, positions, why_iterations


@dataclass(frozen=True, kw_only=True)
class MergeCoefficients:
    """One merge: its checkpoints, oldest first, and what each weighs.

    Attributes:
        decay: name of the decay, or path of its curve; None for explicit weights.
        positions: of the checkpoints on the axis of the decay.
        unit: of the positions, ``tokens`` or ``iterations``.
        why_iterations: why it is not tokens; None where it is.
    """

    checkpoints: tuple[Checkpoint, ...]
    decay: str | None
    positions: tuple[int, ...]
    unit: str
    coefficients: tuple[float, ...]
    why_iterations: str | None

    @classmethod
    def over(
        cls,
        checkpoints: Sequence[Checkpoint],
        decay: str,
        min_decay: float = 0.0,
        weights: Sequence[float] | None = None,
        allow_unnormalized: bool = False,
        *,
        normalize: bool = False,
        order: str = SEQUENTIAL,
        order_seed: int = 0,
    ) -> MergeCoefficients:
        """Those of a decay, or explicit weights instead, over checkpoints, oldest first.

        Args:
            normalize: explicit weights are divided by their sum.
            order: in which the coefficients of the decay go to the checkpoints (:func:`.reorder`).

        Raises ``UsageError`` as :func:`.coefficients` and :func:`.check_weights` do.
        """
        where, unit = positions(checkpoints)
        if weights is None:
            at = _apart(where, decay)
            weighed = reorder(coefficients(at, decay, min_decay), order, order_seed)
        else:
            shares = normalized(weights) if normalize else weights
            weighed = check_weights(shares, len(where), allow_unnormalized)
        return cls(
            checkpoints=tuple(checkpoints),
            decay=decay if weights is None else None,
            positions=where,
            unit=unit,
            coefficients=weighed,
            why_iterations=why_iterations(checkpoints),
        )

    @property
    def iterations(self) -> tuple[int, ...]:
        return tuple(c.iteration for c in self.checkpoints)

    @property
    def effective_lr(self) -> tuple[float, ...]:
        """The n - 1 multipliers w_i of the intervals between the checkpoints."""
        return effective_lr(self.coefficients)

    @property
    def lr(self) -> tuple[float | None, ...]:
        """Learning rates of the checkpoints; empty where none is known."""
        rates = tuple(c.lr for c in self.checkpoints)
        return rates if any(rate is not None for rate in rates) else ()


def _apart(where: tuple[int, ...], decay: str) -> tuple[int, ...]:
    """Positions that a decay can be laid over; ``mean`` asks for none.

    Raises:
        UsageError: several checkpoints lie at one position: of runs beside each other.
    """
    if decay == "mean":
        return tuple(range(len(where)))
    for older, newer in pairwise(where):
        if older == newer:
            raise UsageError(
                f"two sources lie at one position ({older:,}), as those of different runs do: a "
                f"decay ({decay}) has no order for them; use --decay mean, or give each its weight "
                "(--source PATH:WEIGHT)"
            )
    return where
