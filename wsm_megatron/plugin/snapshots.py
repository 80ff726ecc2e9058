"""The snapshots of a run: which there are, in which state, and what a merge makes of them."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from wsm_megatron.plugin.collectives import failures, is_first_rank
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

    def coefficients(self) -> MergeCoefficients | None:
        """The merge of what is kept; None for fewer than two."""
        if len(kept := self.kept) < 2:
            return None
        return MergeCoefficients.over(kept, self._config.decay, self._config.min_decay)

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
        kept, config = self.kept, self._config
        if iteration < config.start_iter:
            return False
        if config.num is not None:
            return sum(c.iteration > iteration for c in kept) < config.num
        if kept and config.window_iters is not None:
            return iteration >= kept[-1].iteration - config.window_iters
        return True

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
        if not self.may_hold(checkpoint.iteration):
            return False
        if self._config.window_tokens is None or checkpoint is kept[-1]:
            return True
        newest, own = kept[-1].tokens, checkpoint.tokens
        if newest is None or own is None:  # how far back it lies cannot be known
            return False
        return own >= newest - self._config.window_tokens

    def _drop(self, iteration: int) -> None:
        del self._snapshots[iteration]
        self._store.drop(iteration)


def window_size(
    config: WSMConfig, every: int | None, tokens_per_iteration: int | None
) -> int | None:
    """How many snapshots the full window holds, or None where that cannot be known beforehand; of a
    moving average the sample that is being taken in.

    Args:
        every: iterations between snapshots, where regular.
        tokens_per_iteration: global batch size x sequence length, where constant.
    """
    if config.moving is not None:
        return 1
    if config.num is not None:
        return config.num
    if every is None:
        return None
    if config.window_iters is not None:
        return config.window_iters // every + 1
    if not tokens_per_iteration:
        return None
    assert config.window_tokens is not None
    return config.window_tokens // (every * tokens_per_iteration) + 1
