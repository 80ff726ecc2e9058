"""Decay shapes as merge coefficients: Theorem 3.1 of WSM (arXiv 2507.17634), both ways.

With checkpoints ``theta_0 .. theta_k`` (oldest first, ``n = k + 1``) and the updates between them
``g_1 .. g_k``, a merge is training under a decayed learning rate::

    sum_j c_j theta_j = theta_0 - sum_i w_i g_i      w_i = sum_{j >= i} c_j

``w_i`` is the effective LR multiplier of the i-th interval. A decay ``1 >= w_1 >= .. >= w_k >= 0``
gives ``c_0 = 1 - w_1``, ``c_j = w_j - w_{j+1}``, ``c_k = w_k``: non-negative, with sum 1.
Nothing here knows of files (but for :func:`load_curve`), ranks or tensors.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from wsm_megatron.errors import UsageError

Shape = Callable[[float], float]

EMA_REST = 0.1
"""r of the ``ema`` shape ``1 - r^(1-t)``: what EMA leaves of the start over the whole window."""

SUM_TOLERANCE = 1e-6
"""How far explicit weights may sum from 1 (rounding of what a user typed) without being refused."""

_SHAPES: dict[str, Shape] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
    "ema": lambda t: 1.0 - EMA_REST ** (1.0 - t),
    "exponential": lambda t: 2.0 * 0.5**t - 1.0,
}
_ALIASES = {"minus_sqrt": "1-sqrt"}

_MEANT = {
    "average": "mean",
    "avg": "mean",
    "uniform": "mean",
    "constant": "mean",
    "swa": "mean",
    "lawa": "mean",
    "sqrt": "1-sqrt",
}
"""What others call a shape."""

DECAYS = ("mean", *_SHAPES)
"""Names that :func:`coefficients` knows; ``minus_sqrt``, Megatron's word, means ``1-sqrt``."""


def coefficients(
    positions: Sequence[float], decay: str | Shape, min_decay: float = 0.0
) -> tuple[float, ...]:
    """Merge coefficients ``c_0 .. c_k`` of a decay shape over ``n`` checkpoints.

    The i-th interval gets ``w_i = m + (1 - m) s(u_i)`` with
    ``u_i = (p_i - p_0) / (p_k - p_0) * k / (k + 1)``: for even spacing ``u_i = i / n``, the paper's
    discretisation; uneven spacing is weighted by what was trained in between.

    Args:
        positions: ``n >= 2`` strictly increasing positions of the checkpoints, oldest first, in any
            one unit (tokens or iterations).
        decay: a name of :data:`DECAYS`, the path of a CSV curve (:func:`load_curve`), or a
            non-increasing function from [0, 1] to [0, 1].
        min_decay: the floor m in [0, 1]: the minimum LR as a fraction of the maximum.

    ``mean`` ignores the spacing: it is the floor formula over ``w_i = (n - i) / n``, so every
    coefficient is exactly ``1 / n`` for m = 0, and the newest alone gains m otherwise.

    Returns:
        n floats, oldest first, none negative, with sum 1 up to float64 rounding.

    Raises:
        UsageError: bad positions, an unknown decay, a floor outside [0, 1], or a function that
            leaves [0, 1] or increases.
    """
    points = _check_positions(positions)
    if not 0.0 <= min_decay <= 1.0:
        raise UsageError(f"--min-decay must be in [0, 1], not {min_decay}")
    if decay == "mean":
        n = len(points)
        share = (1.0 - min_decay) / n
        return (share,) * (n - 1) + (share + min_decay,)
    shape = _shape(decay)
    values = [shape(u) for u in _fractions(points)]
    _check_decay(values, decay)
    return from_effective_lr([min_decay + (1.0 - min_decay) * s for s in values])


def from_effective_lr(multipliers: Sequence[float]) -> tuple[float, ...]:
    """Theorem 3.1, from effective LR multipliers ``w_1 .. w_k`` to coefficients ``c_0 .. c_k``.

    Any finite multipliers are taken; those that increase somewhere or exceed 1 give negative
    coefficients. Raises ``UsageError`` for an empty or non-finite sequence.
    """
    w = [float(x) for x in multipliers]
    if not w or not all(map(math.isfinite, w)):
        raise UsageError(f"effective LR multipliers must be finite and at least one, not {w}")
    return (1.0 - w[0], *(a - b for a, b in pairwise(w)), w[-1])


def effective_lr(coeffs: Sequence[float]) -> tuple[float, ...]:
    """Theorem 3.1, from coefficients ``c_0 .. c_k`` to effective LR multipliers ``w_1 .. w_k``.

    ``w_i`` is the sum of ``c_i .. c_k``, correctly rounded. Where the coefficients do not sum to 1
    the merge also scales ``theta_0``, which no ``w`` shows.
    """
    return tuple(math.fsum(coeffs[i:]) for i in range(1, len(coeffs)))


