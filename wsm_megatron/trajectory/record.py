"""The trajectory of a window: its checkpoints, their inner products, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from wsm_megatron.errors import MergeError
from wsm_megatron.schedule.decay import DECAYS, coefficients
from wsm_megatron.trajectory.geometry import Geometry
from wsm_megatron.trajectory.gram import Gram, Group, added
from wsm_megatron.trajectory.strays import Stray, find_strays
from wsm_megatron.trajectory.variance import UpdateVariance, update_variance

FORMAT = 1
WEIGHTS = ("model", "main param")
"""Roles of which the path of a run is judged: a tensor is counted as one or the other."""


@dataclass(frozen=True)
class PathPoint:
    """One checkpoint: where it lies, and the learning rate that it was saved at, if known."""

    path: str
    iteration: int
    lr: float | None


@dataclass(frozen=True)
class DecayedVariance:
    """What a decay over the whole window does to its updates: shares of 1.

    Attributes:
        averaged_away: of walk and jitter. progress_kept: of the drift.
        distance: of the merge from the newest checkpoint, over the usual step.
    """

    decay: str
    averaged_away: float
    progress_kept: float
    distance: float


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints of a window, oldest first.

    Attributes:
        positions: in ``unit``, tokens or iterations.
        grams: by role and part of the model; empty where nothing was read.
        missing: elements of which nothing is known, as an earlier merge had finished them.
    """

    points: tuple[PathPoint, ...]
    positions: tuple[int, ...]
    unit: str
    grams: Mapping[Group, Gram]
    missing: int = 0

    @cached_property
    def weights(self) -> Geometry:
        """Of all weights: main params where these were read, model tensors elsewhere."""
        return Geometry(self._summed(role for role, _ in self.grams if role in WEIGHTS))

    @property
    def by_role(self) -> dict[str, Geometry]:
        roles = dict.fromkeys(role for role, _ in self.grams)
        return {role: Geometry(self._summed((role,))) for role in roles}

    @property
    def by_part(self) -> dict[str, Geometry]:
        """Of the weights, in the order of the model: layers by number."""
        parts: dict[str, list[Gram]] = {}
        for (role, part), gram in self.grams.items():
            if role in WEIGHTS:
                parts.setdefault(part, []).append(gram)
        named = sorted(parts, key=_natural)
        return {part: Geometry(_sum(parts[part])) for part in named}

    @cached_property
    def strays(self) -> list[Stray]:
        """Checkpoints that are off the path, by all weights."""
        return find_strays(
            self.weights.squared_distances,
            self.positions,
            [one.lr for one in self.points],
            self.weights.gram.nonfinite,
        )

    @cached_property
    def variance(self) -> UpdateVariance:
        return update_variance(self.weights.updates, self.positions)

    def decayed(self, decays: Sequence[str] = DECAYS) -> list[DecayedVariance]:
        """What decays do, of those that can be laid over the positions."""
        even = len(set(self.positions)) < len(self.positions)
        step = float(np.median(self.weights.steps)) or 1.0
        return [
            DecayedVariance(
                decay,
                self.variance.averaged_away(c),
                self.variance.progress_kept(c),
                float(self.weights.to_merge(c)[-1]) / step,
            )
            for decay in decays
            if not even or decay == "mean"
            for c in [coefficients(range(len(self.points)) if even else self.positions, decay)]
        ]

    def warnings(self) -> list[str]:
        """A sentence for every stray: which, why, and the way out."""
        return [self._warning(one) for one in self.strays]

    def summary(self) -> dict[str, Any]:
        """Plain JSON types; without the inner products, which are as many as layers times n²."""
        geometry = self.weights
        return {
            "sources": [vars(one) for one in self.points],
            "positions": list(self.positions),
            "unit": self.unit,
            "missing_elements": self.missing,
            "norms": geometry.norms.tolist(),
            "to_mean": geometry.to_mean.tolist(),
            "steps": geometry.steps.tolist(),
            "cosines": geometry.cosines.tolist(),
            "shares": dict(zip(("drift", "walk", "jitter"), self.variance.shares, strict=True)),
            "decays": [vars(one) for one in self.decayed()],
            "warnings": self.warnings(),
        }

    def as_data(self) -> dict[str, Any]:
        """:meth:`summary` and the inner products; :meth:`of_data` reads it."""
        return {
            "format": FORMAT,
            **self.summary(),
            "groups": [
                {
                    "role": role,
                    "part": part,
                    "elements": gram.elements,
                    "nonfinite": list(gram.nonfinite),
                    "products": gram.products.tolist(),
                }
                for (role, part), gram in self.grams.items()
            ],
        }

    @classmethod
    def of_data(cls, data: Any, where: str) -> Trajectory:
        """Raises ``MergeError`` for what :meth:`as_data` did not make."""
        try:
            if data["format"] != FORMAT:
                raise MergeError(f"{where}: format {data['format']}, of another version")
            points = tuple(PathPoint(**one) for one in data["sources"])
            grams = {(str(one["role"]), str(one["part"])): _gram(one) for one in data["groups"]}
            if not grams or any(len(g.products) != len(points) for g in grams.values()):
                raise ValueError("as many products as checkpoints are wanted")
            positions = tuple(map(int, data["positions"]))
            if len(positions) != len(points):
                raise ValueError("as many positions as checkpoints are wanted")
            return cls(points, positions, str(data["unit"]), grams, int(data["missing_elements"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MergeError(
                f"{where} is damaged, or no trajectory ({type(error).__name__}: {error}); "
                "wsm inspect RUN --trajectory makes it again"
            ) from error

    def _summed(self, roles: Iterable[str]) -> Gram:
        wanted = set(roles)
        return _sum(gram for (role, _), gram in self.grams.items() if role in wanted)

    def _warning(self, one: Stray) -> str:
        name = self.points[one.place].path
        others = " and ".join(str(self.points[j].iteration) for j in one.others)
        out = "leave it out (--iterations) unless that is meant"
        if one.rule == "nonfinite":
            return f"{name}: {one.value:.0f} weights are NaN or Inf: leave it out (--iterations)"
        if one.rule == "same":
            return f"{name} has the weights of iteration {others}: a copy under another name? {out}"
        if one.rule == "order":
            return (
                f"{name} lies between iterations {others}, not where its number says: another "
                f"iteration under its name? {out}"
            )
        if one.rule == "detour":
            return (
                f"{name} is off the run's path: {one.value:.1f} times as far from iterations "
                f"{others} as these are from each other: a spike, or another run's? {out}"
            )
        if one.place in (0, len(self.points) - 1):
            return (
                f"{name} is off the run's path: {one.value:.1f} times as far from iteration "
                f"{others} as any other two neighbours are: a spike, or another run's? {out}"
            )
        return (
            f"{name}: from iteration {others} to it the run jumps, {one.value:.1f} times as far as "
            "between any other two neighbours: two runs, or a spike in between? End the window "
            "before (--to), or start it there (--from)"
        )


def _gram(data: Mapping[str, Any]) -> Gram:
    products = np.asarray(data["products"], dtype=float)
    nonfinite = tuple(map(int, data["nonfinite"]))
    if products.shape != (len(nonfinite),) * 2 or not np.isfinite(products).all():
        raise ValueError("products are a square of finite numbers")
    return Gram(int(data["elements"]), products, nonfinite)


def _sum(grams: Iterable[Gram]) -> Gram:
    (total,) = added({("", ""): gram} for gram in grams).values()
    return total


def _natural(part: str) -> tuple[tuple[int, int, str], ...]:
    """To sort ``layers.10`` behind ``layers.9``."""
    return tuple((1, int(w), "") if w.isdigit() else (0, 0, w) for w in part.split("."))
