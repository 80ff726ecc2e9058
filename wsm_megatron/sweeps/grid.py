"""A sweep: a grid of windows, decays, floors, orders and end points becomes named merges.

Every combination is a :class:`.MergeConfig` of its own, and all of them are one
:class:`.MergeSet`: one plan, one read of the sources. Pure: looks at no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from wsm_megatron.config import MergeConfig
from wsm_megatron.errors import UsageError
from wsm_megatron.options import COUNT, NUMBER, TEXT, Options, list_of, one_of, option
from wsm_megatron.planning.merge_set import MergeSet, merge_name
from wsm_megatron.schedule.decay import DECAYS
from wsm_megatron.schedule.order import ORDERS, SCRAMBLED, SEQUENTIAL

GRID = "grid: every combination is one merge"
"""The heading that these options stand under."""

_ORDER = replace(one_of(ORDERS), choices=(), metavar="ORDER")
_WINDOWS = ("last", "window_iterations", "window_tokens")
_NOT_SWEPT = ("sliding_every", "weights", "allow_unnormalized", "normalize", "output_iteration")
"""Options of one merge that a grid has no use for."""


@dataclass(frozen=True, kw_only=True)
class SweepGrid(Options):
    """The axes of a sweep. Raises ``UsageError`` for an axis without values, or one twice."""

    last: tuple[int, ...] | None = option(
        "windows of the N newest checkpoints up to the end point", list_of(COUNT), None, group=GRID
    )
    window_iterations: tuple[int, ...] | None = option(
        "windows of the last I iterations up to the end point, both ends included",
        list_of(COUNT),
        None,
        group=GRID,
        metavar="I,...",
    )
    window_tokens: tuple[int, ...] | None = option(
        "windows of the last T tokens up to the end point: 500M,2B",
        list_of(COUNT),
        None,
        group=GRID,
        metavar="T,...",
    )
    to: tuple[int, ...] | None = option(
        "end points: the newest iteration of a window, included",
        list_of(COUNT),
        None,
        default_text="the tracker's",
        group=GRID,
        metavar="I,...",
    )
    decay: tuple[str, ...] = option(
        f"decay shapes: {', '.join(DECAYS)}, or CSV files of t,s points",
        list_of(TEXT),
        ("linear",),
        default_text="linear",
        group=GRID,
        metavar="SHAPE,...",
    )
    min_decay: tuple[float, ...] = option(
        "floors of the decay: minimum LR as a fraction of the maximum",
        list_of(NUMBER),
        (0.0,),
        default_text="0",
        group=GRID,
    )
    order: tuple[str, ...] = option(
        f"orders in which the coefficients go to the checkpoints: {', '.join(ORDERS)}",
        list_of(_ORDER),
        (SEQUENTIAL,),
        default_text=SEQUENTIAL,
        group=GRID,
    )
    order_seed: tuple[int, ...] = option(
        "seeds of the order scrambled", list_of(COUNT), (0,), default_text="0", group=GRID
    )

    def check(self) -> None:
        for one in self.options():
            values = getattr(self, one.name)
            if values == ():
                raise UsageError(f"{one.flag}: no value, so the grid is empty; leave it out")
            if values is not None and len(set(values)) < len(values):
                raise UsageError(f"{one.flag} names a value twice: {_listed(values)}")
        if self.order_seed != (0,) and SCRAMBLED not in self.order:
            raise UsageError("--order-seed has no effect without --order scrambled")

    @property
    def windows(self) -> list[dict[str, Any]]:
        """Options of every window; those of several kinds stand beside each other."""
        named = [
            {name: value if name == "last" else (value,)}
            for name in _WINDOWS
            for value in getattr(self, name) or ()
        ]
        return named or [{}]

    @property
    def orders(self) -> list[dict[str, Any]]:
        """Options of every order, scrambled with every seed."""
        return [
            {"order": order, "order_seed": seed}
            for order in self.order
            for seed in (self.order_seed if order == SCRAMBLED else (0,))
        ]


SHARED = tuple(
    one
    for one in MergeConfig.options()
    if one.name not in {*_NOT_SWEPT, *(one.name for one in fields(SweepGrid))}
)
"""Options that all merges of a sweep have in common."""


@dataclass(frozen=True)
class Sweep:
    """A grid over a run.

    Attributes:
        base: what all merges have in common; of ``save`` each gets a folder of its own.
    """

    base: MergeConfig
    grid: SweepGrid = SweepGrid()

    def merge_set(self) -> MergeSet:
        """Every merge of the grid: the windows of an end point beside each other, so that
        neighbours read the same sources.

        Raises ``UsageError`` where options contradict each other, or two merges have one name.
        """
        grid = self.grid
        ends: Sequence[int | None] = sorted(grid.to) if grid.to else [None]
        merges = [
            self._merge(to=to, decay=decay, min_decay=floor, **window, **order)
            for to, window, decay, floor, order in product(
                ends, grid.windows, grid.decay, grid.min_decay, grid.orders
            )
        ]
        return MergeSet(self.base.save, tuple(merges))

    def _merge(self, **options: Any) -> MergeConfig:
        one = replace(self.base, **options)
        return replace(one, save=self.base.save / merge_name(one))


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
