"""After a restart: the window filled again, from what is on disk and from the run's checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from wsm_megatron.errors import UsageError
from wsm_megatron.plugin.collectives import all_gather, is_first_rank, on_all_ranks, together
from wsm_megatron.plugin.shards import Shard
from wsm_megatron.plugin.snapshots import Snapshots
from wsm_megatron.plugin.store import Found, Store
from wsm_megatron.schedule.window import Consumed

logger = logging.getLogger(__name__)

Load = Callable[[int], int | Consumed | None]
"""Loads an iteration into model and optimizer; see :meth:`.WSM.refill`."""


@dataclass(kw_only=True)
class Refill:
    """One restart. Weights are loaded, and no snapshot is there yet.

    Attributes:
        start: where training goes on.
        available: iterations of the run's ordinary checkpoints.
        load: loads one of them; None where that is not possible.
        loaded: whether other weights are in the model than those of ``start``.
    """

    snapshots: Snapshots
    store: Store
    shards: Sequence[Shard]
    start: Consumed
    available: Sequence[int]
    load: Load | None
    loaded: bool = field(default=False, init=False)

    def run(self) -> None:
        """Fill the window. Collective.

        Raises ``ValueError`` for snapshots of another layout that nothing can take the place of.
        """
        found, misfits = take_stock(self.store, self.start.iteration)
        if self._is_of_another_run(found):
            self._drop(found)
            found = {}
        beyond = self._fill(found)
        if self.loaded and self.load is not None:
            self.load(self.start.iteration)
        self._refuse_misfits(i for i in misfits if i > beyond)

    def _is_of_another_run(self, found: dict[int, Consumed]) -> bool:
        candidates = (self.start.iteration, *self.available)
        witness = max((i for i in found if i in candidates), default=None)
        if witness is None or self._is_as_loaded(witness):
            return False
        if is_first_rank():
            logger.warning(
                "wsm: the snapshot of iteration %d is not what was loaded: this is another "
                "run, all its snapshots are dropped",
                witness,
            )
        return True

    def _is_as_loaded(self, witness: int) -> bool:
        """Whether the snapshot of ``witness`` equals what is loaded of that iteration."""
        if witness == self.start.iteration:
            return is_live(self.store, self.shards, witness)
        if self.load is None:
            return True
        fit = self.load(witness) is not None
        same = is_live(self.store, self.shards, witness)
        self.load(self.start.iteration)
        return same or not fit  # an unfit checkpoint says nothing about the shards

    def _fill(self, found: dict[int, Consumed]) -> int:
        """Newest first, until the window is full.

        Args:
            found: on disk, by iteration; what is not used of it is dropped.

        Returns:
            The first iteration that lay beyond the window; -1 where none did.
        """
        beyond, later = -1, self.start
        wanted = {i for i in (*found, *self.available) if i <= self.start.iteration}
        for iteration in sorted(wanted, reverse=True):
            if not self.snapshots.may_hold(iteration):
                break
            later = self._take_up(iteration, found.pop(iteration, None), later) or later
            if iteration in self.snapshots.settle():
                beyond = iteration
                break
        self._drop(found)
        return beyond

    def _take_up(
        self, iteration: int, on_disk: Consumed | None, later: Consumed
    ) -> Consumed | None:
        """Make a snapshot of an iteration, if it leads to ``later``; None if there is none."""
        if on_disk is not None:
            if leads_to(on_disk, later):
                self.snapshots.adopt(on_disk)
                return on_disk
            self.store.drop(iteration)
        live = self._loaded(iteration)
        if live is None or not leads_to(live, later):
            return None
        self.snapshots.take(live)
        return live

    def _loaded(self, iteration: int) -> Consumed | None:
        """Where the run was at an iteration whose weights are in the model now."""
        if iteration == self.start.iteration:
            return self.start
        if self.load is None or iteration not in self.available:
            return None
        self.loaded = True
        tokens = self.load(iteration)
        return None if tokens is None else Consumed.of(iteration, tokens)

    def _drop(self, iterations: Iterable[int]) -> None:
        for iteration in iterations:
            self.store.drop(iteration)

    def _refuse_misfits(self, misfits: Iterable[int]) -> None:
        missing = [i for i in misfits if i not in self.snapshots and self.snapshots.may_hold(i)]
        if missing:
            raise UsageError(
                f"snapshots of iterations {sorted(missing)} were taken under another parallel "
                "layout, and no checkpoint of the run is there to refill them from: restart with "
                "that layout, or move the folder of snapshots away to begin with an empty window"
            )


def take_stock(store: Store, iteration: int) -> tuple[dict[int, Consumed], set[int]]:
    """What a store holds for a restart at ``iteration``. Collective.

    Deletes what is newer (of a future that did not happen) and what some rank has not got, or not
    with a mean over the same block.

    Returns:
        The checkpoints that every rank has, by iteration, and the iterations that some rank has
        under another parallel layout.
    """
    found = Found()
    with together("looking for snapshots"):
        found = store.found()
    everywhere: list[Found] = all_gather(found)
    held = [{(c.iteration, f.blocks.get(c.iteration)) for c in f.checkpoints} for f in everywhere]
    whole = {i for i, _ in set.intersection(*held) if i <= iteration}
    for checkpoint in found.checkpoints:
        if checkpoint.iteration not in whole:
            store.drop(checkpoint.iteration)
    for misfit in found.misfits:
        if misfit > iteration:
            store.drop(misfit)
    misfits = set.union(*(set(f.misfits) for f in everywhere))
    kept = {c.iteration: c for c in found.checkpoints if c.iteration in whole}
    return kept, {i for i in misfits if i <= iteration}


def is_live(store: Store, shards: Sequence[Shard], iteration: int) -> bool:
    """Whether the main params and buffers of a snapshot equal the live ones on every rank.
    Collective."""
    same = False
    with together(f"reading the snapshot of iteration {iteration}"):
        same = all(
            torch.equal(store.get(iteration, index), shard.owned().float().cpu())
            for index, shard in enumerate(shards)
            if shard.name.startswith(("main.", "buffer."))
        )
    return on_all_ranks(same)


def leads_to(one: Consumed, later: Consumed) -> bool:
    """Whether a checkpoint lies on the way to a later one; if not, the first rank warns of it.

    All that a job saves says from which iteration the job had started. What lies behind that
    iteration and says another is of a branch that was given up.
    """
    if one.began is None or later.began is None or one.iteration <= later.began:
        return True
    if one.began != later.began and is_first_rank():
        logger.warning(
            "wsm: window without iteration %d: it is of a job that started from iteration %d, and "
            "not on the way to iteration %d, whose job started from %d",
            *(one.iteration, one.began, later.iteration, later.began),
        )
    return one.began == later.began
