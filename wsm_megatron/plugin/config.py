"""Every option of the training plugin: the ``--wsm-merge-*`` flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from wsm_megatron.errors import UsageError
from wsm_megatron.options import COUNT, NUMBER, PATH, SWITCH, TEXT, Options, one_of, option
from wsm_megatron.schedule.decay import DECAYS, coefficients
from wsm_megatron.schedule.half_life import HalfLife

STORES = ("memory", "disk")


@dataclass(frozen=True, kw_only=True)
class WSMConfig(Options):
    """What is kept, how it is merged, and what is done with the merge.

    One of ``num``, ``window_iters`` and ``window_tokens`` says how far back a merge reaches; or one
    of ``half_life`` and ``half_life_tokens`` that there is a moving average instead of a window.
    Raises ``UsageError``, naming the flags, for contradictions and numbers out of range.
    """

    prefix: ClassVar[str] = "--wsm-merge-"

    num: int | None = option("merge the last N snapshots", COUNT, None, least=1)
    window_iters: int | None = option(
        "merge the snapshots of the last I iterations, both ends included",
        COUNT,
        None,
        metavar="I",
        least=1,
    )
    window_tokens: int | None = option(
        "merge the snapshots of the last T tokens, both ends included: 500M, 2B",
        COUNT,
        None,
        metavar="T",
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
    decay: str = option(
        f"decay shape: one of {', '.join(DECAYS)}, or a CSV file of t,s points",
        TEXT,
        "linear",
        metavar="SHAPE",
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
    eval: bool = option(
        "evaluate the merged weights whenever Megatron evaluates, on the same batches",
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

    def check(self) -> None:
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
        if self.num == 1:
            raise UsageError("--wsm-merge-num 1: a merge needs at least two checkpoints")
        if self.interval is not None and (self.window_iters or self.interval) < self.interval:
            raise UsageError(
                f"--wsm-merge-window-iters {self.window_iters} is shorter than "
                f"--wsm-merge-interval {self.interval}: a merge needs at least two checkpoints"
            )
        if self.dir is not None and self.store != "disk":
            raise UsageError("--wsm-merge-dir has no effect without --wsm-merge-store disk")
        coefficients((0, 1), self.decay, self.min_decay)  # refuses unknown shapes and bad floors

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
            "--wsm-merge-decay": self.decay != "linear",
            "--wsm-merge-min-decay": self.min_decay != 0,
            "--wsm-merge-store disk": self.store == "disk",
            "--wsm-merge-optimizer-state merge": self.optimizer_state == "merge",
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
