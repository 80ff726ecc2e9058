"""The coefficients of a merge, as a table and as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from wsm_megatron.schedule.coefficients import MergeCoefficients


def decay_table(decay: MergeCoefficients) -> Iterator[str]:
    yield from _coefficient_lines(decay.positions, decay, decay.unit)


def side_by_side(decays: Sequence[MergeCoefficients]) -> Iterator[str]:
    """The coefficients of several decays of the same checkpoints."""
    names = [str(one.decay) for one in decays]
    widths = [max(len(name), 8) for name in names]
    heads = "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))
    yield f"{decays[0].unit:>16}{heads}"
    for row, place in enumerate(decays[0].positions):
        weighed = zip(decays, widths, strict=True)
        values = "".join(f"  {one.coefficients[row]:>{width}.6f}" for one, width in weighed)
        yield f"{place:>16}{values}"


def source_table(iterations: Iterable[int], decay: MergeCoefficients) -> Iterator[str]:
    yield from _coefficient_lines(iterations, decay, "iteration")
    yield unit_line(decay)


def decay_data(decay: MergeCoefficients) -> dict[str, Any]:
    return {
        "positions": list(decay.positions),
        "coefficients": list(decay.coefficients),
        "effective_lr": list(decay.effective_lr),
    }


def unit_data(decay: MergeCoefficients) -> dict[str, Any]:
    """The unit of a run's positions, and why it is not tokens; the learning rates that it says."""
    return {
        "unit": decay.unit,
        "why_iterations": decay.why_iterations,
        "lr": list(decay.lr),
    }


def _coefficient_lines(places: Iterable[int], decay: MergeCoefficients, unit: str) -> Iterator[str]:
    yield f"{unit:>16}  coefficient  effective LR up to here{'  LR' if decay.lr else ''}"
    multipliers = ["", *(f"{w:.6f}" for w in decay.effective_lr)]
    rates = [f"{'' if lr is None else f'{lr:.4g}':>15}" for lr in decay.lr] or [""] * len(
        multipliers
    )
    for place, coefficient, multiplier, lr in zip(
        places, decay.coefficients, multipliers, rates, strict=True
    ):
        yield f"{place:>16}  {coefficient:>11.6f}  {multiplier:>12}{lr}"


def unit_line(decay: MergeCoefficients) -> str:
    """The axis of the decay, and why it is not tokens."""
    why = f": {decay.why_iterations}" if decay.why_iterations else ""
    return f"positions in {decay.unit}{why}"
