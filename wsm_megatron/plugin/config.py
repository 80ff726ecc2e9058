"""Every option of the training plugin: the ``--wsm-merge-*`` flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from wsm_megatron.errors import UsageError
from wsm_megatron.options import (
    COUNT,
    NUMBER,
    PATH,
    SWITCH,
    TEXT,
    Options,
    count,
    list_of,
    one_of,
    option,
)
from wsm_megatron.plugin.combination import (
    HALF_LIFE,
    HALF_LIFE_TOKENS,
    ITERS,
    NUM,
    TOKENS,
    Combination,
    Reach,
)
from wsm_megatron.schedule.decay import DECAYS, coefficients
from wsm_megatron.schedule.half_life import HalfLife

T = TypeVar("T")

STORES = ("memory", "disk")
ALL = "all"
"""Of ``--wsm-merge-emit``: every merge."""


@dataclass(frozen=True, kw_only=True)
class WSMConfig(Options):
    """What is kept, how it is merged, and what is done with the merge.

    One of ``num``, ``window_iters`` and ``window_tokens`` says how far back a merge reaches; or one
    of ``half_life`` and ``half_life_tokens`` that there is a moving average instead of a window.
    Every decay over every length is one merge, all of them of the snapshots that the longest one
    keeps. Of options that take several values one may stand alone; they are kept as tuples.
    Raises ``UsageError``, naming the flags, for contradictions and numbers out of range.
    """

    prefix: ClassVar[str] = "--wsm-merge-"

    num: int | tuple[int, ...] | None = option(
        "merge the last N snapshots; several make several merges", list_of(COUNT), None, least=1
    )
    window_iters: int | tuple[int, ...] | None = option(
        "merge the snapshots of the last I iterations, both ends included; several make several "
        "merges",
        list_of(COUNT),
        None,
        metavar="I,...",
        least=1,
    )
    window_tokens: int | tuple[int, ...] | None = option(
        "merge the snapshots of the last T tokens, both ends included: 500M, 2B; several make "
        "several merges",
        list_of(COUNT),
        None,
        metavar="T,...",
        least=1,
    )
    half_life: int | None = option(
        "instead of a window: a moving average of the main params, in which the weight of a sample "
        "halves every I iterations",
        COUNT,
        None,
        metavar="I",
        least=1,
    )
    half_life_tokens: int | None = option(
        "the same, halved every T tokens: 500M, 2B", COUNT, None, metavar="T", least=1
    )
    average_every: int | None = option(
        "of a window: merge the means of the main params after every K-th iteration between two "
        "snapshots, and not the snapshots alone; of a moving average: a sample every K iterations",
        COUNT,
        None,
        default_text="a moving average takes every iteration, a window has no means",
        metavar="K",
        least=1,
    )
    interval: int | None = option(
        "a snapshot every I iterations; what a job saves because it ends takes no place in the "
        "window",
        COUNT,
        None,
        default_text="at every --save-interval",
        metavar="I",
        least=1,
    )
    start_iter: int = option(
        "no snapshot before iteration I, e.g. the switch to annealing data",
        COUNT,
        0,
        metavar="I",
        least=0,
    )
    decay: str | tuple[str, ...] = option(
        f"decay shape: {', '.join(DECAYS)}, or a CSV file of t,s points; several make several "
        "merges",
        list_of(TEXT),
        ("linear",),
        default_text="linear",
        metavar="SHAPE,...",
    )
    min_decay: float = option(
        "floor of the decay: the minimum LR as a fraction of the maximum", NUMBER, 0.0, metavar="M"
    )
    store: str = option("where snapshots are kept", one_of(STORES), "memory")
    dir: Path | None = option(
        "folder of the disk store, may be local to the node",
        PATH,
        None,
        default_text="SAVE/wsm_shards",
        metavar="DIR",
    )
    save_interval: int | None = option(
        "emit a merged checkpoint every I iterations; there is always one at the end of training, "
        "and one at the next snapshot after SIGUSR2 to any rank",
        COUNT,
        None,
        metavar="I",
        least=1,
    )
    save: Path | None = option(
        "root of the merged checkpoints, with its own tracker",
        PATH,
        None,
        default_text="SAVE/wsm",
        metavar="DIR",
    )
    emit: str | tuple[str, ...] | None = option(
        "which of several merges are emitted: each by its decay and length, 1-sqrt:8, or all; of "
        "several each gets a root below --wsm-merge-save, named as wsm sweep names the merge",
        list_of(TEXT),
        None,
        default_text="the first",
        metavar="SHAPE:LENGTH,...",
    )
    eval: bool = option(
        "evaluate the merged weights, of every merge, whenever Megatron evaluates, on the same "
        "batches",
        SWITCH,
        False,
    )
    optimizer_state: str = option(
        "moments of merged checkpoints: the newest ones, merged ones (three times the memory), or "
        "no optimizer state at all",
        one_of(("last", "merge", "drop")),
        "last",
    )
    allow_lr_decay: bool = option(
        "merge although the LR schedule decays too: the effective decay is then the output",
        SWITCH,
        False,
    )
    dry_run: bool = option(
        "say which windows fit, what they cover and what they cost, and end before training",
        SWITCH,
        False,
    )

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """How far back the merges reach; of a moving average its half-life."""
        lengths = {
            NUM: self.num,
            ITERS: self.window_iters,
            TOKENS: self.window_tokens,
            HALF_LIFE: self.half_life,
            HALF_LIFE_TOKENS: self.half_life_tokens,
        }
        return tuple(Reach(unit, one) for unit, some in lengths.items() for one in _each(some))

    @property
    def reach(self) -> Reach:
        """The longest of them: what is kept."""
        return max(self.reaches, key=lambda one: one.length)

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """Every merge: each decay over each length."""
        return tuple(
            Combination(decay, self.min_decay, reach, self.points_every)
            for reach in self.reaches
            for decay in _each(self.decay)
        )

    @property
    def emitted(self) -> tuple[Combination, ...]:
        """Those of the merges that become checkpoints."""
        if self.emit is None:
            return self.combinations[:1]
        if _each(self.emit) == (ALL,):
            return self.combinations
        return tuple(self._named(text) for text in _each(self.emit))

    def check(self) -> None:
        self._check_lists()
        self._check_lengths()
        if self.dir is not None and self.store != "disk":
            raise UsageError("--wsm-merge-dir has no effect without --wsm-merge-store disk")
        for decay in _each(self.decay):
            _check_decay(decay, self.min_decay)
        self._check_combinations()

    def _check_lists(self) -> None:
        for one in self.options():
            values = getattr(self, one.name)
            if values == ():
                raise UsageError(f"{one.flag} has no value: give one, or leave it out")
            if isinstance(values, tuple) and len(set(values)) < len(values):
                listed = ", ".join(map(str, values))
                raise UsageError(f"{one.flag} names a value twice: {listed}")

    def _check_lengths(self) -> None:
        lengths = (self.num, self.window_iters, self.window_tokens)
        lives = (self.half_life, self.half_life_tokens)
        if (given := sum(length is not None for length in (*lengths, *lives))) != 1:
            raise UsageError(
                "give exactly one of --wsm-merge-num, --wsm-merge-window-iters and "
                "--wsm-merge-window-tokens, or, for a moving average, --wsm-merge-half-life or "
                f"--wsm-merge-half-life-tokens, not {given}"
            )
        if self.moving is not None:
            self._check_moving()
        elif self.interval is not None:
            self.check_blocks(self.interval, "--wsm-merge-interval")
        for one in self.reaches:
            if one == Reach(NUM, 1):
                raise UsageError("--wsm-merge-num 1: a merge needs at least two checkpoints")
            if one.unit == ITERS and one.length < (self.interval or 0):
                raise UsageError(
                    f"{one.flag} {one.length} is shorter than --wsm-merge-interval "
                    f"{self.interval}: a merge needs at least two checkpoints"
                )

    def _check_combinations(self) -> None:
        names = [one.name for one in self.combinations]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(
                f"--wsm-merge-decay: two merges would have one name, {twice[0]}: rename a curve"
            )
        if len(set(self.emitted)) < len(self.emitted):
            raise UsageError(f"--wsm-merge-emit names a merge twice: {', '.join(_each(self.emit))}")
        idle = [] if self.eval else [one for one in self.combinations if one not in self.emitted]
        if idle and not self.dry_run:
            raise UsageError(
                f"{', '.join(map(_written, idle))} would be neither evaluated nor emitted: give "
                "--wsm-merge-eval, name them in --wsm-merge-emit, or leave them out"
            )

    def _named(self, text: str) -> Combination:
        """The merge that ``--wsm-merge-emit`` names."""
        decay, _, length = text.rpartition(":")
        for one in self.combinations:
            if one.decay == decay and length and one.reach.length == _length(length):
                return one
        known = ", ".join(map(_written, self.combinations))
        raise UsageError(f"--wsm-merge-emit {text}: the merges of this run are {known}; or {ALL}")

    @property
    def moving(self) -> HalfLife | None:
        """The half-life of the moving average; None for a window."""
        if self.half_life is not None:
            return HalfLife(length=self.half_life, unit="iterations")
        if self.half_life_tokens is not None:
            return HalfLife(length=self.half_life_tokens, unit="tokens")
        return None

    @property
    def snapshot_every(self) -> int | None:
        """Iterations between snapshots; None where they come with the saves."""
        return self.interval if self.moving is None else self.average_every or 1

    @property
    def points_every(self) -> int | None:
        """Iterations between the points of block means; None for none."""
        return None if self.moving is not None else self.average_every

    def _check_moving(self) -> None:
        flag = "--wsm-merge-half-life" + ("" if self.half_life else "-tokens")
        of_windows = {
            "--wsm-merge-interval": self.interval is not None,
            "--wsm-merge-decay": _each(self.decay) != ("linear",),
            "--wsm-merge-min-decay": self.min_decay != 0,
            "--wsm-merge-store disk": self.store == "disk",
            "--wsm-merge-optimizer-state merge": self.optimizer_state == "merge",
            "--wsm-merge-emit": self.emit is not None,
            "--wsm-merge-dry-run": self.dry_run,
        }
        if given := [name for name, is_given in of_windows.items() if is_given]:
            raise UsageError(
                f"{flag}: a moving average has no window, {', '.join(given)} without effect; it "
                "takes a sample every --wsm-merge-average-every iterations"
            )

    def check_blocks(self, every: int, flag: str) -> None:
        """Raise ``UsageError`` unless blocks of ``every`` iterations, as ``flag`` says, are made of
        whole steps of ``average_every``, and of several."""
        if (step := self.points_every) is None or (every % step == 0 and step < every):
            return
        why = (
            "a block mean would be over the snapshot alone"
            if step == every
            else "a block, from one snapshot to the next, is of whole steps"
        )
        raise UsageError(
            f"--wsm-merge-average-every {step} does not divide {flag} {every} into several: {why}"
        )


def _each(value: T | tuple[T, ...] | None) -> tuple[T, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _written(one: Combination) -> str:
    """As ``--wsm-merge-emit`` names it."""
    return f"{one.decay}:{one.reach.length}"


def _length(text: str) -> int:
    try:
        return count(text)
    except UsageError as error:
        raise UsageError(f"--wsm-merge-emit: {error}") from None


def _check_decay(decay: str, min_decay: float) -> None:
    """Raise ``UsageError`` for unknown shapes and bad floors."""
    for flag, shape, floor in (("decay", decay, 0.0), ("min-decay", "linear", min_decay)):
        try:
            coefficients((0, 1), shape, floor)
        except UsageError as error:
            raise UsageError(f"--wsm-merge-{flag}: {error}") from None
