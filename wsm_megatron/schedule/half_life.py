"""Moving averages by half-life: what each sample weighs. Pure.

After samples at positions p_1 .. p_n (iterations or tokens), with half-life H, the average is::

    E_n = sum_i 2^(-(p_n - p_i) / H) theta_i / W_n        W_n = sum_i 2^(-(p_n - p_i) / H)

a weighted mean: its coefficients sum to 1 from the first sample on, so there is no start (at zero,
or at the first sample) that has to wear off. Step by step, which is how it is kept::

    W_n = 2^(-(p_n - p_(n-1)) / H) W_(n-1) + 1        E_n = E_(n-1) + (theta_n - E_(n-1)) / W_n

with W_0 = 0. For even steps of d and q = 2^(-d / H), W_n = (1 - q^n) / (1 - q), and the effective
LR of the update before sample i is (1 - q^(n - i + 1)) / (1 - q^n): an ``ema`` decay without a
horizon.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from wsm_megatron.schedule.window import Consumed, count_tokens

UNITS = ("iterations", "tokens")


@dataclass(frozen=True, kw_only=True)
class HalfLife:
    """In which distance a sample's weight halves: ``length`` of ``unit``, one of :data:`UNITS`."""

    length: int
    unit: str

    def remaining(self, older: Consumed, newer: Consumed) -> float | None:
        """2^(-d / H) for the distance d between two points of a run, in float64; None where d is
        in tokens and not known, or the run went back."""
        distance: int | None = newer.iteration - older.iteration
        if self.unit == "tokens":
            before, after = (one.tokens for one in count_tokens((older, newer)))
            distance = None if before is None or after is None else after - before
        if distance is None or distance <= 0:
            return None
        return float(2.0 ** (-distance / self.length))


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """How far a moving average has come.

    Attributes:
        last: the newest sample. weight: W_n, of all samples together. samples: n.
    """

    half_life: HalfLife
    last: Consumed
    weight: float = 1.0
    samples: int = 1

    def advanced(self, to: Consumed) -> Averaged:
        """With one more sample; the only one, where the distance to it cannot be known."""
        remaining = self.half_life.remaining(self.last, to)
        if remaining is None:
            return replace(self, last=to, weight=1.0, samples=1)
        return replace(
            self, last=to, weight=remaining * self.weight + 1.0, samples=self.samples + 1
        )

    def describe(self) -> dict[str, Any]:
        """Plain JSON types, which :meth:`read` reads."""
        return {
            "half_life": self.half_life.length,
            "unit": self.half_life.unit,
            "weight": self.weight,
            "samples": self.samples,
            "last": vars(self.last),
        }

    @classmethod
    def read(cls, described: dict[str, Any]) -> Averaged:
        return cls(
            half_life=HalfLife(length=described["half_life"], unit=described["unit"]),
            last=Consumed(**described["last"]),
            weight=described["weight"],
            samples=described["samples"],
        )
