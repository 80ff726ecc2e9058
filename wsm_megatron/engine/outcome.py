"""What a merge did: its checkpoints, and each rank's part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wsm_megatron.engine.phases import RankReport


@dataclass(frozen=True)
class MergedCheckpoint:
    """One published checkpoint.

    Attributes:
        iterations: of its sources, oldest first; as coefficients.
        resume: what became of the optimizer state and how to launch Megatron, as in
            ``wsm_merge.json``.
    """

    output: Path
    iterations: tuple[int, ...]
    coefficients: tuple[float, ...]
    effective_lr: tuple[float, ...]
    resume: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Bytes are those of tensors and objects, over all ranks.

    Attributes:
        ranks: each rank's part; empty where everything was published before. How long rank 0
            published is known on rank 0.
    """

    merged: tuple[MergedCheckpoint, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    ranks: tuple[RankReport, ...] = ()

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
        checkpoints = [{**asdict(one), "output": str(one.output)} for one in self.merged]
        return {
            **checkpoints[-1],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": self.seconds,
            "merged": checkpoints,
            "ranks": [one.as_data() for one in self.ranks],
        }