def check_weights(
    weights: Sequence[float], n: int, allow_unnormalized: bool = False
) -> tuple[float, ...]:
    """Explicit weights for ``n`` checkpoints, oldest first, as floats: checked, never rescaled.

    Negative weights (extrapolation) are allowed. Raises ``UsageError`` for a wrong count, a
    non-finite weight, weights whose sum or a part of it overflows, or a sum further than
    :data:`SUM_TOLERANCE` from 1 unless ``allow_unnormalized``.
    """
    values = tuple(float(w) for w in weights)
    if len(values) != n:
        raise UsageError(f"--weights gives {len(values)} weights for {n} checkpoints")
    for j, w in enumerate(values):
        if not math.isfinite(w):
            raise UsageError(f"--weights: weight {j + 1} of {n} is {w}")
    if not math.isfinite(sum(map(abs, values))):
        raise UsageError("--weights are too large: their sum overflows")
    total = math.fsum(values)
    if abs(total - 1.0) > SUM_TOLERANCE and not allow_unnormalized:
        raise UsageError(
            f"--weights sum to {total:.9g}, not 1: the merged model would be scaled. Give shares "
            "of 1 (fractions such as 1/3 are exact), or --allow-unnormalized if that is meant"
        )
    return values


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Explicit weights divided by their sum, which is correctly rounded.

    Raises ``UsageError`` unless the weights are finite and their sum is positive and finite.
    """
    if not all(map(math.isfinite, weights)) or not math.isfinite(sum(map(abs, weights))):
        raise UsageError(f"--normalize: weights must be finite, and their sum too: {list(weights)}")
    total = math.fsum(weights)
    if total <= 0:
        raise UsageError(f"--normalize: the weights sum to {total:.9g}, which must be above 0")
    return tuple(w / total for w in weights)


@dataclass(frozen=True)
class Curve:
    """A non-increasing, piecewise linear decay curve s(t), t and s in [0, 1].

    ``t`` starts at 0, ends at 1 and increases strictly; between two points s is interpolated.
    """

    t: tuple[float, ...]
    s: tuple[float, ...]

    def __call__(self, t: float) -> float:
        right = min(max(bisect_right(self.t, t), 1), len(self.t) - 1)
        t0, t1 = self.t[right - 1 : right + 1]
        s0, s1 = self.s[right - 1 : right + 1]
        if t >= t1:  # the last point, whose value interpolation could miss by a rounding
            return s1
        # Clamped: a rounding must not make the curve increase.
        return min(s0, max(s1, s0 + (s1 - s0) * ((t - t0) / (t1 - t0))))


def load_curve(path: str | Path) -> Curve:
    """Read a decay curve from a CSV file of two columns, ``t`` and ``s``.

    A header line ``t,s`` and empty lines are allowed. Raises ``UsageError`` naming the file and
    the line for anything that is not a :class:`Curve`.
    """
    points: list[tuple[float, float]] = []
    for line, row in _csv_rows(path):
        point = _point(row, f"{path}, line {line}")
        if not points and point[0] != 0.0:
            raise UsageError(f"{path}, line {line}: the curve must start at t = 0, not {point[0]}")
        if points and point[0] <= points[-1][0]:
            raise UsageError(f"{path}, line {line}: t must increase, {points[-1][0]} is before it")
        if points and point[1] > points[-1][1]:
            raise UsageError(f"{path}, line {line}: s must not increase, {points[-1][1]} is before")
        points.append(point)
    if not points or points[-1][0] != 1.0:
        end = f"t = {points[-1][0]} (line {line})" if points else "no point"
        raise UsageError(f"{path}: the curve must go from t = 0 to t = 1, it ends at {end}")
    return Curve(tuple(t for t, _ in points), tuple(s for _, s in points))


def _csv_rows(path: str | Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that is neither empty nor the header."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except OSError as error:
        raise UsageError(f"decay curve {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"decay curve {path} is not a text file of t,s lines: {error}") from error
    rows = [(line, row) for line, row in rows if row not in ([], [""])]
    return rows[1:] if rows and [cell.lower() for cell in rows[0][1]] == ["t", "s"] else rows


def _point(row: list[str], where: str) -> tuple[float, float]:
    if len(row) != 2:
        raise UsageError(f"{where}: expected two numbers t,s, not {','.join(row)!r}")
    try:
        t, s = float(row[0]), float(row[1])
    except ValueError:
        raise UsageError(f"{where}: expected two numbers t,s, not {','.join(row)!r}") from None
    if not (0.0 <= t <= 1.0 and 0.0 <= s <= 1.0):  # also false for NaN
        raise UsageError(f"{where}: t and s must be in [0, 1], not {t},{s}")
    return t, s


def _shape(decay: str | Shape) -> Shape:
    if callable(decay):
        return decay
    name = _ALIASES.get(decay, decay)
    if name in _SHAPES:
        return _SHAPES[name]
    if Path(decay).suffix == ".csv" or Path(decay).is_file():
        return load_curve(decay)
    raise UsageError(
        f"unknown decay {decay!r}{_did_you_mean(decay)}: use one of {', '.join(DECAYS)}, or a CSV "
        "file of t,s points"
    )


def _did_you_mean(decay: str) -> str:
    name = decay.lower()
    close = [_MEANT[name]] if name in _MEANT else get_close_matches(name, DECAYS, n=1, cutoff=0.5)
    return f", did you mean {close[0]}" if close else ""


def _check_positions(positions: Sequence[float]) -> tuple[float, ...]:
    if len(positions) < 2:
        raise UsageError(f"a merge needs at least two checkpoints, not {len(positions)}")
    for p in positions:
        if not math.isfinite(p):
            raise UsageError(f"position {p} is not a finite number")
    for a, b in pairwise(positions):
        if not a < b:
            raise UsageError(f"positions must increase strictly: {a} is followed by {b}")
    return tuple(positions)


def _fractions(positions: Sequence[float]) -> tuple[float, ...]:
    """``u_1 .. u_k``, in (0, 1). Integer positions are subtracted exactly, however large."""
    first, k = positions[0], len(positions) - 1
    span = positions[-1] - first
    return tuple((p - first) * k / (span * (k + 1)) for p in positions[1:])


def _check_decay(values: Sequence[float], decay: str | Shape) -> None:
    bounded = all(0.0 <= s <= 1.0 for s in values)
    if not bounded or any(a < b for a, b in pairwise(values)):
        raise UsageError(
            f"decay {decay!r} gives {list(values)}: it must stay in [0, 1] and never increase"
        )
