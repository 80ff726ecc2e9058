"""Which checkpoints of a window do not lie on its path. Pure: distances alone.

Four rules, each with a threshold far from what training at any learning rate does. They compare
distances within the window, so they hold for any model and need no scale:

- **same**: two checkpoints are nearer to each other than :data:`SAME` of the window's usual step.
- **detour**: a checkpoint's neighbours are nearer to each other than :data:`DETOUR` times the
  distance of either to it. On a straight path that ratio is 2, in a random walk √2, and 1 for
  checkpoints that are noise around one point: it is below 1 only where the path goes somewhere and
  comes back.
- **order**: it lies on the path between two others, not where its number says. Putting a point c
  between a and b makes the path's squared length longer by |ac|² + |cb|² − |ab|²; another place
  that is cheaper by more than :data:`ORDER` squared usual steps is where it belongs. At the right
  place this is least for a straight path and for a random walk, and the same everywhere for noise.
- **jump**: a step is :data:`JUMP` times as long as any other, where neither a longer interval nor a
  higher learning rate explains it. At an end of the window it is that checkpoint which is off; in
  between, the window is of two paths. With one other step alone the square of that is asked for;
  for the first step twice as much, as a young run's steps are longer by nature.

One checkpoint is judged after the other, and the worst is left out before the next is looked for:
a stray does not make its neighbours look like strays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

SAME = 1e-3
DETOUR = 0.6
ORDER = 1.0
JUMP = 3.0

FEWEST = 3
"""Checkpoints without which nothing can be said."""


@dataclass(frozen=True)
class Stray:
    """A checkpoint that is off, by its place in the window.

    Attributes:
        rule: ``same``, ``detour``, ``order``, ``jump`` or ``nonfinite``.
        value: by how much; what it is depends on the rule.
        others: the checkpoints that it was compared with.
    """

    place: int
    rule: str
    value: float
    others: tuple[int, ...] = ()


def find_strays(
    squared: np.ndarray,
    positions: Sequence[float],
    rates: Sequence[float | None] = (),
    nonfinite: Sequence[int] = (),
) -> list[Stray]:
    """What is off the path, worst first; empty for an ordinary window.

    Args:
        squared: (n, n) squared distances, oldest first.
        positions: of the checkpoints, in any one unit.
        rates: learning rates, where they are known.
        nonfinite: of each checkpoint, values that are NaN or Inf.
    """
    found = [Stray(j, "nonfinite", float(bad)) for j, bad in enumerate(nonfinite) if bad]
    left = [j for j in range(len(squared)) if j not in {one.place for one in found}]
    while len(left) >= FEWEST:
        window = _Window(squared, left, positions, rates)
        stray = window.worst()
        if stray is None:
            break
        found.append(stray)
        if stray.rule == "jump" and stray.place not in (left[0], left[-1]):
            break  # two paths: each would have to be looked at alone
        left.remove(stray.place)
    return found


class _Window:
    """The checkpoints that are left, by their places."""

    def __init__(
        self,
        squared: np.ndarray,
        left: Sequence[int],
        positions: Sequence[float],
        rates: Sequence[float | None],
    ):
        self._squared, self._left = squared, left
        self._positions, self._rates = positions, rates
        self._steps = [float(squared[a, b]) for a, b in pairwise(left)]
        self._usual = median(self._steps)

    def worst(self) -> Stray | None:
        for rule in (self._same, self._detours, self._jumps, self._misplaced):
            found = sorted(rule(), key=lambda one: one.value)
            if found:
                return found[-1]
        return None

    def _same(self) -> Iterator[Stray]:
        """Of two that are the same, the one whose number is further from the path."""
        for n, a in enumerate(self._left):
            for b in self._left[n + 1 :]:
                if self._squared[a, b] <= SAME**2 * self._usual < self._squared.max():
                    place = max((a, b), key=self._cost_here)
                    yield Stray(place, "same", 1.0, (a if place == b else b,))

    def _detours(self) -> Iterator[Stray]:
        for a, b, c in zip(self._left, self._left[1:], self._left[2:], strict=False):
            shorter = min(self._squared[a, b], self._squared[b, c])
            if self._squared[a, c] < DETOUR**2 * shorter:
                away = float(np.sqrt(shorter / max(self._squared[a, c], 1e-300)))
                yield Stray(b, "detour", away, (a, c))

    def _misplaced(self) -> Iterator[Stray]:
        if len(self._left) < FEWEST + 1:
            return
        for here, b in enumerate(self._left):
            others = [*self._left[:here], *self._left[here + 1 :]]
            gaps = [
                (self._cost(a, b, c), a, c)
                for n, (a, c) in enumerate(pairwise(others), 1)
                if n != here
            ]
            cost, a, c = min(gaps)
            saved = (self._cost_here(b) - cost) / max(self._usual, 1e-300)
            if saved > ORDER:
                yield Stray(b, "order", saved, (a, c))

    def _jumps(self) -> Iterator[Stray]:
        for n, step in enumerate(self._steps):
            explained = [
                other * self._longer(n, m) ** 2 * self._faster(n, m) ** 2
                for m, other in enumerate(self._steps)
                if m != n
            ]
            times = float(np.sqrt(step / max(*explained, 1e-300)))
            least = JUMP if len(explained) > 1 else JUMP**2
            if times > (2 * least if n == 0 else least):
                a, b = self._left[n], self._left[n + 1]
                yield Stray(a if n == 0 else b, "jump", times, (b if n == 0 else a,))

    def _longer(self, n: int, m: int) -> float:
        """How much longer an interval is than another: so much further a straight path goes."""
        lengths = np.diff([float(self._positions[j]) for j in self._left])
        return max(1.0, lengths[n] / lengths[m]) if lengths[m] > 0 else 1.0

    def _faster(self, n: int, m: int) -> float:
        rates = [self._rates[j] if j < len(self._rates) else None for j in self._left]
        ends = [rates[n], rates[n + 1], rates[m], rates[m + 1]]
        known = [rate for rate in ends if rate]
        if len(known) < len(ends):
            return 1.0
        return max(1.0, sum(known[:2]) / sum(known[2:]))

    def _cost(self, a: int, b: int, c: int) -> float:
        """What ``b`` between ``a`` and ``c`` adds to the squared length of the path."""
        return float(self._squared[a, b] + self._squared[b, c] - self._squared[a, c])

    def _cost_here(self, b: int) -> float:
        here = self._left.index(b)
        if here == 0 or here == len(self._left) - 1:
            return float(self._squared[b, self._left[1 if here == 0 else here - 1]])
        return self._cost(self._left[here - 1], b, self._left[here + 1])
