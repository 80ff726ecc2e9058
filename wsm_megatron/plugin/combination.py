"""What a run makes of its window: a decay over a length of it. There may be several of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wsm_megatron.config import MergeConfig
from wsm_megatron.planning.merge_set import merge_name
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint

NUM, ITERS, TOKENS = "num", "window_iters", "window_tokens"
"""Ways to say how far back a merge reaches: the names of the options."""
HALF_LIFE, HALF_LIFE_TOKENS = "half_life", "half_life_tokens"
"""Ways to say how fast a moving average forgets."""

_OFFLINE = {NUM: "last", ITERS: "window_iterations", TOKENS: "window_tokens"}
"""The same as options of an offline merge."""


@dataclass(frozen=True)
class Reach:
    """How far back from the newest snapshot a merge reaches, both ends included.

    Attributes:
        unit: NUM, ITERS or TOKENS; HALF_LIFE or HALF_LIFE_TOKENS of a moving average, which is one
            snapshot.
        length: snapshots, iterations or tokens.
    """

    unit: str
    length: int

    @property
    def flag(self) -> str:
        """That gives it."""
        return "--wsm-merge-" + self.unit.replace("_", "-")

    def may_hold(self, iteration: int, kept: Sequence[Checkpoint]) -> bool:
        """Whether a checkpoint, kept or not, may lie within it: how many tokens lie between it and
        the newest of ``kept`` is known only once it is kept."""
        if self.unit == NUM:
            return sum(c.iteration > iteration for c in kept) < self.length
        if self.unit == ITERS and kept:
            return iteration >= kept[-1].iteration - self.length
        return True

    def holds(self, checkpoint: Checkpoint, kept: Sequence[Checkpoint]) -> bool:
        """Whether one of ``kept``, oldest first, lies within it."""
        if not self.may_hold(checkpoint.iteration, kept):
            return False
        if self.unit != TOKENS or checkpoint is kept[-1]:
            return True
        newest, own = kept[-1].tokens, checkpoint.tokens
        if newest is None or own is None:  # how far back it lies cannot be known
            return False
        return own >= newest - self.length

    def size(self, every: int | None, tokens_per_iteration: int | None) -> int | None:
        """How many snapshots it holds when full, or None where that cannot be known beforehand.

        Args:
            every: iterations between snapshots, where regular.
            tokens_per_iteration: global batch size x sequence length, where constant.
        """
        if self.unit in (HALF_LIFE, HALF_LIFE_TOKENS):
            return 1
        if self.unit == NUM:
            return self.length
        if every is None:
            return None
        if self.unit == ITERS:
            return self.length // every + 1
        if not tokens_per_iteration:
            return None
        return self.length // (every * tokens_per_iteration) + 1


@dataclass(frozen=True)
class Combination:
    """One merge of those that a run evaluates, or emits.

    Attributes:
        decay: its name, or the path of its curve.
        points_every: iterations between the points of block means, where means are merged.
    """

    decay: str
    min_decay: float
    reach: Reach
    points_every: int | None = None

    @cached_property
    def name(self) -> str:
        """What ``wsm sweep`` calls the same merge: ``1-sqrt-last8``; of merges that it cannot make,
        ``1-sqrt-last8-means10`` and ``half-life1000``."""
        if self.reach.unit not in _OFFLINE:
            return self.reach.unit.replace("_", "-") + str(self.reach.length)
        means = "" if self.points_every is None else f"-means{self.points_every}"
        return self._offline_name + means

    @property
    def _offline_name(self) -> str:
        reach = {_OFFLINE[self.reach.unit]: self.reach.length}
        if self.reach.unit != NUM:
            reach = {name: (length,) for name, length in reach.items()}  # type: ignore[misc]
        places = {"load": Path("run"), "save": Path("merged")}
        decay = {"decay": self.decay, "min_decay": self.min_decay}
        return merge_name(MergeConfig(**places, **decay, **reach))  # type: ignore[arg-type]

    def select(self, kept: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        """Those of ``kept``, oldest first, that it merges."""
        return tuple(c for c in kept if self.reach.holds(c, kept))

    def over(self, kept: Sequence[Checkpoint]) -> MergeCoefficients | None:
        """The merge that it is of ``kept``, oldest first; None for fewer than two of them."""
        if len(selected := self.select(kept)) < 2:
            return None
        return MergeCoefficients.over(selected, self.decay, self.min_decay)
