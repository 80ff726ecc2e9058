"""The snapshots of a run: which there are, in which state, and what a merge makes of them."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from wsm_megatron.plugin.collectives import failures, is_first_rank
from wsm_megatron.plugin.combination import Combination
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.store import Store
from wsm_megatron.schedule.coefficients import MergeCoefficients
from wsm_megatron.schedule.window import Checkpoint, Consumed, count_tokens

logger = logging.getLogger(__name__)


class State(Enum):
    """Of a snapshot; the same on every rank."""

    COPYING = "on its way to the store"
    AWAITING = "held by every rank; the run's own save of that iteration is not durable yet"
    KEPT = "counts: it belongs to the window"


@dataclass
class _Snapshot:
    checkpoint: Consumed
    state: State
    durable: bool = True
    copy: Future[None] | None = None
    """This rank's, while the state is COPYING."""


class Snapshots:
    """The state machine of all snapshots. Knows no tensors. ::

        take() ──▶ COPYING ──▶ AWAITING ──▶ KEPT ──▶ dropped: the window has moved past it
                      │           ▲ adopt()
                      └──▶ dropped: the copy failed on some rank

    ``take``, ``adopt`` and ``confirm`` only note what happened; all other steps are made by
    ``settle``, in which all ranks agree. What is dropped is forgotten, its bytes too. One that is
    not kept yet pushes no other out: should it fail, nothing is lost.

    Args:
        store: holds the bytes of every snapshot that is not dropped.
    """

    def __init__(self, config: WSMConfig, store: Store) -> None:
        self._config, self._store = config, store
        self._snapshots: dict[int, _Snapshot] = {}

    def __contains__(self, iteration: int) -> bool:
        return iteration in self._snapshots

    def state(self, iteration: int) -> State | None:
        """None where there is no snapshot, or no more."""
        found = self._snapshots.get(iteration)
        return None if found is None else found.state

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        """Those that form the window, oldest first."""
        return count_tokens([one.checkpoint for one in self._in(State.KEPT)])

    def coefficients(self, combination: Combination | None = None) -> MergeCoefficients | None:
        """The merge of what is kept, of the first combination where none is named; None for fewer
        than two snapshots of it."""
        return (combination or self._config.combinations[0]).over(self.kept)

    def take(self, checkpoint: Consumed, *, durable: bool = True) -> None:
        """Start copying the live shards.

        Args:
            durable: False where it is to count from :meth:`confirm` on.
        """
        assert checkpoint.iteration not in self, f"iteration {checkpoint.iteration} is there"
        copy = self._store.put(checkpoint)
        self._snapshots[checkpoint.iteration] = _Snapshot(checkpoint, State.COPYING, durable, copy)

    def adopt(self, checkpoint: Consumed) -> None:
        """Take over one that an earlier job left in every rank's store."""
        assert checkpoint.iteration not in self, f"iteration {checkpoint.iteration} is there"
        self._snapshots[checkpoint.iteration] = _Snapshot(checkpoint, State.AWAITING)

    def confirm(self, iteration: int) -> None:
        """The run's own save is durable: the snapshot counts from the next :meth:`settle` on."""
        if found := self._snapshots.get(iteration):
            found.durable = True

    def settle(self) -> tuple[int, ...]:
        """Wait for copies, and bring every snapshot as far as it can go. Collective.

        One whose copy failed on some rank is dropped on all, with a warning of the first.

        Returns:
            The iterations that left the window.
        """
        for snapshot in self._in(State.COPYING):
            self._finish_copy(snapshot)
        left: list[int] = []
        for snapshot in self._in(State.AWAITING):
            if snapshot.durable:
                snapshot.state = State.KEPT
                left += self._move_window()
        return tuple(left)

    def may_hold(self, iteration: int) -> bool:
        """Whether a checkpoint that is not kept may belong to the window that ends at the newest
        kept one: how many tokens lie between them is known only once it is kept."""
        config = self._config
        return iteration >= config.start_iter and config.reach.may_hold(iteration, self.kept)

    def _in(self, state: State) -> list[_Snapshot]:
        """Oldest first, on every rank."""
        found = [one for one in self._snapshots.values() if one.state is state]
        return sorted(found, key=lambda one: one.checkpoint.iteration)

    def _finish_copy(self, snapshot: _Snapshot) -> None:
        assert snapshot.copy is not None
        iteration = snapshot.checkpoint.iteration
        failed = failures(snapshot.copy.exception())
        if not failed:
            snapshot.copy, snapshot.state = None, State.AWAITING
            return
        self._drop(iteration)
        if is_first_rank():
            logger.warning("wsm: window without iteration %d: %s", iteration, "; ".join(failed))

    def _move_window(self) -> list[int]:
        """Drop what lies outside the window that ends at the newest kept one."""
        kept = self.kept
        gone = [c.iteration for c in kept if not self._is_inside(c, kept)]
        for iteration in gone:
            self._drop(iteration)
        return gone

    def _is_inside(self, checkpoint: Checkpoint, kept: tuple[Checkpoint, ...]) -> bool:
        config = self._config
        return checkpoint.iteration >= config.start_iter and config.reach.holds(checkpoint, kept)

    def _drop(self, iteration: int) -> None:
        del self._snapshots[iteration]
        self._store.drop(iteration)
