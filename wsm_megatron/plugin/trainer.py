"""What the plugin asks of the framework that trains: Megatron-LM or Megatron-Bridge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from wsm_megatron.config import MergeConfig
from wsm_megatron.schedule.window import Consumed


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training is, and what a save of the framework's own wants to know about it."""

    iteration: int
    flops: Any
    scheduler: Any
    data_iterator: Any


class Checkpoints(Protocol):
    """The run's ordinary checkpoints, loaded by the framework itself; collective throughout."""

    def attach(self, model: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
        """Take model, optimizer and scheduler as they were built, and loaded."""

    @property
    def start(self) -> Consumed:
        """Where the run was started from."""

    def available(self) -> list[int]:
        """Iterations that the window may be refilled from; the same on every rank."""

    def load(self, iteration: int) -> Consumed | None:
        """Load one of them into model and optimizer; see :meth:`.WSM.refill`."""

    def load_merge(self, root: Path, iteration: int) -> bool:
        """Load a merged checkpoint of the run into model and optimizer; whether its main params are
        those of its weights."""


class Trainer(Protocol):
    """One run of the framework.

    Attributes:
        args: Megatron-LM's arguments, or what has their names and meaning.
        checkpoints: of this run.
        precision: how main params and weights are kept, in the names of Megatron's arguments.
    """

    @property
    def args(self) -> Any: ...

    @property
    def checkpoints(self) -> Checkpoints: ...

    @property
    def precision(self) -> Mapping[str, Any]: ...

    def saves_after_training(self, iteration: int) -> bool:
        """Whether the framework makes another save once its loop has ended at ``iteration``."""

    def finish_saves(self) -> None:
        """Wait until asynchronous saves under way are durable. Collective."""

    def untimed(self) -> AbstractContextManager[None]:
        """Around work that is not to count as time of an iteration. Collective."""

    def evaluating_merge(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Around an evaluation of merged weights: its results go to TensorBoard and W&B once under
        each of ``names``, and its samples are not counted."""

    def write_scalars(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write to TensorBoard and W&B, on the rank that has them."""

    def save_below(
        self,
        staging: Path,
        model: Sequence[torch.nn.Module],
        optimizer: Any,
        progress: Progress,
        provenance: dict[str, Any],
        *,
        drop: bool,
    ) -> None:
        """Save model and optimizer as they are now below another root, at once, with
        ``provenance`` in the common state. Collective.

        Args:
            drop: leave the optimizer out.
        """

    def resume(self, iteration: int, config: MergeConfig) -> dict[str, Any]:
        """How to launch from a merge that is emitted now, for its provenance."""
