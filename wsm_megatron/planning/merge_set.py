"""Merges that are made together: of one read of their sources, by one plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from wsm_megatron.config import MergeConfig
from wsm_megatron.schedule.decay import DECAYS
from wsm_megatron.schedule.order import SCRAMBLED, SEQUENTIAL
from wsm_megatron.schedule.window import Window

Chosen = TypeVar("Chosen")
"""The checkpoints of one merge, in whatever form."""


@dataclass(frozen=True)
class MergeSet:
    """Merges that differ in their checkpoints, in what these weigh, and in where they go; in
    nothing else.

    Attributes:
        save: where all of them go, for messages.
        merges: each of one window and one decay; ``save`` of each is the root that its checkpoints
            get.
        sliding_every: every window also slides back by so many iterations.
    """

    save: Path
    merges: tuple[MergeConfig, ...]
    sliding_every: int | None = None

    @classmethod
    def of(cls, config: MergeConfig) -> MergeSet:
        """Every window and decay of a config."""
        single = [
            replace(config, decay=decay, sliding_every=None, **length)
            for length in _lengths(config)
            for decay in config.decays
        ]
        merges = tuple(replace(one, save=_root(config, one)) for one in single)
        return cls(config.save, merges, config.sliding_every)

    @property
    def shared(self) -> MergeConfig:
        """What all of them have in common is that of the first one."""
        return self.merges[0]

    def wanted(
        self, select: Callable[[Window], Sequence[Chosen]]
    ) -> Sequence[tuple[MergeConfig, Chosen]]:
        """Every single merge; ``select`` finds the checkpoints of one window, and of all that it
        slides to."""
        selected = cache(select)
        return [(one, chosen) for one in self.merges for chosen in selected(one.windows[0])]


def _lengths(config: MergeConfig) -> list[dict[str, Any]]:
    return [
        {"window_iterations": i, "window_tokens": t}
        for i in _each(config.window_iterations)
        for t in _each(config.window_tokens)
    ]


def _each(values: tuple[int, ...] | None) -> list[Any]:
    return [None] if values is None else [(value,) for value in values]


def _root(config: MergeConfig, one: MergeConfig) -> Path:
    """``--save``; where it gets merges of several decays or windows, a folder for each."""
    names = []
    if len(config.decays) > 1:
        names.append(Path(one.decay).stem)
    if len(config.windows) > 1:
        for length, unit in ((one.window_iterations, "iterations"), (one.window_tokens, "tokens")):
            names += [f"{n}-{unit}" for n in length or ()]
    return config.save / "-".join(names) if names else config.save


def merge_name(one: MergeConfig) -> str:
    """What a merge is called in a sweep and inside a run, its folder too: decay, floor, order and
    window. The end point is the name of the checkpoint in that folder."""
    parts = [Path(one.decay).stem if one.decay not in DECAYS else one.decay]
    if one.min_decay:
        parts.append(f"floor{one.min_decay:g}")
    if one.order != SEQUENTIAL:
        parts.append(one.order + (str(one.order_seed) if one.order == SCRAMBLED else ""))
    if one.last is not None:
        parts.append(f"last{one.last}")
    for length, unit in ((one.window_iterations, "iterations"), (one.window_tokens, "tokens")):
        parts += [f"{n}-{unit}" for n in length or ()]
    return "-".join(parts)
