"""What a merge did: its checkpoints, and each rank's part."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsm_megatron.execution.timing import RankReport
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.trajectory.record import Trajectory


@dataclass(frozen=True)
class MergedCheckpoint:
    """One published checkpoint.

    Attributes:
        iterations: of its sources, oldest first.
        decay: what these weigh, and at which positions.
        resume: what became of the optimizer state and how to launch Megatron, as in
            ``wsm_merge.json``.
        made: whether this merge made it; otherwise it was published before.
    """

    output: Path
    iterations: tuple[int, ...]
    decay: MergeCoefficients
    resume: dict[str, Any] = field(default_factory=dict)
    made: bool = field(default=True, compare=False)

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.decay.coefficients

    @property
    def effective_lr(self) -> tuple[float, ...]:
        return self.decay.effective_lr

    def as_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "output": str(self.output),
            "iterations": self.iterations,
            "coefficients": self.coefficients,
            "effective_lr": self.effective_lr,
            "unit": self.decay.unit,
            "resume": self.resume,
        }


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Bytes are those of tensors and objects, over all ranks.

    Attributes:
        ranks: each rank's part; empty where everything was published before. How long rank 0
            published is known on rank 0.
        trajectory: of the sources, on rank 0, where it was wanted and something was read.
    """

    merged: tuple[MergedCheckpoint, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    ranks: tuple[RankReport, ...] = ()
    trajectory: Trajectory | None = None

    @property
    def output(self) -> Path:
        """The merged checkpoint; of several, the last one published."""
        return self.merged[-1].output

    @property
    def iterations(self) -> tuple[int, ...]:
        return self.merged[-1].iterations

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.merged[-1].coefficients

    @property
    def effective_lr(self) -> tuple[float, ...]:
        return self.merged[-1].effective_lr

    @property
    def resume(self) -> dict[str, Any]:
        return self.merged[-1].resume

    def as_data(self) -> dict[str, Any]:
        """Plain JSON types."""
        checkpoints = [one.as_data() for one in self.merged]
        return {
            **checkpoints[-1],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": self.seconds,
            "merged": checkpoints,
            "ranks": [one.as_data() for one in self.ranks],
            **({} if self.trajectory is None else {"trajectory": self.trajectory.summary()}),
        }
