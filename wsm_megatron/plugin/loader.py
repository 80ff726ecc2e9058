"""After a restart: the run's ordinary checkpoints, loaded by the framework, for the window."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.layout import PROVENANCE_FILE, is_complete
from wsm_megatron.checkpoint.run_directory import list_checkpoints
from wsm_megatron.errors import MergeError
from wsm_megatron.plugin.collectives import all_gather, broadcast, is_first_rank
from wsm_megatron.plugin.shards import unlike_weights
from wsm_megatron.schedule.window import Consumed

logger = logging.getLogger(__name__)

_NAMED = 3  # params in a message


@dataclass(frozen=True)
class Loaded:
    """What a load brought."""

    consumed: Consumed
    """How far the run had come there."""
    save_interval: int | None
    """That of the job that saved it, where known."""


class Loader(ABC):
    """Loads checkpoints of the run into the live model and optimizer; see :class:`.Checkpoints`.

    Args:
        args: Megatron's arguments, or what has their names.
        interval: iterations between snapshots; None where they come with the saves.
    """

    def __init__(self, args: Any, interval: int | None) -> None:
        self._args, self._interval = args, interval

    @abstractmethod
    def _started(self) -> Loaded:
        """What the run was started from. Model and optimizer are attached."""

    @abstractmethod
    def _load(self, iteration: int | None, root: Path | None = None) -> Loaded:
        """Load an ordinary checkpoint, past any non-persistent one, or (None) what the run was
        started from, as it was then; the LR scheduler stays out of it. Collective.

        Args:
            root: where the checkpoint lies, if that is not ``--load``.
        """

    def attach(self, model: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
        """Take model, optimizer and scheduler as they were built, and loaded."""
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        started = self._started()
        self._start, self._start_counts = started.consumed, self._has_snapshot(started)
        unlike = self._unlike() if self._start.iteration else ""
        if unlike and is_first_rank():
            logger.warning(
                "wsm: iteration %d, which this run was started from: the main params of %s are "
                "not those of its weights, and the first step overwrites the weights by them, "
                "with this plugin or without",
                *(self._args.iteration, unlike),
            )

    @property
    def start(self) -> Consumed:
        """Where the run was started from."""
        return self._start

    def available(self) -> list[int]:
        """Iterations that the window may be refilled from: of finished checkpoints below
        ``--load`` that are no merges, and the one that was loaded; the same on every rank.
        Collective."""
        root, start = self._args.load, self._start.iteration
        found = set(broadcast(lambda: _finished(root), f"listing {root}"))
        if self._interval is not None:
            found = {i for i in (*found, start) if i % self._interval == 0}
        elif not self._start_counts:
            found.discard(start)
        return sorted(found)

    def load(self, iteration: int) -> Consumed | None:
        """Load an ordinary checkpoint; for the iteration that the run was started from, exactly
        what was loaded then, a non-persistent checkpoint perhaps. Collective.

        The scheduler stays out of it: loading it twice would add its steps up.

        Returns:
            How far the run had come there; None for a checkpoint of which the run had no snapshot,
            and, after a warning, for one that is not what its folder says, or not fit for a merge.

        Raises:
            MergeError: the run cannot return to where it was started from.
        """
        if iteration == self._start.iteration:
            self._come_back()
            return self._start
        loaded = self._load(iteration)
        if not self._has_snapshot(loaded):
            return None
        if loaded.consumed.iteration != iteration:
            reason = f"its state says iteration {loaded.consumed.iteration}"
        elif unlike := self._unlike():
            reason = f"the main params of {unlike} are not those of its weights"
        else:
            return loaded.consumed
        if is_first_rank():
            logger.warning(
                "wsm: window without iteration %d: in %s, %s", iteration, self._args.load, reason
            )
        return None

    def load_merge(self, root: Path, iteration: int) -> bool:
        """Load a merged checkpoint of the run, below a root of its own; whether its main params are
        those of its weights. :meth:`load` of the start brings the run back. Collective."""
        return self._load(iteration, root).consumed.iteration == iteration and not self._unlike()

    def _come_back(self) -> None:
        loaded = self._load(None).consumed.iteration
        if loaded != self._start.iteration:
            raise MergeError(
                f"the run was started from iteration {self._start.iteration}, and now iteration "
                f"{loaded} is loaded in its place: is another job writing below "
                f"{self._args.load}? Start this one again when that has ended"
            )
        self._scheduler.step(increment=0)  # the LR of the parameter groups came from the checkpoint

    def _has_snapshot(self, loaded: Loaded) -> bool:
        """Whether it was saved in its turn, and not at an exit."""
        every = self._interval or loaded.save_interval
        return not every or loaded.consumed.iteration % every == 0

    def _unlike(self) -> str:
        """Some of the params whose main params are of other weights on any rank. Collective."""
        names = set().union(*all_gather(unlike_weights(self._model, self._optimizer)))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(sorted(names)[:_NAMED]) + more


def _finished(root: str | None) -> list[int]:
    if not root or not Path(root).is_dir():
        return []
    found = list_checkpoints(Path(root))
    return sorted(
        i
        for i, path in found.items()
        if i > 0 and is_complete(path) and not (path / PROVENANCE_FILE).is_file()
    )
